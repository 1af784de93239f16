"""The engine: generation in the trainer's process, on the trainer's weights. docs/rollout.md tells a request's life."""

from __future__ import annotations

import contextlib
import logging

import torch

from rlfast import validate
from rlfast.rollout import attention, flash, responses, sampling, scoring
from rlfast.rollout.api import (
    MODES,
    Request,
    Rollout,
    Score,
    checked_request,
    checked_sequences,
    checked_sizes,
    checked_version,
    choices,
    ends_of,
)
from rlfast.rollout.calls import Calls, alone
from rlfast.rollout.graphs import Graphs, Inputs
from rlfast.rollout.hf import probe
from rlfast.rollout.kv import Caches, PagePool
from rlfast.rollout.scheduler import Chunk, Sample, Scheduler

logger = logging.getLogger("rlfast.rollout")

PAGE = 16  # positions: short prompts share too
TOKEN_BUDGET = 2048  # of a forward: its activations and scores stay within a few tens of megabytes
MAX_BATCH = 256
KV_BUDGET = 1 << 30


class Engine(Calls):
    """Generates with a model that may be in training at the same time.

    Args:
        model: a causal language model of transformers, PEFT's included. It is not changed. Made under torch.autocast,
            as a trainer's forward may be, the engine generates and scores under it.
        tokenizer: its tokenizer; None where prompts are ids and no stop is a string.
        page_size: positions in a page of keys and values; by default 16, or as many as ``use_attention`` wants.
        kv_budget: bytes of keys and values. Samples that find no room wait, or are computed again.
        token_budget: tokens of a forward; longer prompts go in chunks.
        max_batch: sequences of a forward.
        eos_token_ids: ids that end a response; by default the model's.
        graphs: decode steps are CUDA graphs; by default where the model is on a GPU, but not with flashinfer.
        use_attention: "flash-attn", "flash-attn-4" or "flashinfer" in place of rlfast's kernels, with whose bits scores
            have nothing in common then.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: the attention that was asked for is not there.

    Example:
        >>> engine = rlfast.rollout.Engine(model, tokenizer)
        >>> rollouts = engine.generate(["2 + 2 ="], SamplingParams(n=4, max_tokens=8, seed=1))
    """

    logp_means = "processed"

    def __new__(cls, model=None, *args, **kwargs):
        """An engine of pages; one of ``generate`` for a model that rlfast's attention does not reach."""
        self = super().__new__(cls)
        if model is not None:
            if not isinstance(model, torch.nn.Module) or not hasattr(model, "get_output_embeddings"):
                validate.fail("model", "a causal language model of transformers", repr(model)[:60], TypeError)
            decoder, reason = probe(model)
            if decoder is None:
                from rlfast.rollout.generate import GenerateEngine

                logger.warning("rlfast.rollout: %s; it generates by its own generate()", reason)
                return GenerateEngine(model, *args, reason=reason, **kwargs)
            self.decoder = decoder
        return self

    def __init__(
        self, model, tokenizer=None, *, page_size: int | None = None, kv_budget: float = KV_BUDGET,
        token_budget: int = TOKEN_BUDGET, max_batch: int = MAX_BATCH, eos_token_ids=None,
        graphs: bool | None = None, use_attention: str | None = None,
    ):  # fmt: skip
        page_size = flash.PAGES.get(use_attention, PAGE) if page_size is None else page_size
        checked_sizes(page_size=page_size, token_budget=token_budget, max_batch=max_batch)
        super().__init__()
        self.tokenizer, self.page_size = tokenizer, page_size
        pages = int(validate.positive("kv_budget", kv_budget) // (self.decoder.bytes_of_token * page_size))
        if pages < 1:
            wanted = f"at least {self.decoder.bytes_of_token * page_size} bytes, one page of {page_size} positions"
            validate.fail("kv_budget", wanted, f"{kv_budget:g}")
        self.pool = PagePool(pages, page_size)
        self.caches = Caches(pages + 1, page_size)  # the last one is the padding's of graphs
        on_gpu = self.decoder.device.type == "cuda"
        if graphs is not None and not isinstance(graphs, bool):
            validate.fail("graphs", "True, False or None", repr(graphs), TypeError)
        if graphs and use_attention in flash.PLANNED:
            validate.fail("graphs", f"None or False with {use_attention}, which plans every step", "True")
        if graphs and not on_gpu:
            validate.fail("graphs", f"None or False: the model is on {self.decoder.device}", "True")
        layers = self.decoder.layers
        self.attention = None if use_attention is None else flash.attention(use_attention, layers, page_size)
        self.graphs = None
        if on_gpu and graphs is not False and use_attention not in flash.PLANNED:
            self.graphs = Graphs(self.decoder, self.caches, self.attention)
        self.scheduler = Scheduler(self.pool, token_budget, max_batch)
        self.eos = ends_of(model, eos_token_ids, self.decoder.vocab)
        self.live: dict[int, list[Sample]] = {}
        self.forwards, self.stale = 0, False
        self.weights = self.decoder.weights()

    @property
    def bitwise(self) -> bool:
        """Whether rollouts and scores have the same bits whatever they are batched with."""
        return self.decoder.bitwise and self.attention is None

    # Requests

    @property
    def under_way(self):
        """The numbers of the requests that have not ended."""
        return self.live

    def _checked(self, request: Request) -> Request:
        context = self.decoder.context
        request = checked_request(request, self.tokenizer, self.decoder.vocab, context)
        prompt, most = len(request.prompt), request.params.max_tokens
        if self.pool.pages_for(min(prompt + most, context)) > self.pool.pages:
            room = self.pool.pages * self.page_size
            wanted = f"at most {room} tokens with max_tokens: kv_budget has room for no more"
            validate.fail("prompts", wanted, f"{prompt} + {most}")
        return request

    def _start(self, number: int, request: Request) -> None:
        params = request.params
        self.live[number] = [Sample(number, i, request.prompt, params.of_sample(i)) for i in range(params.n)]
        self.scheduler.add(self.live[number])

    @alone
    def cancel(self, number: int) -> None:
        """End a request's samples; the next ``step`` returns them, as far as they came, with "abort"."""
        if number not in self.live:
            validate.fail("number", "a request under way", repr(number))
        self._abort(self.live[number])

    def _abort(self, samples) -> None:
        for sample in samples:
            if not sample.finish:
                self._end(sample, "abort")

    # The step

    @alone
    def _work(self, timeout: float | None = None) -> None:
        """One forward of what is under way."""
        if not self.paused and len(self.scheduler):
            self._watch_weights()
            chunks = self.scheduler.pick()
            if chunks:
                self._advance(chunks)

    @torch.no_grad()
    def _advance(self, chunks: list[Chunk]) -> None:
        """A forward, and a token for every sequence whose last token it computed."""
        hidden, ends = self.forward(chunks)
        rows, samples = [], []
        for chunk, end in zip(chunks, ends, strict=True):
            sample = chunk.sample
            sample.computed = chunk.stop
            if not chunk.completes:
                continue
            if chunk.stop - chunk.start > 1 or not sample.tokens:
                self.scheduler.publish(sample)
            group = [sample] if sample.tokens else [sample, *self.scheduler.follow(sample)]
            rows += [end - 1] * len(group)
            samples += group
        for start in range(0, len(samples), scoring.LOGIT_ROWS):
            some = slice(start, start + scoring.LOGIT_ROWS)
            self._draw(hidden[torch.tensor(rows[some], device=hidden.device)], samples[some])

    def forward(self, chunks: list[Chunk]) -> tuple[torch.Tensor, list[int]]:
        """(hidden states of the chunks' tokens, packed; where each chunk ends)."""
        device, size = self.decoder.device, self.page_size
        ids = [t for c in chunks for t in c.tokens[c.start : c.stop]]
        at = [range(c.start, c.stop) for c in chunks]
        slots = [
            c.table[p // size] * size + p % size for c, positions in zip(chunks, at, strict=True) for p in positions
        ]
        ends = torch.tensor([0, *(len(positions) for positions in at)]).cumsum(0)
        most = max(self.pool.pages_for(c.stop) for c in chunks)
        tables = [(c.table + [0] * most)[:most] for c in chunks]
        self.caches.copy(self.pool.copies)
        self.pool.copies = []
        given = Inputs(
            torch.tensor(ids, device=device), torch.tensor([p for r in at for p in r], device=device),
            torch.tensor(slots, device=device), torch.tensor(tables, dtype=torch.int32, device=device),
            torch.tensor([c.stop for c in chunks], dtype=torch.int32, device=device),
        )  # fmt: skip
        self.forwards += 1
        shared, decoding = attention.shares_prefix(tables), len(ids) == len(chunks)
        hidden = self.graphs.run(given, shared) if self.graphs is not None and decoding else None
        if hidden is None:
            cu_q = ends.to(device, torch.int32)
            most_new = max(map(len, at))
            how = attention.Paged(
                self.caches, given.slots, given.block_table, cu_q, given.kv_lens, most_new, shared, self.attention
            )
            with self.decoder.installed():
                hidden = self.decoder.forward(given.ids, given.positions, how)
        return hidden, ends[1:].tolist()

    def _draw(self, hidden, samples: list[Sample]) -> None:
        """A token for each of some samples from their last hidden states."""
        found = sampling.draw(self.decoder.head, hidden, samples, self.eos)
        for sample, token, *record in zip(samples, *found, strict=True):
            if sample.failed:
                reason = "error"
            elif token < 0:
                reason = "no token"
                logger.error("request %d: no token has a probability (NaN, or nothing is allowed)", sample.request)
            else:
                sample.tokens.append(token)
                sample.records.append((*record, self.version))
                reason = responses.ending(sample, token, self.eos, self.tokenizer, self.decoder.context)
            if reason:
                self._end(sample, reason)
            else:
                sample.settled = len(sample.tokens)

    def _end(self, sample: Sample, reason: str) -> None:
        sample.finish = reason
        self.scheduler.finish(sample)
        try:
            self._hand_over([self._rollout(sample)])
        finally:
            if all(s.finish for s in self.live[sample.request]):
                del self.live[sample.request]

    def _rollout(self, sample: Sample) -> Rollout:
        return responses.rollout_of(sample, self.tokenizer)

    # Weights

    def _watch_weights(self) -> None:
        """Keys and values of other weights are worth nothing."""
        weights = self.decoder.weights()
        if weights != self.weights:
            self.weights = weights
            self.bump()

    @alone
    def bump(self) -> None:
        """The policy has changed: a new version, no known prefixes, and what is under way is computed again.

        ``step`` calls it when a parameter has changed in place; a caller need not.
        """
        self.version += 1
        self.pool.forget_all()
        if not self.stale:
            self.scheduler.recompute()

    def sync_weights(self, named_params, version: int) -> None:
        """Nothing to copy in this process; ``version`` is that of the tokens to come. What was computed is forgotten in
        any case: a change by ``.data`` or a raw pointer shows in no counter."""
        checked_version(version)
        self.weights = self.decoder.weights()
        self.bump()
        self.version = version

    @alone
    def pause(self, mode: str = "keep") -> None:
        """``step`` does nothing until ``resume``.

        Args:
            mode: "keep": what is under way goes on from its keys and values, be they of older weights by then;
                "recompute": they are given back, and computed again; "abort": it ends here, and the next ``step``
                returns it.
        """
        validate.one_of("mode", mode, MODES)
        self.paused, self.stale = True, mode == "keep"
        if mode == "recompute":
            self.scheduler.recompute()
        elif mode == "abort":
            for samples in list(self.live.values()):
                self._abort(samples)

    @alone
    def resume(self) -> None:
        """Go on."""
        self._watch_weights()
        self.paused = self.stale = False

    @alone
    def partial(self) -> list[Rollout]:
        """What is under way, as far as it has come, with "paused"."""
        return [self._rollout(s) for samples in self.live.values() for s in samples if not s.finish]

    def _so_far(self, number: int) -> list[int]:
        samples = self.live.get(number)
        return samples[0].tokens[: samples[0].settled] if samples else []

    # Given tokens

    @alone
    def score(self, sequences) -> list[Score]:
        """Log-probs and entropies of given sequences, by the routine that rollouts come from.

        Args:
            sequences: lists of token ids, of two at least.

        Returns:
            A ``Score`` each, whose bits are those of the rollout that drew the tokens where ``bitwise`` is true.
        """
        checked = checked_sequences(sequences, self.decoder.vocab, self.decoder.context)
        return scoring.score(self.decoder, checked, self.scheduler.token_budget)

    @alone
    def choose(self, prompts, candidates) -> list[torch.Tensor]:
        """The log-prob of each candidate after its prompt, which is computed once for all of them.

        For judges that answer with one of a few words, generative reward models, and scores of given answers.

        Args:
            prompts: strings, or lists of token ids.
            candidates: for each prompt a list of strings or of lists of token ids. A string is encoded by itself,
                without special tokens.

        Returns:
            float32 [K] each: Σ log p of the candidate's tokens.
        """
        pairs = choices(prompts, candidates)
        self._watch_weights()
        return [scoring.choose(self, *pair) for pair in pairs]

    # Training

    @contextlib.contextmanager
    def training_mode(self, model=None):
        """Within it, a training forward has the rollouts' bits: the same attention, linears and head, with gradient.

        The backward belongs inside too, for gradient checkpointing runs the forward again there.

        Args:
            model: the model that is trained, if it is not the engine's; a RuntimeError says why it cannot be.
        """
        from rlfast.rollout.training import training_mode

        with training_mode(self.decoder.of(model)):
            yield

    def close(self) -> None:
        """Give the pages back; what is under way is lost."""
        with self.lock:
            self.closed = True
            self.caches.layers.clear()
            self.live.clear()
            self.graphs = None
