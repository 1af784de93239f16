"""Rollouts from elsewhere: vLLM and SGLang servers over HTTP, and a pool of Ray workers, behind ``RolloutBackend``.

A server has its own kernels, so its log-probs are not those of the trainer (``bitwise`` is false): the loss wants a
correction for the difference (``rlfast.loss(..., correction=...)``). ``logp_means`` says which distribution a server's
log-prob is of; what it does not report (raw log-probs, kept mass, entropy) is NaN.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Sequence
from pathlib import Path

import torch

from rlfast import validate
from rlfast.rollout.api import MODES, Request, Rollout, SamplingParams, checked_prompt
from rlfast.rollout.calls import Calls

REASONS = {"stop": "stop", "length": "length", "abort": "abort"}


class ServerError(RuntimeError):
    """A server is down, or says something that is no answer."""


class Server(Calls):
    """What both servers share: a request is an HTTP call in a thread of its own.

    Args:
        url: of the server, such as "http://localhost:8000".
        tokenizer: its model's, for prompts that are strings.
        vocab: ids are below it; by default nothing is checked here.
        weights_dir: a folder that the server loads its model from: ``sync_weights`` writes there.
        connections: calls at once.
        timeout: seconds until a call has failed.
    """

    bitwise = False
    logp_means = "processed"

    def __init__(
        self, url: str, tokenizer=None, *, vocab: int = 1 << 31, weights_dir=None, connections: int = 64,
        timeout: float = 600.0,
    ):  # fmt: skip
        import httpx

        self.http = httpx.Client(base_url=url.rstrip("/"), timeout=timeout)
        self.tokenizer, self.vocab = tokenizer, vocab
        self.weights_dir = None if weights_dir is None else Path(weights_dir)
        self.pool = concurrent.futures.ThreadPoolExecutor(connections)
        self.waiting: dict[concurrent.futures.Future, tuple[int, Request]] = {}
        self.later: list[Rollout] = []
        self.left: dict[int, int] = {}
        self.requests = self.version = 0
        self.paused = False

    # What a server is asked, and how it answers: of each subclass

    def _ask(self, request: Request) -> tuple[str, dict]:
        """(path, JSON body)."""
        raise NotImplementedError

    def _answers(self, found) -> list[tuple[list[int], list[float], str]]:
        """(tokens, log-probs, finish reason) of each sample."""
        raise NotImplementedError

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Their numbers; none is sent if one of them is wrong."""
        checked = [Request(checked_prompt(r.prompt, self.tokenizer, self.vocab), r.params) for r in requests]
        for request in checked:
            if callable(request.params.allowed_token_ids):
                validate.fail("allowed_token_ids", "ids: a server cannot call a function", "a function")
        numbers = list(range(self.requests, self.requests + len(checked)))
        self.requests += len(checked)
        for number, request in zip(numbers, checked, strict=True):
            self.waiting[self.pool.submit(self._post, *self._ask(request))] = number, request
        return numbers

    def step(self, timeout: float | None = None) -> list[Rollout]:
        """Rollouts of the calls that have ended; waits for one at least, ``timeout`` seconds at most.

        Raises:
            ServerError: a call has failed; it is forgotten, and the others go on.
        """
        done, _ = concurrent.futures.wait(self.waiting, timeout, concurrent.futures.FIRST_COMPLETED)
        found = []
        for future in done:
            number, request = self.waiting.pop(future)
            try:
                found += self._rollouts(number, request, future.result())
            except ServerError:
                self.later += found
                self.left.pop(number, None)
                raise
        return found

    def _rollouts(self, number: int, request: Request, found) -> list[Rollout]:
        try:
            answers = self._answers(found)
            if len(answers) != request.params.n or any(len(t) != len(p) for t, p, _ in answers):
                raise ValueError(f"{len(answers)} samples for n = {request.params.n}, or log-probs of other tokens")
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ServerError(f"request {number}: {self.http.base_url} gave no rollouts: {error!r}") from error
        rollouts = []
        for index, (tokens, logps, reason) in enumerate(answers):
            none = torch.full((len(tokens),), torch.nan)
            text = "" if self.tokenizer is None else self.tokenizer.decode(tokens, skip_special_tokens=True)
            versions = torch.full((len(tokens),), self.version)
            rollouts.append(
                Rollout(
                    number, index, list(request.prompt), list(tokens), text, none, torch.tensor(logps), none, none,
                    versions, REASONS.get(reason, "stop"),
                )
            )  # fmt: skip
        return rollouts

    def _post(self, path: str, body: dict | None = None):
        """The JSON of an answer."""
        import httpx

        try:
            answer = self.http.post(path, json=body or {})
            answer.raise_for_status()
            return answer.json() if answer.content else None
        except httpx.HTTPStatusError as error:
            said = error.response.text[:200]
            raise ServerError(f"{self.http.base_url}{path}: {error.response.status_code}: {said}") from error
        except (httpx.HTTPError, ValueError) as error:
            raise ServerError(f"{self.http.base_url}{path}: {error!r}") from error

    def cancel(self, number: int) -> None:
        """Forget a request that has not been sent yet; one that has goes on, and its answer is dropped."""
        for future, (other, _) in list(self.waiting.items()):
            if other == number:
                future.cancel()
                del self.waiting[future]
                self.left.pop(number, None)
                return
        validate.fail("number", "a request under way", repr(number))

    def close(self) -> None:
        """End the threads and the connections."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.http.close()

    def _save(self, named_params) -> None:
        """The parameters into the folder that the server loads from."""
        if self.weights_dir is None:
            raise RuntimeError("sync_weights: the server needs weights_dir, a folder that it loads its model from")
        from safetensors.torch import save_file

        self.weights_dir.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().contiguous().cpu().clone() for name, p in named_params}
        save_file(tensors, self.weights_dir / "model.safetensors", metadata={"format": "pt"})


class VLLMServer(Server):
    """``vllm serve`` with its completions API. Start it with ``--logprobs-mode processed_logprobs``.

    pause and resume are its ``/pause`` and ``/resume``; ``sync_weights`` needs VLLM_SERVER_DEV_MODE=1, for it asks
    every worker to load the weights again.
    """

    def __init__(self, url: str, tokenizer=None, *, model: str | None = None, **options):
        super().__init__(url, tokenizer, **options)
        self.model = model

    def _ask(self, request: Request):
        p = request.params
        body = {
            "prompt": list(request.prompt), "n": p.n, "temperature": p.temperature, "top_p": p.top_p,
            "top_k": p.top_k or -1, "min_p": p.min_p, "max_tokens": p.max_tokens, "min_tokens": p.min_tokens,
            "seed": p.seed, "stop": list(p.stop), "stop_token_ids": list(p.stop_token_ids), "ignore_eos": p.ignore_eos,
            "repetition_penalty": p.repetition_penalty, "presence_penalty": p.presence_penalty,
            "frequency_penalty": p.frequency_penalty, "logprobs": 0, "return_token_ids": True,
            "skip_special_tokens": False,
        }  # fmt: skip
        if p.priority:
            body["priority"] = -p.priority  # the least comes first there
        if p.logit_bias:
            body["logit_bias"] = {str(k): v for k, v in p.logit_bias.items()}
        if p.allowed_token_ids is not None:
            body["allowed_token_ids"] = list(p.allowed_token_ids)
        return "/v1/completions", body | ({} if self.model is None else {"model": self.model})

    def _answers(self, found):
        choices = sorted(found["choices"], key=lambda c: c["index"])
        return [(c["token_ids"], c["logprobs"]["token_logprobs"], c["finish_reason"]) for c in choices]

    def pause(self, mode: str = "keep") -> None:
        """No new tokens until ``resume``; vLLM keeps what it has computed, or ends what is under way."""
        validate.one_of("mode", mode, MODES)
        self._post(f"/pause?mode={'abort' if mode == 'abort' else 'keep'}")
        if mode == "recompute":
            self._post("/reset_prefix_cache")
        self.paused = True

    def resume(self) -> None:
        """Go on."""
        self._post("/resume")
        self.paused = False

    def sync_weights(self, named_params, version: int) -> None:
        """Write the weights where the server loads its model from, and have it load them."""
        self._save(named_params)
        self._post("/collective_rpc", {"method": "reload_weights"})
        self._post("/reset_prefix_cache")
        self.version = version


class SGLangServer(Server):
    """``python -m sglang.launch_server``. Its log-probs are of the tempered distribution, before truncation."""

    logp_means = "tempered"

    def _ask(self, request: Request):
        p = request.params
        if p.allowed_token_ids is not None:
            validate.fail("allowed_token_ids", "None: SGLang has none", "ids")
        sampling = {
            "n": p.n, "temperature": p.temperature, "top_p": p.top_p, "top_k": p.top_k or -1, "min_p": p.min_p,
            "max_new_tokens": p.max_tokens, "min_new_tokens": p.min_tokens, "sampling_seed": p.seed,
            "stop": list(p.stop), "stop_token_ids": list(p.stop_token_ids), "ignore_eos": p.ignore_eos,
            "repetition_penalty": p.repetition_penalty, "presence_penalty": p.presence_penalty,
            "frequency_penalty": p.frequency_penalty, "skip_special_tokens": False,
        }  # fmt: skip
        if p.logit_bias:
            sampling["logit_bias"] = {str(k): v for k, v in p.logit_bias.items()}
        return "/generate", {"input_ids": list(request.prompt), "sampling_params": sampling, "return_logprob": True}

    def _answers(self, found):
        answers = []
        for one in found if isinstance(found, list) else [found]:
            pairs = one["meta_info"]["output_token_logprobs"]
            tokens, logps = [int(pair[1]) for pair in pairs], [float(pair[0]) for pair in pairs]
            answers.append((tokens, logps, one["meta_info"]["finish_reason"]["type"]))
        return answers

    def pause(self, mode: str = "keep") -> None:
        """No new tokens until ``resume``."""
        names = {"keep": "in_place", "recompute": "retract", "abort": "abort"}
        self._post("/pause_generation", {"mode": names[validate.one_of("mode", mode, MODES)]})
        self.paused = True

    def resume(self) -> None:
        """Go on."""
        self._post("/continue_generation")
        self.paused = False

    def sync_weights(self, named_params, version: int) -> None:
        """Write the weights where the server loads its model from, and have it load them."""
        self._save(named_params)
        found = self._post("/update_weights_from_disk", {"model_path": str(self.weights_dir)})
        if not (found or {}).get("success", True):
            raise ServerError(f"{self.http.base_url}: the weights were not loaded: {found.get('message')}")
        self.version = version


class RayPool(Calls):
    """Engines in Ray workers: requests go to the one with the fewest under way.

    Args:
        make: a function without arguments that makes an ``Engine``; it runs in the worker.
        workers: how many.
        options: of ``ray.remote``, such as ``num_gpus=1``.
    """

    logp_means = "processed"

    def __init__(self, make, workers: int = 1, **options):
        import ray

        self.ray, self.paused = ray, False
        worker = ray.remote(**options)(_Worker) if options else ray.remote(_Worker)
        self.workers = [worker.remote(make) for _ in range(workers)]
        self.load = [0] * workers
        self.waiting: dict = {}
        self.later: list[Rollout] = []
        self.left: dict[int, int] = {}
        self.requests = 0

    @property
    def bitwise(self) -> bool:
        """Whether all of the workers' engines are."""
        return all(self.ray.get([worker.bitwise.remote() for worker in self.workers]))

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Their numbers; a wrong one raises here, from the worker that looked at it."""
        for request in requests:
            if not isinstance(request.params, SamplingParams):
                validate.fail("params", "SamplingParams", repr(request.params), TypeError)
        numbers = list(range(self.requests, self.requests + len(requests)))
        self.requests += len(requests)
        for number, request in zip(numbers, requests, strict=True):
            place = self.load.index(min(self.load))
            self.load[place] += request.params.n
            self.waiting[self.workers[place].generate.remote(number, request)] = place, request.params.n
        return numbers

    def step(self, timeout: float | None = None) -> list[Rollout]:
        """Rollouts of the requests that have ended; waits for one at least, ``timeout`` seconds at most."""
        if not self.waiting:
            return []
        done, _ = self.ray.wait(list(self.waiting), timeout=timeout)
        found = []
        for reference in done:
            place, n = self.waiting.pop(reference)
            self.load[place] -= n
            found += self.ray.get(reference)
        return found

    def pause(self, mode: str = "keep") -> None:
        """No new request is begun until ``resume``; those under way end."""
        validate.one_of("mode", mode, MODES)
        self.paused = True

    def resume(self) -> None:
        """Go on."""
        self.paused = False

    def sync_weights(self, named_params, version: int) -> None:
        """The parameters into every worker's model."""
        weights = self.ray.put({name: p.detach().cpu() for name, p in named_params})
        self.ray.get([worker.load.remote(weights, version) for worker in self.workers])

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers:
            self.ray.kill(worker)


class _Worker:
    """An engine in a process of Ray's."""

    def __init__(self, make):
        self.engine = make()

    def generate(self, number: int, request: Request) -> list[Rollout]:
        return [r._replace(request=number) for r in self.engine.generate([request.prompt], request.params)]

    def bitwise(self) -> bool:
        return self.engine.bitwise

    def load(self, weights: dict, version: int) -> None:
        with torch.no_grad():
            for name, p in self.engine.decoder.model.named_parameters():
                p.copy_(weights[name])
        self.engine.sync_weights(None, version)
