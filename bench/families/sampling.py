"""sample: a token of each row of logits, with its log-probs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

import rlfast
from bench import arms
from bench.baselines import sampling as baselines
from bench.case import DTYPES, Case, Target
from bench.draws import even, generator
from rlfast.reference import sample as oracle

OUTPUTS = ("entropy", "kept")


@dataclass(frozen=True, kw_only=True)
class Sample(Case):
    """Reads logits [rows, vocab] of a distribution like a language model's, p ~ rank^−1.5; writes 24 bytes a row."""

    op: str = "sample"
    rows: int
    vocab: int
    top_k: int = 0
    top_p: float = 1.0

    NAMES: ClassVar = {
        "eager": "softmax, multinomial, log_softmax, entropy",
        "plain race": "the argmax over exponential noise",
        "plain few": "that among the largest alone",
        "rlfast token_logps": "the time of `token_logps` with the entropy, of a token that is known",
    }

    def small(self) -> Sample:
        return replace(self, rows=min(self.rows, 3), vocab=min(self.vocab, 3001), budget_s=0.2)

    def inputs(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        draw = generator(device)
        x = torch.empty(self.rows, self.vocab, device=device)
        for row in x:
            row.copy_(torch.log1p(torch.randperm(self.vocab, generator=draw, device=device)) * -1.5)
            row.add_(torch.randn(self.vocab, generator=draw, device=device), alpha=0.5)
        return {"logits": x.to(DTYPES[self.dtype])}

    def ours(self, data: dict) -> dict:
        rows = torch.arange(self.rows, device=data["logits"].device)

        def run(logits):
            out = rlfast.sample(logits, top_k=self.top_k, top_p=self.top_p, seeds=1, positions=rows)
            return out.entropy, out.kept

        def known(logits):
            return rlfast.token_logps(logits, rows, outputs=("logp", "entropy")).entropy

        return {name: arms.arm(f, data, (), OUTPUTS) for name, f in (("rlfast", run), ("rlfast token_logps", known))}

    def plain(self, data: dict) -> dict:
        cut, rest = bool(self.top_k) or self.top_p < 1.0, (self.top_k, self.top_p)
        best = {"plain few": baselines.race_of_few} if cut else {"plain race": baselines.race}
        found = {"eager": baselines.eager, "compile": torch.compile(baselines.eager, dynamic=False), **best}
        return {name: arms.arm(f, data, rest, OUTPUTS) for name, f in found.items()}

    def truth(self, data: dict) -> dict:
        """The entropy and the kept mass of some rows; tokens are drawn, and the tests hold them to the oracle."""
        rows = even(self.rows).to(data["logits"].device)
        entropy, kept = [], []
        for x in data["logits"][rows].double():
            q = torch.softmax(x, -1)
            entropy.append(-(q * q.log()).sum())
            kept.append(q[oracle.keeps(x, q, self.top_k, self.top_p, 0.0)].sum())
        return {"entropy": (rows, torch.stack(entropy)), "kept": (rows, torch.stack(kept))}

    def ceilings(self, data: dict, device: str) -> dict:
        return arms.bandwidth(data["logits"])

    def traffic(self, arm: str) -> int:
        once = self.rows * self.vocab * DTYPES[self.dtype].itemsize
        return 2 * once if arm == "copy" else once


TARGETS = (Target("rlfast", "eager", 5.0), Target("rlfast", "plain", 3.0))
# plain torch draws among the largest alone
CUT_TARGETS = (Target("rlfast", "eager", 5.0), Target("rlfast", "plain", 1.2))
ON_GPU = (Target("rlfast", "compile", 1.0),)
CUTS = (("plain", {}), ("top-k 50", {"top_k": 50}), ("top-p 0.9", {"top_p": 0.9}))


def _case(kind: str, options: dict, rows: int, vocab: int) -> Sample:
    name, isas = f"sample {kind}, {rows} × {vocab}", rows == 16 and vocab == 49152
    targets = CUT_TARGETS if options else TARGETS
    return Sample(
        name=name, rows=rows, vocab=vocab, targets=targets, gpu_targets=ON_GPU, budget_s=4.0, isas=isas, **options
    )


CASES = tuple(
    _case(kind, options, rows, vocab) for kind, options in CUTS for vocab in (49152, 151936) for rows in (1, 16, 64)
)
