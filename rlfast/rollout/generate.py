"""The engine of a model that rlfast's attention does not reach: transformers' own ``generate``, sample by sample."""

from __future__ import annotations

import contextlib

import torch
import transformers

from rlfast import validate
from rlfast.logps import token_logps
from rlfast.rollout import responses
from rlfast.rollout.api import (
    MODES,
    Request,
    Rollout,
    SamplingParams,
    Score,
    checked_prompt,
    checked_request,
    checked_sequences,
    checked_sizes,
    checked_version,
    choices,
    ends_of,
)  # fmt: skip
from rlfast.rollout.calls import Calls, alone
from rlfast.rollout.hf import evaluating
from rlfast.rollout.scheduler import Sample
from rlfast.rollout.weights import Weights

UNSUPPORTED = ("presence_penalty", "frequency_penalty", "logit_bias", "allowed_token_ids")


class GenerateEngine(Calls):
    """``Engine`` for such a model. Slow: one response at a time, whose tokens then depend on nothing but its seed.

    Args:
        model, tokenizer, eos_token_ids: as in ``Engine``; its other arguments have no meaning here.
        reason: why it is needed.
    """

    logp_means, bitwise = "processed", False

    def __init__(
        self, model, tokenizer=None, *, reason: str = "", eos_token_ids=None, page_size=None, kv_budget=None,
        token_budget=None, max_batch=None, graphs=None, use_attention=None,
    ):  # fmt: skip
        super().__init__()
        checked_sizes(page_size=page_size, token_budget=token_budget, max_batch=max_batch)
        self.model, self.tokenizer, self.reason = model, tokenizer, reason
        self.vocab = model.get_output_embeddings().weight.shape[0]
        self.context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 1 << 30
        self.eos = ends_of(model, eos_token_ids, self.vocab)
        self.queue: list[Sample] = []
        self.watched = Weights(model)
        self.weights = self.watched.now()

    @property
    def under_way(self):
        """The numbers of the requests that have not ended."""
        return {sample.request for sample in list(self.queue)}

    def _checked(self, request: Request) -> Request:
        request = checked_request(request, self.tokenizer, self.vocab, self.context)
        for name in UNSUPPORTED:
            value = getattr(request.params, name)
            if value != getattr(SamplingParams, name, {}):
                validate.fail(name, f"its default: {self.reason}", repr(value))
        return request

    def _start(self, number: int, request: Request) -> None:
        params = request.params
        self.queue += [Sample(number, i, request.prompt, params.of_sample(i)) for i in range(params.n)]

    @alone
    def _work(self, timeout: float | None = None) -> None:
        """One response."""
        if not self.paused and self.queue:
            self._watch_weights()
            sample = self.queue[0]
            try:
                self._respond(sample)
                self._hand_over([responses.rollout_of(sample, self.tokenizer)])
            finally:
                self.queue.remove(sample)

    @torch.no_grad()
    def _respond(self, sample: Sample) -> None:
        """The tokens of a sample, all at once."""
        params, before, device = sample.params, len(sample.prompt), next(self.model.parameters()).device
        ids = torch.tensor([sample.prompt], device=device)
        most = min(params.max_tokens, self.context - before)
        stops = [*params.stop_token_ids, *(() if params.ignore_eos else self.eos)]
        options = {"do_sample": False} if params.temperature == 0 else {
            "do_sample": True, "temperature": params.temperature, "top_k": params.top_k or None,
            "top_p": params.top_p, "min_p": params.min_p or None,
        }  # fmt: skip

        def stopped(whole, *_, **__):  # transformers' own criterion knows no min_tokens
            return torch.tensor([responses.stopped(whole[0, before:].tolist(), params, self.tokenizer)], device=device)

        with (
            self._evaluating(),
            self._own_options(),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            torch.manual_seed(sample.key)  # of its prompt too: two prompts with one seed are not drawn alike
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, eos_token_id=stops or None,
                min_new_tokens=min(params.min_tokens, most) or None, repetition_penalty=params.repetition_penalty,
                stopping_criteria=transformers.StoppingCriteriaList([stopped] if params.stop else []),
                return_dict_in_generate=True, output_logits=True, output_scores=True, **options,
            )  # fmt: skip
        tokens = out.sequences[0, before:]
        numbers = (x.tolist() for x in _numbers(out, ids[0], tokens, params, stops))
        sample.tokens = tokens.tolist()
        sample.records = list(zip(*numbers, [self.version] * len(sample.tokens), strict=True))
        sample.finish = responses.ending(sample, sample.tokens[-1], self.eos, self.tokenizer, self.context) or "length"

    def _evaluating(self):
        """Within it, no module is in training mode: no dropout."""
        return evaluating(tuple(self.model.modules()))

    @contextlib.contextmanager
    def _own_options(self):
        """Within it, nothing that the checkpoint's generation config says beside what ``SamplingParams`` say: beams,
        tokens that must not come, … A model within PEFT's has it."""
        theirs = [(m, vars(m)["generation_config"]) for m in self.model.modules() if "generation_config" in vars(m)]
        try:
            for module, config in theirs:
                module.generation_config = transformers.GenerationConfig(pad_token_id=config.pad_token_id)
            yield
        finally:
            for module, config in theirs:
                module.generation_config = config

    @alone
    def cancel(self, number: int) -> None:
        """Forget what has not been generated of a request; the next ``step`` returns it empty, with "abort"."""
        if number not in self.under_way:
            validate.fail("number", "a request under way", repr(number))
        self._abort([sample for sample in self.queue if sample.request == number])

    def _abort(self, samples: list[Sample]) -> None:
        for sample in samples:
            sample.finish = "abort"
            self._hand_over([responses.rollout_of(sample, self.tokenizer)])
            self.queue.remove(sample)

    @alone
    def pause(self, mode: str = "keep") -> None:
        """``step`` does nothing until ``resume``; "abort" forgets what waits."""
        validate.one_of("mode", mode, MODES)
        self.paused = True
        if mode == "abort":
            self._abort(list(self.queue))

    @alone
    def resume(self) -> None:
        """Go on."""
        self.paused = False

    @alone
    def partial(self) -> list[Rollout]:
        """What waits, with "paused": no token is there before all are."""
        return [responses.rollout_of(sample, self.tokenizer) for sample in self.queue]

    def _watch_weights(self) -> None:
        weights = self.watched.now()
        if weights != self.weights:
            self.weights = weights
            self.bump()

    def bump(self) -> None:
        """The policy has changed."""
        self.version += 1

    def sync_weights(self, named_params, version: int) -> None:
        """Nothing to copy; ``version`` is that of the tokens to come."""
        self.weights, self.version = self.watched.now(), checked_version(version)

    @alone
    @torch.no_grad()
    def score(self, sequences) -> list[Score]:
        """Log-probs and entropies of given sequences, by the model's own logits."""
        found, device = [], next(self.model.parameters()).device
        for sequence in checked_sequences(sequences, self.vocab, self.context):
            ids = torch.tensor([sequence], device=device)
            with self._evaluating():
                logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            out = token_logps(logits, ids[0, 1:], outputs=("logp", "entropy"))
            found.append(Score(out.logp.cpu(), out.entropy.cpu()))
        return found

    def choose(self, prompts, candidates) -> list[torch.Tensor]:
        """As ``Engine.choose``, but each candidate's prompt is computed again."""
        plain = None if self.tokenizer is None else lambda text: self.tokenizer(text, add_special_tokens=False)
        found = []
        for prompt, some in choices(prompts, candidates):
            prompt = checked_prompt(prompt, self.tokenizer, self.vocab, self.context)
            answers = [checked_prompt(c, plain, self.vocab, self.context - len(prompt), "candidates") for c in some]
            scores = self.score([(*prompt, *answer) for answer in answers])
            sums = [s.logp_raw[len(prompt) - 1 :].double().sum().float() for s in scores]
            found.append(torch.stack(sums))
        return found

    def training_mode(self, model=None):
        """There is none: the training forward of such a model has not the bits of its ``generate``."""
        raise NotImplementedError(f"training_mode: rlfast's attention does not reach this model: {self.reason}")

    def close(self) -> None:
        """No call after this one."""
        self.closed = True


def _numbers(out, prompt, tokens, params: SamplingParams, stops: list[int]) -> tuple:
    """(logp_raw, logp, kept, entropy) from the raw logits and the processed scores of each step; ``stops`` are not
    drawn before ``min_tokens``."""
    raw, processed = (torch.stack([x[0].float() for x in steps]) for steps in (out.logits, out.scores))
    own, edited = token_logps(raw, tokens, outputs=("logp", "entropy")), raw
    if params.repetition_penalty != 1.0:
        penalise = transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
        whole = torch.cat((prompt, tokens)).unsqueeze(0)
        rows = [penalise(whole[:, : len(prompt) + i], raw[i : i + 1].clone()) for i in range(len(tokens))]
        edited = torch.cat(rows)
    if params.min_tokens and stops:
        edited = edited.clone()
        edited[: params.min_tokens, stops] = -torch.inf
    if params.temperature == 0:
        logp, kept = torch.zeros_like(own.logp), token_logps(edited, tokens).logp.exp()
    else:
        logp = token_logps(processed, tokens).logp
        # the scores of kept tokens are tempered logits, so the kept mass is the ratio of the token's two probabilities
        kept = (token_logps(edited, tokens, temperature=params.temperature).logp - logp).exp().clamp(max=1.0)
    return tuple(x.cpu() for x in (own.logp, logp, kept, own.entropy))
