"""Selections of tokens: what is chosen, how many, and that the draw is the seed's."""

from __future__ import annotations

import pytest
import torch

import rlfast
from rlfast import selections

ROWS, LENGTH = 40, 50


def batch():
    """(logp, old_logp, adv, mask): a thousand tokens and more."""
    draw = torch.Generator().manual_seed(1)
    old = -3.0 * torch.rand(ROWS, LENGTH, generator=draw) - 0.5
    logp = (old + 0.3 * torch.randn(ROWS, LENGTH, generator=draw)).clamp(max=-0.01)
    mask = torch.rand(ROWS, LENGTH, generator=draw) < 0.7
    return logp, old, torch.randn(ROWS, generator=draw), mask


def covariance(logp, adv, mask):
    adv = adv[:, None].expand_as(logp).double()
    logp = logp.double()
    return (adv - adv[mask].mean()) * (logp - logp[mask].mean())


@pytest.mark.parametrize("number", (1, 7, 40, 100))
def test_the_largest_are_the_same_with_and_without_a_sort_of_all(number, monkeypatch):
    score = torch.randint(0, 12, (8, 11), generator=torch.Generator().manual_seed(2)).float()
    score[score < 6] = -torch.inf
    distinct = torch.arange(88.0).flip(0).view(8, 11)
    for x in (score, distinct):
        few = selections._ranked_below(x, torch.tensor(number), 1.0, None)
        with monkeypatch.context() as context:
            context.setattr(selections, "unobserved", lambda *_: False)
            every = selections._ranked_below(x, torch.tensor(number), 1.0, None)
        assert torch.equal(few, every) and int(few.sum()) == min(number, int((x > -torch.inf).sum()))


@pytest.mark.parametrize("ratio, number", [(0.01, None), (1e-9, 1), (1.0, "all")])
def test_clip_cov_drops_so_many_of_the_eligible(ratio, number):
    logp, old, adv, mask = batch()
    cov = covariance(logp, adv, mask)
    r = (logp - old).exp()
    clipped = ((r > 1.2) & (adv[:, None] > 0)) | ((r < 0.8) & (adv[:, None] < 0))
    eligible = mask & ~clipped & (cov > 0.1) & (cov < 1.0)
    dropped = ~rlfast.clip_cov_keep(logp, old, adv, mask, ratio=ratio, low=0.1, high=1.0)
    assert not bool((dropped & ~eligible).any())
    wanted = {None: int(0.01 * int(mask.sum())), "all": int(eligible.sum())}.get(number, number)
    assert int(dropped.sum()) == wanted > 0


def test_the_draw_is_the_seeds():
    logp, old, adv, mask = batch()

    def drawn(seed):
        return rlfast.clip_cov_keep(logp, old, adv, mask, ratio=0.01, low=0.1, high=1.0, seed=seed)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


def test_nothing_is_eligible_and_nothing_is_dropped():
    logp, old, adv, mask = batch()
    assert bool(rlfast.clip_cov_keep(logp, old, adv, mask, low=1e6, high=1e7).all())


def test_kl_cov_takes_the_largest():
    logp, _, adv, mask = batch()
    chosen = rlfast.kl_cov_extra(logp, adv, mask, ratio=0.05) != 0
    cov = covariance(logp, adv, mask)
    number = int(0.05 * int(mask.sum()))
    wanted = torch.zeros_like(mask).flatten()
    wanted[torch.where(mask, cov, -torch.inf).flatten().topk(number).indices] = True
    assert torch.equal(chosen, wanted.reshape(mask.shape)) and int(chosen.sum()) == number
    whole = rlfast.kl_cov_extra(logp, adv[:, None].expand_as(logp), mask, ratio=0.05)
    assert torch.equal(whole != 0, chosen), "advantages of tokens"


@pytest.mark.parametrize("quantile", [0.0, 0.2, 0.5, 0.8, 0.937, 1.0])
def test_top_entropy_is_torchs_quantile(quantile):
    logp, _, _, mask = batch()
    entropy = -logp
    keep = rlfast.top_entropy_keep(torch.where(mask, entropy, torch.nan), mask, quantile=quantile)
    threshold = torch.quantile(entropy[mask], quantile)
    assert torch.equal(keep, mask & (entropy >= threshold))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 4)])
def test_an_empty_mask_keeps_nothing(shape):
    x = torch.zeros(shape)
    none = torch.zeros(shape, dtype=torch.bool)
    assert not bool(rlfast.top_entropy_keep(x, none).any())
    assert not bool(rlfast.kl_cov_extra(x, x, none).any())
    assert bool(rlfast.clip_cov_keep(x, x, x, none).all())


def test_no_value_is_read():
    """Under fake tensors nothing has a value: reading one would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, mask = torch.empty(3, 4), torch.empty(3, 4, dtype=torch.bool)
        assert rlfast.top_entropy_keep(x, mask).shape == (3, 4)
        assert rlfast.kl_cov_extra(x, x, mask).shape == (3, 4)
        assert rlfast.shape_rewards(x[:, 0], x, x, mask).shape == (3, 4)
        control = rlfast.AdaptiveKL(0.1, target=1.0, horizon=10)
        control.update(x.mean(), 3)
        seen = rlfast.RunningMeanStd()
        seen.update(x, mask)


def test_errors_name_the_argument():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"adv: expected shape \(2, 3\) like logp, got \(3,\)|adv: .*got \(3, 3\)"):
        rlfast.kl_cov_extra(x, torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, 3\) like entropy, got \(3,\)"):
        rlfast.top_entropy_keep(x, torch.ones(3))
    with pytest.raises(ValueError, match=r"quantile: expected a float in \[0, 1\], got 80"):
        rlfast.top_entropy_keep(x, quantile=80)
    with pytest.raises(ValueError, match=r"ratio: expected a float > 0, and at most 1, got 0\.0"):
        rlfast.kl_cov_extra(x, x, ratio=0.0)


X, ONES = torch.zeros(2, 3), [[1, 1, 1], [1, 1, 1]]
BAD = [
    (lambda: rlfast.clip_cov_keep(X, X[:1], X), r"old_logp: expected shape \(2, 3\) like logp, got \(1, 3\)"),
    (lambda: rlfast.clip_cov_keep(X, [[0.0]], X), r"old_logp: expected a torch.Tensor, got list"),
    (lambda: rlfast.clip_cov_keep(X, X.to("meta"), X), "old_logp: expected device cpu like logp, got meta"),
    (lambda: rlfast.clip_cov_keep(X, X, X, ONES), "mask: expected a torch.Tensor, got list"),
    (lambda: rlfast.clip_cov_keep(X, X, X, ratio=2.0), "ratio: expected a float > 0, and at most 1, got 2.0"),
    (lambda: rlfast.clip_cov_keep(X, X, X, low=5.0, high=1.0), "low, high: expected low <= high, got 5.0, 1.0"),
    (lambda: rlfast.clip_cov_keep(X, X, X, eps_low=float("nan")), r"eps_low: expected a float ≥ 0 .*, got nan"),
    (lambda: rlfast.clip_cov_keep(X, X, X, seed="a"), "seed: expected an int, got 'a'"),
    (lambda: rlfast.kl_cov_extra(X, X, ONES), "mask: expected a torch.Tensor, got list"),
    (lambda: rlfast.kl_cov_extra(ONES, X), "logp: expected a torch.Tensor, got list"),
    (lambda: rlfast.top_entropy_keep(X, ONES), "mask: expected a torch.Tensor, got list"),
    (lambda: rlfast.top_entropy_keep(X, quantile="a"), r"quantile: expected a float in \[0, 1\], got 'a'"),
    (lambda: rlfast.rollout_keep(X, X, ONES), "mask: expected a torch.Tensor, got list"),
    (lambda: rlfast.rollout_keep(X, X[:1]), r"rollout_logp: expected shape \(2, 3\) like old_logp, got \(1, 3\)"),
    (lambda: rlfast.rollout_keep(X, X, low=1.0, high=0.0), "low, high: expected low <= high, got 1.0, 0.0"),
    (lambda: rlfast.rollout_keep(X, X, high=torch.ones(2)), r"high: expected a number or a 0-dim tensor, got \(2,\)"),
]


@pytest.mark.parametrize("call, said", BAD, ids=[said for _, said in BAD])
def test_bad_input_is_named(call, said):
    with pytest.raises((ValueError, TypeError), match=said):
        call()


@pytest.mark.parametrize("level", ["token", "seq_sum", "seq_mean", "seq_max"])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "tv", "binary_kl"])
def test_rollout_keep_is_its_formula(kind, level):
    logp, old, _, mask = batch()
    logp, old = logp.double(), old.double()
    p, q, d = logp.exp(), old.exp(), old - logp
    bernoulli = torch.distributions.Bernoulli
    looked_at = {
        "k1": d, "k2": d.square() / 2, "k3": d.exp() - 1 - d, "tv": (p - q).abs(),
        "binary_kl": torch.distributions.kl_divergence(bernoulli(p), bernoulli(q)),
    }[kind]  # fmt: skip
    found = []
    for row, counted in zip(looked_at, mask, strict=True):
        chosen = row[counted]
        one = {"token": row, "seq_sum": chosen.sum(), "seq_mean": chosen.mean(), "seq_max": chosen.amax()}[level]
        found.append(one.expand(LENGTH))
    found = torch.stack(found)
    values = found[mask].unique()  # bounds between two of them, where rounding decides nothing
    low, high = (values[int(q * len(values)) :][:2].mean() for q in (0.2, 0.7))
    keep = rlfast.rollout_keep(
        old, torch.where(mask, logp, torch.nan), mask, kind=kind, level=level, low=low, high=high
    )
    assert torch.equal(keep, mask & (found >= low) & (found <= high)) and bool(keep.any())


def test_a_rollout_without_a_log_prob_is_kept():
    old = torch.tensor([[-1.0, -1.0]])
    rollout = torch.tensor([[torch.nan, -3.0]])
    for kind in ("k2", "tv", "binary_kl"):
        assert rlfast.rollout_keep(old, rollout, kind=kind, high=0.1).tolist() == [[True, False]]
