"""What the tests feed ``sample``, and how a result is held to the oracle."""

from __future__ import annotations

import torch

import rlfast
from rlfast.reference import sample as oracle
from rlfast.verify.sampling import OUTPUTS, edits_of, options_of, ragged
from tests.numerics import assert_same_bits, assert_value

P_VALUE = 1e-4


def moved(x, device: str):
    """Tensors on a device, in tuples too."""
    if isinstance(x, tuple):
        return type(x)(*(y.to(device) for y in x)) if hasattr(x, "_fields") else tuple(y.to(device) for y in x)
    return x.to(device) if isinstance(x, torch.Tensor) else x


def run(logits, backend: str, device: str, **options) -> rlfast.Sampled:
    """The public function on a backend; what it returns on the CPU."""
    with rlfast.use_backend(backend):
        out = rlfast.sample(logits.to(device), **{k: moved(x, device) for k, x in options.items()})
    return rlfast.Sampled(*(x.cpu() for x in out))


def problem(rows: int, vocab: int, dtype=torch.float32, edited: bool = True, scale: float = 4.0, seed: int = 0):
    """(logits, options, edits, allowed): every option by row, with no threshold near a probability."""
    draw = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=draw) * scale).to(dtype)
    edits = edits_of(rows, vocab, draw) if edited else [[] for _ in range(rows)]
    allowed = torch.rand(rows, vocab, generator=draw) < 0.9 if edited else torch.ones(rows, vocab, dtype=torch.bool)
    edits = [[(i, float(torch.tensor(value))) for i, value in row] for row in edits]
    return logits, options_of(logits, edits, allowed, seed), edits, allowed


def given(options: dict, edits, allowed) -> dict:
    """The keyword arguments of the public function."""
    more = {} if edits is None else {"edits": ragged(edits)}
    return options | more | ({} if allowed is None else {"allowed": allowed})


def perturbed(logits, options: dict, edits, allowed, dtype) -> torch.Tensor:
    """What each row's token is the argmax of, [M, V] in ``dtype``."""
    rows = []
    for i, x in enumerate(logits.to(dtype)):
        w = oracle.edited(x, edits and edits[i], None if allowed is None else allowed[i])
        t, k, p, least, seed, position = (options[name][i].item() for name in options)
        keep = oracle.keeps(w, oracle.probabilities(w, t), k, p, least)
        rows.append(oracle.perturbed(w, keep, t, seed, position))
    return torch.stack(rows)


def hold(out: rlfast.Sampled, logits, options: dict, edits=None, allowed=None) -> None:
    """The contract: the numbers of the token; no other token's perturbed logit is larger by more than rounding."""
    exact = perturbed(logits, options, edits, allowed, torch.float64)
    single = perturbed(logits, options, edits, allowed, torch.float32)
    own = exact.gather(1, out.tokens.unsqueeze(1)).squeeze(1)
    assert_value("perturbed", own, exact.amax(1), single.amax(1), size=logits.double().abs().amax(1))
    more = {"edits": edits, "allowed": allowed, "tokens": out.tokens}
    truth, yardstick = (oracle.sample(logits, **options, **more, dtype=d) for d in (torch.float64, torch.float32))
    for name, value, yard in zip(OUTPUTS, truth[1:], yardstick[1:], strict=True):
        assert_value(name, getattr(out, name), value, yard)


def hold_raw(out: rlfast.Sampled, logits, backend: str, device: str) -> None:
    """The bits of ``token_logps``."""
    with rlfast.use_backend(backend):
        raw = rlfast.token_logps(logits.to(device), out.tokens.to(device), outputs=("logp", "entropy"))
    assert_same_bits("logp_raw", out.logp_raw, raw.logp.cpu())
    assert_same_bits("entropy", out.entropy, raw.entropy.cpu())


def chi_squared(tokens, probabilities) -> float:
    """The p-value of Pearson's test of the tokens' counts; cells that expect fewer than 5 are one."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    assert int(counts[expected == 0].sum()) == 0, "a token that has no probability"
    small = expected < 5
    counts = torch.cat((counts[~small], counts[small].sum().view(1)))
    expected = torch.cat((expected[~small], expected[small].sum().view(1)))
    there = expected > 0
    statistic = ((counts - expected)[there] ** 2 / expected[there]).sum()
    degrees = torch.tensor((int(there.sum()) - 1) / 2.0).double()
    return float(torch.special.gammaincc(degrees, statistic / 2))
