"""The engine of a model that rlfast's attention does not reach: transformers' own ``generate``, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers

from rlfast import validate
from rlfast.logps import token_logps
from rlfast.rollout.api import MODES, Request, Rollout, SamplingParams, Score, checked_prompt
from rlfast.rollout.calls import Calls

UNSUPPORTED = ("presence_penalty", "frequency_penalty", "logit_bias", "allowed_token_ids")


class GenerateEngine(Calls):
    """``Engine`` for such a model. Slow: one response at a time, whose tokens then depend on nothing but its seed.

    Args:
        model, tokenizer, eos_token_ids: as in ``Engine``; its other arguments have no meaning here.
        reason: why it is needed.
    """

    logp_means, bitwise = "processed", False

    def __init__(self, model, tokenizer=None, *, reason: str = "", eos_token_ids=None, **_):
        self.model, self.tokenizer, self.reason, self.eos = model, tokenizer, reason, eos_token_ids
        self.vocab = model.get_output_embeddings().weight.shape[0]
        self.queue: list[tuple[int, int, Request]] = []
        self.done: list[Rollout] = []
        self.later: list[Rollout] = []
        self.left: dict[int, int] = {}
        self.requests = self.version = 0
        self.paused = self.closed = False

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Their numbers; none is taken if one of them is wrong."""
        self._open()
        checked = [Request(checked_prompt(r.prompt, self.tokenizer, self.vocab), r.params) for r in requests]
        for request in checked:
            for name in UNSUPPORTED:
                value = getattr(request.params, name)
                if value:
                    validate.fail(name, f"its default: {self.reason}", repr(value))
        numbers = list(range(self.requests, self.requests + len(checked)))
        self.requests += len(checked)
        self.queue += [(i, k, r) for i, r in zip(numbers, checked, strict=True) for k in range(r.params.n)]
        return numbers

    def step(self, timeout: float | None = None) -> list[Rollout]:
        """One response."""
        self._open()
        ended, self.done = self.done, []
        if self.queue and not self.paused:
            ended.append(self._respond(*self.queue.pop(0)))
        return ended

    @torch.no_grad()
    def _respond(self, number: int, index: int, request: Request) -> Rollout:
        params, device = request.params, next(self.model.parameters()).device
        ids = torch.tensor([request.prompt], device=device)
        stops = [*params.stop_token_ids, *([] if params.ignore_eos else self._eos())]
        options = {"do_sample": False} if params.temperature == 0 else {
            "do_sample": True, "temperature": params.temperature, "top_k": params.top_k or None,
            "top_p": params.top_p, "min_p": params.min_p or None,
        }  # fmt: skip
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(params.seed + index)
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=params.max_tokens,
                min_new_tokens=params.min_tokens or None, eos_token_id=stops or None,
                repetition_penalty=params.repetition_penalty, stop_strings=list(params.stop) or None,
                tokenizer=self.tokenizer, return_dict_in_generate=True, output_logits=True, output_scores=True,
                **options,
            )  # fmt: skip
        tokens = out.sequences[0, ids.shape[1] :]
        text = "" if self.tokenizer is None else self.tokenizer.decode(tokens, skip_special_tokens=True)
        cuts = [at for at in (text.find(stop) for stop in params.stop) if at >= 0]
        text = text[: min(cuts)] if cuts else text
        finish = "stop" if cuts or (stops and tokens[-1].item() in stops) else "length"
        return Rollout(
            number, index, list(request.prompt), tokens.tolist(), text, *_numbers(out, ids[0], tokens, params),
            torch.full(tokens.shape, self.version), finish,
        )  # fmt: skip

    def _eos(self) -> list[int]:
        found = self.model.generation_config.eos_token_id if self.eos is None else self.eos
        return [] if found is None else [found] if isinstance(found, int) else list(found)

    def cancel(self, number: int) -> None:
        """Forget what has not been generated of a request; the next ``step`` returns it empty, with "abort"."""
        self._open()
        dropped = [entry for entry in self.queue if entry[0] == number]
        if not dropped:
            validate.fail("number", "a request under way", repr(number))
        self._drop(dropped)

    def _drop(self, entries) -> None:
        none = torch.empty(0)
        for number, index, request in entries:
            self.queue.remove((number, index, request))
            self.done.append(
                Rollout(number, index, list(request.prompt), [], "", none, none, none, none, none.long(), "abort")
            )

    def pause(self, mode: str = "keep") -> None:
        """``step`` does nothing until ``resume``; "abort" forgets what waits."""
        validate.one_of("mode", mode, MODES)
        self.paused = True
        if mode == "abort":
            self._drop(list(self.queue))

    def resume(self) -> None:
        """Go on."""
        self.paused = False

    def bump(self) -> None:
        """The policy has changed."""
        self.version += 1

    def sync_weights(self, named_params, version: int) -> None:
        """Nothing to copy; ``version`` is that of the tokens to come."""
        self.version = version

    @torch.no_grad()
    def score(self, sequences) -> list[Score]:
        """Log-probs and entropies of given sequences, by the model's own logits."""
        self._open()
        found, device = [], next(self.model.parameters()).device
        for sequence in sequences:
            ids = torch.tensor([checked_prompt(sequence, None, self.vocab)], device=device)
            logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            out = token_logps(logits, ids[0, 1:], outputs=("logp", "entropy"))
            found.append(Score(out.logp.cpu(), out.entropy.cpu()))
        return found

    def close(self) -> None:
        """No call after this one."""
        self.closed = True

    def _open(self) -> None:
        if self.closed:
            raise RuntimeError("the engine is closed")


def _numbers(out, prompt, tokens, params: SamplingParams) -> tuple:
    """(logp_raw, logp, kept, entropy) from the raw logits and the processed scores of each step."""
    raw, processed = (torch.stack([x[0].float() for x in steps]) for steps in (out.logits, out.scores))
    own, edited = token_logps(raw, tokens, outputs=("logp", "entropy")), raw
    if params.repetition_penalty != 1.0:
        penalise = transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
        whole = torch.cat((prompt, tokens)).unsqueeze(0)
        rows = [penalise(whole[:, : len(prompt) + i], raw[i : i + 1].clone()) for i in range(len(tokens))]
        edited = torch.cat(rows)
    if params.temperature == 0:
        logp, kept = torch.zeros_like(own.logp), token_logps(edited, tokens).logp.exp()
    else:
        logp = token_logps(processed, tokens).logp
        # the scores of kept tokens are tempered logits, so the kept mass is the ratio of the token's two probabilities
        kept = (token_logps(edited, tokens, temperature=params.temperature).logp - logp).exp().clamp(max=1.0)
    return tuple(x.cpu() for x in (own.logp, logp, kept, own.entropy))
