"""Rollouts from vLLM and SGLang servers over HTTP, behind ``RolloutBackend``.

A server has its own kernels, so its log-probs are not those of the trainer (``bitwise`` is false): the loss wants a
correction for the difference (``rlfast.loss(..., correction=...)``). ``logp_means`` says which distribution a server's
log-prob is of; what it does not report (raw log-probs, kept mass, entropy) is NaN.
"""

from __future__ import annotations

import concurrent.futures
import json
import math
from pathlib import Path

from rlfast import validate
from rlfast.rollout import responses
from rlfast.rollout.api import MODES, Request, Rollout, checked_request, checked_sizes, checked_version, named_weights
from rlfast.rollout.calls import Calls, RequestError, alone
from rlfast.rollout.scheduler import Sample

REASONS = {"stop": "stop", "length": "length", "abort": "abort"}
BIAS = 100.0  # of a logit, as OpenAI's API has it
ROUNDED = 1e-2  # a log-prob that a server rounded may be so much above 0


class ServerError(RequestError):
    """A server is down, or says something that is no answer."""


def asked_for(params) -> int:
    """Samples that a server draws: greedy ones are alike, and vLLM refuses to draw several."""
    return params.n if params.temperature > 0 else 1


class Remote(Calls):
    """Requests that are generated elsewhere, a call each. ``_start`` puts its handle into ``waiting``,
    ``_done(handles, timeout)`` says which have ended, ``_rollouts(number, request, handle)`` what one gave.
    """

    def __init__(self):
        super().__init__()
        self.waiting: dict[int, tuple] = {}  # number → (handle, request)

    @property
    def under_way(self):
        """The numbers of the requests that have not ended."""
        return self.waiting

    def _work(self, timeout: float | None = None) -> None:
        """Take what calls that have ended gave; wait for one at least, ``timeout`` seconds at most."""
        done = set(self._done([handle for handle, _ in list(self.waiting.values())], timeout))
        with self.lock:
            for number, (handle, request) in list(self.waiting.items()):
                if handle in done:
                    try:
                        self._hand_over(self._rollouts(number, request, handle))
                    except ServerError as error:
                        self.failed[number] = error
                    finally:
                        del self.waiting[number]

    @alone
    def cancel(self, number: int) -> None:
        """Forget a request; the next ``step`` returns its samples empty, with "abort". A server may go on with it."""
        if number not in self.waiting:
            validate.fail("number", "a request under way", repr(number))
        handle, request = self.waiting[number]
        samples = (Sample(number, i, request.prompt, request.params, finish="abort") for i in range(request.params.n))
        self._hand_over([responses.rollout_of(sample, None) for sample in samples])
        self._forget(handle, request)
        del self.waiting[number]


class Server(Remote):
    """What both servers share: a request is an HTTP call in a thread of its own. ``_ask(request)`` is its (path, body),
    ``_answers(found)`` makes (tokens, log-probs, finish reason) of each sample of the answer.

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

        if not isinstance(url, str):
            validate.fail("url", "a server's, such as 'http://localhost:8000'", repr(url)[:60], TypeError)
        checked_sizes(vocab=vocab, connections=connections)
        timeout = validate.positive("timeout", timeout)
        super().__init__()
        self.http = httpx.Client(base_url=url.rstrip("/"), timeout=timeout)
        self.tokenizer, self.vocab = tokenizer, vocab
        self.weights_dir = None if weights_dir is None else Path(weights_dir)
        self.pool = concurrent.futures.ThreadPoolExecutor(connections)

    def _checked(self, request: Request) -> Request:
        request = checked_request(request, self.tokenizer, self.vocab, here=False)
        if callable(request.params.allowed_token_ids):
            validate.fail("allowed_token_ids", "ids: a server cannot call a function", "a function")
        return request

    def _start(self, number: int, request: Request) -> None:
        self.waiting[number] = self.pool.submit(self._sent_now, *self._ask(request)), request

    def _sent_now(self, path: str, body: dict) -> tuple:
        """(the policy version when a call is sent, its answer): newer tokens may be in it, older ones are not."""
        return self.version, self._post(path, body)

    def _done(self, handles: list, timeout: float | None):
        return concurrent.futures.wait(handles, timeout, concurrent.futures.FIRST_COMPLETED).done

    def _forget(self, handle, request: Request) -> None:
        handle.cancel()

    def _rollouts(self, number: int, request: Request, handle) -> list[Rollout]:
        (version, found), samples, n = handle.result(), [], request.params.n
        try:
            answers = self._answers(found)
            if len(answers) != asked_for(request.params):
                raise ValueError(f"{len(answers)} samples for n = {asked_for(request.params)}")
            for index, (tokens, logps, reason) in enumerate(answers * (n // len(answers))):
                tokens, logps = self._checked_answer(tokens, logps, reason)
                records = [(math.nan, x, math.nan, math.nan, version) for x in logps]
                finish = REASONS[reason]
                samples.append(Sample(number, index, request.prompt, request.params, tokens, records, finish=finish))
        except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
            said = f"{error!r} in {str(found)[:200]}"
            raise ServerError(f"request {number}: {self.http.base_url} gave no rollouts: {said}") from error
        return [responses.rollout_of(sample, self.tokenizer) for sample in samples]

    def _checked_answer(self, tokens, logps, reason) -> tuple[list[int], list[float]]:
        """Ids and log-probs that can be some, or a ValueError."""
        tokens, logps = list(tokens), [float(x) for x in logps]
        if len(logps) != len(tokens):
            raise ValueError(f"{len(logps)} log-probs of {len(tokens)} tokens")
        for token, logp in zip(tokens, logps, strict=True):
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.vocab:
                raise ValueError(f"a token id {token!r}, expected one in [0, {self.vocab})")
            if not -math.inf < logp <= ROUNDED:
                raise ValueError(f"a log-prob {logp}, expected one ≤ 0")
        if reason not in REASONS:
            raise ValueError(f"a finish reason {reason!r}, expected one of {tuple(REASONS)}")
        return tokens, logps

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
        except (httpx.HTTPError, ValueError, TypeError, RuntimeError) as error:
            raise ServerError(f"{self.http.base_url}{path}: {error!r}") from error

    def close(self) -> None:
        """End the threads and the connections."""
        self.closed = True
        self.waiting.clear()
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.http.close()

    def _save(self, named_params) -> None:
        """The parameters into the folder that the server loads from."""
        if self.weights_dir is None:
            raise RuntimeError("sync_weights: the server needs weights_dir, a folder that it loads its model from")
        from safetensors.torch import save_file

        tensors = {name: p.detach().contiguous().cpu().clone() for name, p in named_weights(named_params)}
        self.weights_dir.mkdir(parents=True, exist_ok=True)
        save_file(tensors, self.weights_dir / "model.safetensors", metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
        # of a checkpoint in several files a server reads those of its index, and no other
        (self.weights_dir / "model.safetensors.index.json").write_text(json.dumps(index))


class VLLMServer(Server):
    """``vllm serve`` with its completions API. Start it with ``--logprobs-mode processed_logprobs``: by default its
    log-probs are those of the model's own distribution.

    Pausing and new weights need VLLM_SERVER_DEV_MODE=1: they are its ``/pause``, ``/resume`` and ``/collective_rpc``,
    by which every worker loads the weights again. What is under way then is computed again, be it paused by "keep".
    """

    def __init__(self, url: str, tokenizer=None, *, model: str | None = None, **options):
        super().__init__(url, tokenizer, **options)
        self.model = model

    def _checked(self, request: Request) -> Request:
        request = super()._checked(request)
        far = next((x for x in request.params.logit_bias.values() if abs(x) > BIAS), None)
        if far is not None:
            validate.fail("logit_bias", f"numbers in [−{BIAS:g}, {BIAS:g}]: vLLM brings others there", repr(far))
        return request

    def _ask(self, request: Request):
        p = request.params
        body = {
            "prompt": list(request.prompt), "n": asked_for(p), "temperature": p.temperature, "top_p": p.top_p,
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

    @alone
    def pause(self, mode: str = "keep") -> None:
        """No new tokens until ``resume``; vLLM keeps what it has computed, or ends what is under way."""
        validate.one_of("mode", mode, MODES)
        self._post(f"/pause?mode={'abort' if mode == 'abort' else 'keep'}")
        if mode == "recompute":
            self._forget_keys()
        self.paused = True

    def _forget_keys(self) -> None:
        """No key and value is used again; those of what is under way keep their pages, and its cache, unless asked."""
        found = self._post("/reset_prefix_cache?reset_running_requests=true")
        if not (found or {}).get("success", True):
            raise ServerError(f"{self.http.base_url}: the prefix cache was not reset: {found}")

    @alone
    def resume(self) -> None:
        """Go on."""
        self._post("/resume")
        self.paused = False

    @alone
    def sync_weights(self, named_params, version: int) -> None:
        """Write the weights where the server loads its model from, and have it load them."""
        checked_version(version)
        self._save(named_params)
        self._post("/collective_rpc", {"method": "reload_weights"})
        self._forget_keys()
        self.version = version


class SGLangServer(Server):
    """``python -m sglang.launch_server``. Its log-probs are of the tempered distribution, before truncation.

    Seeds have a meaning with ``--enable-deterministic-inference`` alone.
    """

    logp_means = "tempered"
    keeps = False  # what is under way, its keys and values

    def _checked(self, request: Request) -> Request:
        request = super()._checked(request)
        if request.params.allowed_token_ids is not None:
            validate.fail("allowed_token_ids", "None: SGLang has none", "ids")
        return request

    def _ask(self, request: Request):
        p, n = request.params, asked_for(request.params)
        sampling = {
            "temperature": p.temperature, "top_p": p.top_p, "top_k": p.top_k or -1, "min_p": p.min_p,
            "max_new_tokens": p.max_tokens, "min_new_tokens": p.min_tokens,
            "stop": list(p.stop), "stop_token_ids": list(p.stop_token_ids), "ignore_eos": p.ignore_eos,
            "repetition_penalty": p.repetition_penalty, "presence_penalty": p.presence_penalty,
            "frequency_penalty": p.frequency_penalty, "skip_special_tokens": False,
        }  # fmt: skip
        if p.logit_bias:
            sampling["logit_bias"] = {str(k): v for k, v in p.logit_bias.items()}
        # each with a seed of its own: of one request with n samples all would have the same, and be alike
        each = [sampling | {"sampling_seed": p.of_sample(i).seed} for i in range(n)]
        body = {"input_ids": [list(request.prompt)] * n, "sampling_params": each, "return_logprob": True}
        return "/generate", body | ({"priority": p.priority} if p.priority else {})

    def _answers(self, found):
        answers = []
        for one in found:
            pairs = one["meta_info"]["output_token_logprobs"]
            tokens, logps = [int(pair[1]) for pair in pairs], [float(pair[0]) for pair in pairs]
            answers.append((tokens, logps, one["meta_info"]["finish_reason"]["type"]))
        return answers

    @alone
    def pause(self, mode: str = "keep") -> None:
        """No new tokens until ``resume``."""
        names = {"keep": "in_place", "recompute": "retract", "abort": "abort"}
        self._post("/pause_generation", {"mode": names[validate.one_of("mode", mode, MODES)]})
        self.paused, self.keeps = True, mode == "keep"

    @alone
    def resume(self) -> None:
        """Go on."""
        self._post("/continue_generation")
        self.paused = self.keeps = False

    @alone
    def sync_weights(self, named_params, version: int) -> None:
        """Write the weights where the server loads its model from, and have it load them."""
        checked_version(version)
        kept = sum(not handle.done() for handle, _ in self.waiting.values()) if self.keeps else 0
        if kept:
            raise RuntimeError(
                f"sync_weights: {kept} requests keep their keys and values, with which SGLang loads no "
                'weights: pause("recompute") or pause("abort") first'
            )
        self._save(named_params)
        found = self._post("/update_weights_from_disk", {"model_path": str(self.weights_dir)})
        if not (found or {}).get("success", True):
            raise ServerError(f"{self.http.base_url}: the weights were not loaded: {found.get('message')}")
        self.version = version
