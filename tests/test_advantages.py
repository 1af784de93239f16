"""The advantage functions as trainers call them: golden values, verl's and torchrl's own results, bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import rlfast
from tests.numerics import assert_same_bits, assert_value
from tests.scan_cases import draw, mask_of

OP = "affine_scan"
GOLDEN = json.loads((Path(__file__).parent / "golden_advantages.json").read_text(encoding="utf-8"))
X = {name: torch.tensor(values, dtype=torch.float64) for name, values in GOLDEN["inputs"].items()}
F = {name: x.float() for name, x in X.items()}
MASK = X["mask"].bool()

R, V = torch.tensor([[0.0, 0, 0, 0, 1]]), torch.tensor([[0.5, 0.4, 0.3, 0.6, 0.2]])
HOLES = torch.tensor([[1, 1, 0, 0, 1]])


def near(got, wanted, digits=6):
    torch.testing.assert_close(got.double(), torch.tensor([wanted]).double(), rtol=0, atol=0.6 * 10**-digits)


def test_golden_gae():
    adv, ret = rlfast.gae(R, V, gamma=1.0, lam=0.95)
    near(adv, [0.384405, 0.5099, 0.642, 0.36, 0.8])
    near(ret, [0.884405, 0.9099, 0.942, 0.96, 1])
    near(rlfast.lambda_returns(R, V, gamma=1.0, lam=0.95), [0.884405, 0.9099, 0.942, 0.96, 1])


def test_golden_masks():
    near(rlfast.gae(R, V, HOLES, gamma=1.0, lam=0.95)[0], [0.432, 0.56, 0, 0, 0.8])
    near(rlfast.gae(R, V, HOLES, gamma=1.0, lam=0.95, masking="zero")[0], [0.34308, 0.4664, 0, 0, 0.8])


def test_golden_vtrace():
    ratio = torch.tensor([[0.5, 1.5, 1, 2, 0.8]])
    adv, target = rlfast.vtrace(R, V, ratio.log(), gamma=1.0)
    near(adv, [0.17, 0.44, 0.54, 0.24, 0.64])
    near(target - V, [0.17, 0.44, 0.54, 0.24, 0.64])


def agree(got, trainer, *path, where=None):
    """With what a trainer computes in float64, by the error of what it computes in float32."""
    theirs = []
    for dtype in (torch.float64, torch.float32):
        found = GOLDEN[f"{trainer} {dtype}"]
        for key in path:
            found = found[key]
        theirs.append(torch.tensor(found, dtype=dtype))
    where = torch.ones_like(theirs[0], dtype=torch.bool) if where is None else where
    assert_value(f"{trainer}: {path}", got[where], *(x[where] for x in theirs))


@pytest.mark.parametrize("kind", ("float32", "float64"))
def test_verl_gae(kind):
    """verl leaves what it carried at masked positions; here they are 0."""
    x = F if kind == "float32" else X
    adv, ret = rlfast.gae(x["rewards"], x["values"], x["mask"], gamma=0.97, lam=0.9, like="verl")
    agree(adv, "verl", "gae", 0, where=MASK)
    agree(ret, "verl", "gae", 1, where=MASK)


@pytest.mark.parametrize("method", ("grpo", "dr_grpo", "rloo", "opo", "gpg"))
def test_verl_groups(method):
    """One of the groups has one answer."""
    more = {"lengths": X["mask"].sum(-1)} if method == "opo" else {}
    scores = rlfast.group_advantage(F["scores"], group_ids=X["ids"].long(), method=method, like="verl", **more)
    agree(scores.unsqueeze(-1) * F["mask"], "verl", method)


def test_verl_pass_at_k():
    ids = X["ids"].long()
    ids[5] = 4
    scores = rlfast.group_advantage(F["scores"], group_ids=ids, method="pass@k", like="verl")
    agree(scores.unsqueeze(-1), "verl", "pass@k")


def test_verl_reinforce_plus_plus():
    returns = rlfast.discounted_returns(F["rewards"], F["mask"], gamma=0.97)
    agree(returns, "verl", "reinforce++", 1)
    agree(rlfast.masked_whiten(returns, F["mask"], like="verl"), "verl", "reinforce++", 0)
    scores = rlfast.group_advantage(
        F["scores"], group_ids=X["ids"].long(), method="reinforce++_baseline", like="verl", lengths=X["mask"].sum(-1)
    )
    agree(scores.unsqueeze(-1) * F["mask"], "verl", "reinforce++_baseline")


def test_verl_gdpo():
    adv = rlfast.group_advantage(
        F["columns"][:7], group_ids=X["ids"].long(), method="gdpo", weights=(1.0, 0.5, -2.0), like="verl",
        lengths=X["mask"].sum(-1),
    )  # fmt: skip
    agree(adv.unsqueeze(-1) * F["mask"], "verl", "gdpo")


@pytest.mark.parametrize("kind", ("float32", "float64"))
@pytest.mark.parametrize("method", ("grpo", "dr_grpo", "batch_std"))
def test_trl_groups(method, kind):
    """On rewards of 1e-3, where the 1e-4 that is added to the deviation is a tenth of it."""
    rewards = (F if kind == "float32" else X)["columns"][:, 0]
    agree(rlfast.group_advantage(rewards, group_size=4, method=method, like="trl"), "trl", method)


@pytest.mark.parametrize("kind", ("float32", "float64"))
def test_trl_gdpo(kind):
    given = {"method": "gdpo", "weights": (1.0, 0.5, -2.0), "like": "trl"}
    columns = (F if kind == "float32" else X)["columns"]
    agree(rlfast.group_advantage(columns, group_size=4, **given), "trl", "gdpo")
    mask = torch.arange(8) != 2
    agree(rlfast.group_advantage(columns, group_size=4, mask=mask, **given), "trl", "gdpo without the third")
    agree(rlfast.group_advantage(columns[:1], group_size=1, **given), "trl", "gdpo of one")


def test_one_sample_has_no_deviation():
    """As in TRL; one that is valid, too, and whatever whitens."""
    given = {"method": "batch_std", "like": "trl"}
    agree(rlfast.group_advantage(F["columns"][:1, 0], group_size=1, **given), "trl", "batch_std of one")
    for like in (None, "trl", "verl", "openrlhf"):
        for method in ("reinforce++", *(("batch_std", "reinforce++_baseline") if like != "verl" else ())):  # lone_raw
            pair = rlfast.group_advantage(
                torch.tensor([1.0, 2.0]), group_size=2, method=method, like=like, mask=torch.tensor([1, 0])
            )
            assert pair.tolist() == [0.0, 0.0], (like, method)


def test_verl_remax():
    returns = rlfast.reward_to_go(F["rewards"], F["mask"])
    agree(returns, "verl", "remax", 1, where=MASK)
    agree(returns - F["scores"].unsqueeze(-1), "verl", "remax", 0, where=MASK)
    one = rlfast.group_advantage(F["scores"], group_size=1, method="remax", baselines=F["scores"].flip(0))
    assert_same_bits("greedy", one, F["scores"] - F["scores"].flip(0))


def test_verl_optimal_token_baseline():
    mask = X["mask"].cumprod(1)
    adv, ret = rlfast.optimal_token_baseline(
        F["rewards"], F["logp"], F["sum_sq"].log(), mask, group_ids=X["ids"].long()
    )
    agree(ret, "verl", "otb", 1, where=mask.bool())
    agree(adv, "verl", "otb", 0)
    weighted, _ = rlfast.optimal_token_baseline(
        F["rewards"], F["logp"], F["sum_sq"].log(), mask, group_ids=X["ids"].long(), ratio=torch.ones(7, 9)
    )
    assert_same_bits("ratio of 1", weighted, adv)


def torchrl_ends() -> dict:
    """`done` with a value to go on from is an episode that is cut; `terminated` is its end."""
    return {"truncated": X["done"], "done": X["terminated"], "bootstrap": F["next_values"]}


def test_torchrl_gae():
    adv, ret = rlfast.gae(F["rewards"], F["values"], gamma=0.97, lam=0.9, like="torchrl", **torchrl_ends())
    agree(adv, "torchrl", "gae", 0)
    agree(ret, "torchrl", "gae", 1)
    found = rlfast.lambda_returns(F["rewards"], F["values"], gamma=0.97, lam=0.9, **torchrl_ends())
    agree(found, "torchrl", "td_lambda", 0)


def test_torchrl_vtrace():
    log_ratio = F["log_pi"] - F["log_mu"]
    adv, target = rlfast.vtrace(F["rewards"], F["values"], log_ratio, gamma=0.97, **torchrl_ends())
    agree(target, "torchrl", "vtrace", 1)
    agree(adv, "torchrl", "vtrace", 0)


def test_torchrl_reward_to_go():
    agree(rlfast.discounted_returns(F["rewards"], gamma=0.97, done=X["done"]), "torchrl", "reward2go", 0)


def test_openrlhf():
    """Values and rewards are multiplied by the mask, and nothing is carried; whitening comes later, over the batch."""
    r, v = X["rewards"] * X["mask"], X["values"] * X["mask"]
    last, out = torch.zeros(7, dtype=torch.float64), []
    for t in reversed(range(9)):
        following = v[:, t + 1] if t < 8 else 0.0
        last = r[:, t] + 0.97 * following - v[:, t] + 0.97 * 0.9 * last
        out.append(last)
    adv, _ = rlfast.gae(F["rewards"], F["values"], F["mask"], gamma=0.97, lam=0.9, like="openrlhf")
    truth = torch.stack(out[::-1], 1)
    assert_value("advantages", adv[MASK], truth[MASK], truth[MASK].float())
    chosen = adv[MASK].double()
    white = (adv.double() - chosen.mean()) * chosen.var(correction=0).clamp(min=1e-8).rsqrt()
    assert_value(
        "whitened", rlfast.masked_whiten(adv, F["mask"], like="openrlhf")[MASK], white[MASK], white[MASK].float()
    )
    asked, _ = rlfast.gae(F["rewards"], F["values"], F["mask"], gamma=0.97, lam=0.9, like="openrlhf", whiten=True)
    assert_value("at once", asked[MASK], white[MASK], white[MASK].float())


@pytest.mark.parametrize("scale", (1.0, 1e-5))
def test_openrlhf_reinforce(scale):
    """Over all tokens: Σ(A − mean)²/n, at least 1e-8 of it. RLOO, GRPO and Dr. GRPO are not whitened."""
    rewards, lengths = X["scores"][:6] * scale, X["mask"].sum(-1)[:6]
    centred = (rewards.view(2, 3) - rewards.view(2, 3).mean(1, keepdim=True)).flatten()
    for method, plain in (("reinforce++", rewards), ("reinforce++_baseline", centred)):
        mean = (plain * lengths).sum() / lengths.sum()
        var = ((plain - mean).square() * lengths).sum() / lengths.sum()
        truth = (plain - mean) * var.clamp(min=1e-8).rsqrt()
        given = {"group_size": 3, "method": method, "like": "openrlhf", "lengths": lengths}
        got = rlfast.group_advantage(rewards, **given)
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)
        assert_value(method, rlfast.group_advantage(rewards.float(), **given), truth, truth.float())
    others = (rewards.view(2, 3).sum(1, keepdim=True) - rewards.view(2, 3)) / 2
    rloo = rlfast.group_advantage(rewards, group_size=3, method="rloo", like="openrlhf")
    torch.testing.assert_close(rloo, rewards - others.flatten(), rtol=1e-12, atol=1e-12 * scale)


def test_torchrl_average_gae():
    """``average_gae`` divides by a deviation of at least 1e-4."""
    for scale in (1.0, 1e-6):
        given = {"gamma": 0.97, "lam": 0.9, "like": "torchrl"}
        plain, _ = rlfast.gae(X["rewards"] * scale, X["values"] * scale, **given)
        got, _ = rlfast.gae(X["rewards"] * scale, X["values"] * scale, whiten=True, **given)
        truth = (plain - plain.mean()) / plain.std().clamp_min(1e-4)
        torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-12)


def trl_ppo(rewards, values, scores, kl, last, dtype):
    """Values to advantages in TRL's PPO trainer (trl/experimental/ppo/ppo_trainer.py), which 1.16 has no more."""
    steps = values.shape[1]
    place, after = torch.arange(steps), (last + 1).unsqueeze(1)
    padding_mask, padding_mask_p1 = place > last.unsqueeze(1), place > after
    values = torch.masked_fill(values.to(dtype), padding_mask_p1, 0)
    rewards = -0.05 * torch.masked_fill(kl.to(dtype), padding_mask, 0)
    rewards[torch.arange(len(last)), torch.where(last + 1 < steps, last + 1, last)] += scores.to(dtype)
    lastgaelam, reversed_ = 0, []
    for t in reversed(range(steps)):
        nextvalues = values[:, t + 1] if t < steps - 1 else 0.0
        lastgaelam = rewards[:, t] + 0.97 * nextvalues - values[:, t] + 0.97 * 0.9 * lastgaelam
        reversed_.append(lastgaelam)
    advantages = torch.stack(reversed_[::-1], 1)
    returns = advantages + values
    counted = advantages[~padding_mask]
    advantages = (advantages - counted.mean()) * (counted.var() + 1e-8).rsqrt()
    return torch.masked_fill(advantages, padding_mask, 0), torch.masked_fill(returns, padding_mask_p1, 0)


def test_trl_ppo():
    """One mask for the recurrence, with the token whose value is bootstrapped from, another for the whitening."""
    last = torch.tensor([3, 5, 8, 2, 0, 7, 6])
    inputs = F["rewards"], F["values"], F["scores"], F["log_pi"] - F["log_mu"], last
    keep, keep_p1 = (torch.arange(9) <= (last + k).unsqueeze(1) for k in (0, 1))
    kl = torch.where(keep, inputs[3], 0.0)
    adv, ret = rlfast.gae(
        F["scores"], F["values"], keep_p1, gamma=0.97, lam=0.9, like="trl", whiten=False, kl=kl, kl_coef=0.05
    )
    adv = rlfast.masked_whiten(adv, keep, like="trl")
    truth, own = (trl_ppo(*inputs, dtype) for dtype in (torch.float64, torch.float32))
    assert_value("advantages", adv, truth[0], own[0])
    assert_value("returns", ret, truth[1], own[1])


def test_trl_whitens_and_zeroes():
    """With one mask for both; what is not whitened is as OpenRLHF's, which is held to a loop above."""
    adv, _ = rlfast.gae(F["rewards"], F["values"], F["mask"], gamma=0.97, lam=0.9, like="trl")
    unchanged, _ = rlfast.gae(F["rewards"], F["values"], F["mask"], gamma=0.97, lam=0.9, like="trl", whiten=False)
    bare, _ = rlfast.gae(F["rewards"], F["values"], F["mask"], gamma=0.97, lam=0.9, like="openrlhf")
    assert_same_bits("not whitened", unchanged, bare)
    counted = unchanged[MASK].double()
    truth = (unchanged.double() - counted.mean()) * (counted.var() + 1e-8).rsqrt()
    assert_value("whitened", adv[MASK], truth[MASK], truth[MASK].float())


def test_vapo():
    lengths = MASK.sum(-1)
    adv, ret = rlfast.gae(
        F["rewards"], F["values"], MASK, gamma=1.0, lam=rlfast.vapo_lam(lengths, alpha=0.2), critic_lam=1.0
    )
    for r in range(7):
        lam = max(0.0, 1 - 1 / (0.2 * int(lengths[r])))
        one, _ = rlfast.gae(F["rewards"][r], F["values"][r], MASK[r], gamma=1.0, lam=lam)
        _, other = rlfast.gae(F["rewards"][r], F["values"][r], MASK[r], gamma=1.0, lam=1.0)
        assert_same_bits("advantages", adv[r], one)
        assert_same_bits("returns", ret[r], other)


@pytest.mark.parametrize("like, empty", (("trl", 0.0), ("torchrl", 0.0), ("verl", 0.0), ("openrlhf", float("nan"))))
def test_masked_mean(like, empty):
    x, mask = draw((5, 40)), mask_of("holes", 5, 40)
    truth = (x.double() * mask).sum(-1) / mask.sum(-1)
    spoiled = torch.where(mask, x, torch.nan)
    got = rlfast.masked_mean(spoiled, mask, dim=-1, like=like)
    keep = mask.any(-1)
    torch.testing.assert_close(got[keep].double(), truth[keep], rtol=1e-6, atol=0)
    assert_same_bits("empty", got[~keep], torch.full_like(got[~keep], empty))
    whole = rlfast.masked_mean(spoiled, mask)
    assert_value("all", whole, x.double()[mask].mean(), x[mask].mean())
    assert_same_bits("no mask", rlfast.masked_mean(x), rlfast.masked_mean(x, torch.ones_like(x)))
    assert float(rlfast.masked_mean(torch.ones(4), torch.tensor([1, 1, 0, 0]), eps=2.0)) == 0.5


def test_reductions_do_not_depend_on_threads(threads):
    x, mask = draw((300_001,)), mask_of("holes", 1, 300_001)[0] | (torch.arange(300_001) % 2 == 0)
    found = []
    for n in (1, 2, 3):
        threads(n)
        found.append((rlfast.masked_mean(x, mask), rlfast.masked_whiten(x, mask)))
    for mean, white in found[1:]:
        assert_same_bits("mean", mean, found[0][0])
        assert_same_bits("whitened", white, found[0][1])


@pytest.mark.parametrize("like", ("trl", "openrlhf"))
def test_whitening_of_nothing_and_of_one(like):
    """A masked position is 0, whatever the sums are; alone, an element is at the mean."""
    for count in (0, 1):
        x, mask = draw((3,)).requires_grad_(), torch.arange(3) < count
        out = rlfast.masked_whiten(x, mask, like=like)
        assert out.tolist() == [0.0] * 3
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert bool(gradient.isfinite().all())
        kept = rlfast.masked_whiten(x, mask, like=like, shift_mean=False)
        assert_same_bits("the mean back", kept, torch.where(mask, x, 0.0))


@pytest.mark.parametrize("kept", (9, 4096, 30_000, 150_000))
def test_whitening_does_not_depend_on_the_padding(kept):
    """Padded on the right, on the left, with holes, and packed: the same bits."""
    n = 300_001
    x = draw((n,)).double().exp()
    rng = torch.Generator().manual_seed(3)
    holes = torch.zeros(n, dtype=torch.bool).index_fill(0, torch.randperm(n, generator=rng)[:kept], True)
    packed = rlfast.masked_whiten(x[:kept])
    for mask in (torch.arange(n) < kept, torch.arange(n) >= n - kept, holes):
        spread = torch.zeros(n, dtype=torch.float64).masked_scatter(mask, x[:kept])
        assert_same_bits("padded", rlfast.masked_whiten(spread, mask)[mask], packed)


def test_reductions_are_differentiable():
    x, mask = draw((3, 7)).double().requires_grad_(), mask_of("holes", 3, 7)
    assert torch.autograd.gradcheck(lambda x: rlfast.masked_mean(x, mask), (x,))
    assert torch.autograd.gradcheck(lambda x: rlfast.masked_whiten(x, mask), (x,))
    assert torch.autograd.gradcheck(lambda x: rlfast.masked_whiten(x, mask, dim=0), (x,))


@pytest.mark.parametrize("dim", (0, 1, -1, (0, 1)))
def test_whitening_along_a_dimension(dim):
    """Each slice as if it were alone; an empty one is 0."""
    x, mask = draw((5, 9)).double(), mask_of("holes", 5, 9)
    mask[3] = False
    out = rlfast.masked_whiten(x, mask, dim=dim, bessel=False, eps=1e-3)
    if dim == (0, 1):
        slices = [(out, x, mask)]
    else:
        slices = zip(out.unbind(1 - dim % 2), x.unbind(1 - dim % 2), mask.unbind(1 - dim % 2), strict=True)
    for got, alone, kept in slices:
        expected = rlfast.masked_whiten(alone, kept, bessel=False, eps=1e-3)
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


GAE = {"rewards": torch.zeros(2, 3), "values": torch.zeros(2, 3), "gamma": 0.9, "lam": 0.9}
N = torch.zeros(6)
BAD = {
    "values-list": ("gae", {"values": [1.0]}, TypeError, "values: expected a torch.Tensor", "list"),
    "values-scalar": ("gae", {"values": torch.tensor(1.0)}, ValueError, "values: expected shape [*, T]", "()"),
    "rewards-shape": ("gae", {"rewards": torch.zeros(2, 4)}, ValueError, "rewards: expected shape (2,)", "(2, 4)"),
    "mask-shape": ("gae", {"mask": torch.ones(3, 2)}, ValueError, "mask: expected shape (2, 3) like values", "(3, 2)"),
    "mask-list": ("gae", {"mask": [1]}, TypeError, "mask: expected a torch.Tensor", "list"),
    "mask-device": ("gae", {"mask": torch.ones(2, 3, device="meta")}, ValueError, "mask: expected device cpu", "meta"),
    "done-shape": ("gae", {"done": torch.ones(2)}, ValueError, "done: expected shape (2, 3)", "(2,)"),
    "gamma-high": ("gae", {"gamma": 1.01}, ValueError, "gamma: expected a float in [0, 1]", "1.01"),
    "gamma-negative": ("gae", {"gamma": -0.1}, ValueError, "gamma: expected a float in [0, 1]", "-0.1"),
    "gamma-nan": ("gae", {"gamma": float("nan")}, ValueError, "gamma: expected a finite float", "nan"),
    "gamma-str": ("gae", {"gamma": "1"}, TypeError, "gamma: expected a float", "'1'"),
    "lam-high": ("gae", {"lam": 2}, ValueError, "lam: expected a float in [0, 1]", "2"),
    "lam-tensor": ("gae", {"lam": torch.tensor([0.5, 1.5])}, ValueError, "lam: expected values in [0, 1]", "1.5"),
    "lam-tensor-shape": ("gae", {"lam": torch.zeros(3)}, ValueError, "lam: expected shape (2,), one a row, or", "(3,)"),
    "critic-lam": ("gae", {"critic_lam": -1.0}, ValueError, "critic_lam: expected a float in [0, 1]", "-1.0"),
    "masking": ("gae", {"masking": "skip"}, ValueError, "masking: expected one of ('carry', 'zero')", "'skip'"),
    "like": ("gae", {"like": "trlx"}, ValueError, "like: expected one of ('trl', 'verl'", "'trlx'"),
    "whiten": ("gae", {"whiten": 1.0}, TypeError, "whiten: expected a bool or rlfast.Whiten", "float"),
    "bootstrap-shape": ("gae", {"bootstrap": torch.zeros(3)}, ValueError, "bootstrap: expected shape (2,)", "(3,)"),
    "kl-coef": ("gae", {"kl_coef": "x"}, TypeError, "kl_coef: expected a float", "'x'"),
    "kl-coef-alone": ("gae", {"kl_coef": 0.5}, TypeError, "kl: expected a tensor, since kl_coef is 0.5", "None"),
    "cu-padded": ("gae", {"cu_seqlens": torch.tensor([0, 3])}, ValueError, "values: expected shape (N,)", "(2, 3)"),
    "cu-float": ("gae", {"rewards": N, "values": N, "cu_seqlens": torch.zeros(2)}, TypeError,
                 "cu_seqlens: expected dtype", "float32"),
    "cu-end": ("gae", {"rewards": N, "values": N, "cu_seqlens": torch.tensor([0, 5])}, ValueError,
               "cu_seqlens: expected offsets that ascend from 0 to 6", "[0, 5]"),
    "cu-order": ("gae", {"rewards": N, "values": N, "cu_seqlens": torch.tensor([0, 4, 2, 6])}, ValueError,
                 "cu_seqlens: expected offsets", "[0, 4, 2, 6]"),
    "ratio": ("vtrace", {"log_ratio": torch.zeros(2, 4)}, ValueError, "log_ratio: expected shape (2, 3)", "(2, 4)"),
    "ratio-none": ("vtrace", {"log_ratio": None}, TypeError, "log_ratio: expected a torch.Tensor", "NoneType"),
    "clip": ("vtrace", {"log_ratio": torch.zeros(2, 3), "clip_c": -1.0}, ValueError, "clip_c: expected a float", "-1"),
    "rewards-none": ("gae", {"rewards": None}, TypeError, "rewards: expected a torch.Tensor", "NoneType"),
    "rewards-none-λ": ("lambda_returns", {"rewards": None}, TypeError, "rewards: expected a torch.Tensor", "NoneType"),
    "rewards-none-n": ("n_step_returns", {"rewards": None, "n": 2, "lam": None}, TypeError,
                       "rewards: expected a torch.Tensor", "NoneType"),
    "truncated": ("gae", {"truncated": torch.ones(2, 3)}, ValueError, "bootstrap: expected shape (2, 3)", "None"),
    "truncated-row": ("gae", {"truncated": torch.ones(2, 3), "bootstrap": torch.ones(2)}, ValueError,
                      "bootstrap: expected shape (2, 3), the values after truncated tokens", "(2,)"),
    "whiten-where": ("gae", {"whiten": rlfast.Whiten(where="x")}, ValueError, "where: expected one of", "'x'"),
    "whiten-eps": ("gae", {"whiten": rlfast.Whiten(eps=-1.0)}, ValueError, "eps: expected a float ≥ 0", "-1.0"),
    "whiten-nan": ("gae", {"whiten": rlfast.Whiten(eps=float("nan"))}, ValueError, "eps: expected a finite", "nan"),
    "like-list": ("gae", {"like": ["trl"]}, ValueError, "like: expected one of ('trl', 'verl'", "['trl']"),
    "gamma-nan-valid": ("gae", {"gamma": torch.tensor([[1.0, 1.0, torch.nan]] * 2), "mask": torch.ones(2, 3)},
                        ValueError, "gamma: expected values in [0, 1]", "nan"),
    "gamma-nan-zero": ("gae", {"gamma": torch.tensor([[1.0, torch.nan]] * 2)[:, [0, 0, 1]], "masking": "zero",
                               "mask": torch.tensor([[1, 1, 0]] * 2)}, ValueError, "gamma: expected values in", "nan"),
    "n": ("n_step_returns", {"n": 0, "lam": None}, ValueError, "n: expected an int ≥ 1", "0"),
    "n-float": ("n_step_returns", {"n": 1.5, "lam": None}, TypeError, "n: expected an int", "1.5"),
}  # fmt: skip
SCAN_BAD = {
    "a-none": ({"a": None}, TypeError, "a: expected a torch.Tensor", "NoneType"),
    "a": ({"a": torch.zeros(2, 4)}, ValueError, "a: expected shape (2, 3) like b", "(2, 4)"),
    "initial": ({"initial": torch.zeros(2, 3)}, ValueError, "initial: expected shape (2,)", "(2, 3)"),
}
GROUP_BAD = {
    "rewards-rank": ({"rewards": torch.zeros(2, 3)}, ValueError, "rewards: expected shape (N,)", "(2, 3)"),
    "neither": ({"group_size": None}, ValueError, "group_size: expected one of group_size and group_ids", "neither"),
    "both": ({"group_ids": torch.zeros(6).long()}, ValueError, "group_size: expected one of", "both"),
    "size": ({"group_size": 4}, ValueError, "group_size: expected a divisor of the 6 rewards", "4"),
    "size-float": ({"group_size": 2.0}, TypeError, "group_size: expected an int", "2.0"),
    "ids": ({"group_size": None, "group_ids": torch.zeros(5).long()}, ValueError, "group_ids: expected shape",
            "(5,)"),
    "ids-float": ({"group_size": None, "group_ids": torch.zeros(6)}, TypeError, "group_ids: expected dtype", "float32"),
    "method": ({"method": "ppo"}, ValueError, "method: expected one of ('grpo'", "'ppo'"),
    "like": ({"like": "x"}, ValueError, "like: expected one of ('trl'", "'x'"),
    "eps": ({"eps": -1.0}, ValueError, "eps: expected a float ≥ 0", "-1.0"),
    "tau": ({"tau": 0.0}, ValueError, "tau: expected a finite float > 0", "0.0"),
    "scale": ({"scale": "std"}, ValueError, "scale: expected one of ('none'", "'std'"),
    "lengths": ({"method": "opo"}, TypeError, "lengths: expected a tensor, since method is 'opo'", "None"),
    "lengths-shape": ({"method": "opo", "lengths": torch.ones(5)}, ValueError, "lengths: expected shape (6,)", "(5,)"),
    "baselines": ({"method": "remax"}, TypeError, "baselines: expected a tensor", "None"),
    "mask": ({"mask": torch.ones(5)}, ValueError, "mask: expected shape (6,) like rewards", "(5,)"),
    "ids-int": ({"group_size": None, "group_ids": 5}, TypeError, "group_ids: expected a tensor of ints, or", "5"),
    "ids-lists": ({"group_size": None, "group_ids": [[1]] * 6}, TypeError, "group_ids: expected a tensor of", "[[1]"),
    "bessel": ({"bessel": "no"}, TypeError, "bessel: expected True or False", "'no'"),
    "method-list": ({"method": ["grpo"]}, ValueError, "method: expected one of ('grpo'", "['grpo']"),
    "delta": ({"method": "asymre", "delta": float("nan")}, ValueError, "delta: expected a finite float", "nan"),
    "no-column": ({"method": "gdpo", "rewards": torch.zeros(6, 0)}, ValueError, "rewards: expected shape (N, K)",
                  "(6, 0)"),
    "weights-int": ({"method": "gdpo", "rewards": torch.zeros(6, 2), "weights": 3}, TypeError, "weights: expected 2",
                    "3"),
    "weights": ({"method": "gdpo", "rewards": torch.zeros(6, 2), "weights": (1.0,)}, ValueError,
                "weights: expected 2 floats", "1"),
    "weights-one": ({"weights": (1.0,)}, ValueError, "weights: expected None: grpo does not read it", "a value"),
    "weights-rank": ({"method": "gdpo", "weights": (1.0,)}, ValueError, "weights: expected None: gdpo", "a value"),
    "lengths-unread": ({"lengths": torch.ones(6)}, ValueError, "lengths: expected None: grpo does not", "a value"),
    "baselines-unread": ({"method": "reinforce++", "baselines": torch.ones(6)}, ValueError,
                         "baselines: expected None: reinforce++ does not read it", "a value"),
    "bessel-unread": ({"method": "dr_grpo", "bessel": True}, ValueError, "bessel: expected None: dr_grpo", "True"),
    "eps-unread": ({"method": "rloo", "eps": 1e-4}, ValueError, "eps: expected None: rloo does not read it", "0.0001"),
    "tau-unread": ({"tau": 0.5}, ValueError, "tau: expected None: grpo does not read it", "0.5"),
    "scale-unread": ({"method": "reinforce++", "scale": "group"}, ValueError, "scale: expected None: reinforce++",
                     "'group'"),
    "delta-group": ({"delta": 0.5}, ValueError, "delta: expected 0: grpo with scale 'group' does not take it", "0.5"),
    "delta-default": ({"method": "asymre", "scale": "others"}, ValueError, "delta: expected 0: asymre with scale 'o",
                      "-0.1"),
    "delta-best": ({"method": "pass@k", "scale": "none", "delta": 0.5}, ValueError, "delta: expected 0: pass@k", "0.5"),
    "delta-whitened": ({"method": "reinforce++", "delta": 0.5}, ValueError, "delta: expected 0: reinforce++", "0.5"),
    "size-of-no-group": ({"method": "reinforce++", "group_size": 4}, ValueError, "group_size: expected a divisor", "4"),
    "both-of-no-group": ({"method": "remax", "baselines": torch.ones(6), "group_ids": torch.zeros(6).long()},
                         ValueError, "group_size: expected one of", "both"),
}  # fmt: skip


def refused(function, arguments, kind, words):
    with pytest.raises(kind) as caught:
        function(**arguments)
    assert type(caught.value) is kind
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"
    assert re.match(r"\w+: expected .+, got .+", str(caught.value)), str(caught.value)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    function, change, kind, *words = BAD[name]
    arguments = {k: v for k, v in (GAE | change).items() if not (k == "lam" and v is None)}
    refused(getattr(rlfast, function), arguments, kind, words)


@pytest.mark.parametrize("name", SCAN_BAD)
def test_bad_input_of_the_bare_scan(name):
    change, kind, *words = SCAN_BAD[name]
    refused(rlfast.affine_scan, {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)} | change, kind, words)


@pytest.mark.parametrize("name", GROUP_BAD)
def test_bad_input_of_groups(name):
    change, kind, *words = GROUP_BAD[name]
    refused(rlfast.group_advantage, {"rewards": torch.zeros(6), "group_size": 2} | change, kind, words)


def test_bad_input_of_returns_and_statistics():
    for function, more in ((rlfast.discounted_returns, {"gamma": 0.9}), (rlfast.reward_to_go, {})):
        given = {"rewards": torch.zeros(2, 3), "mask": [1], **more}
        refused(function, given, TypeError, ("mask: expected a torch.Tensor", "list"))
    given = {"rewards": torch.zeros(2, 3), "gamma": 0.9, "kl_coef": 0.5}
    refused(rlfast.discounted_returns, given, TypeError, ("kl: expected a tensor, since kl_coef is 0.5",))
    given = {"rewards": N, "group_size": 2, "bessel": "no"}
    refused(rlfast.group_statistics, given, TypeError, ("bessel: expected True or False", "'no'"))


def test_lengths_are_not_negative():
    refused(rlfast.vapo_lam, {"lengths": torch.tensor([1, -3])}, ValueError, ("lengths: expected numbers ≥ 0", "-3"))
    refused(rlfast.vapo_lam, {"lengths": torch.tensor([torch.nan])}, ValueError, ("lengths: expected numbers", "nan"))
    assert rlfast.vapo_lam(torch.tensor([0])).tolist() == [0.0]
    three = {name: torch.zeros(2, 3) for name in ("rewards", "logp", "log_sum_sq_probs")}
    given = three | {"group_size": 2, "eps": -1.0}
    refused(rlfast.optimal_token_baseline, given, ValueError, ("eps: expected a float ≥ 0", "-1.0"))


@pytest.mark.parametrize("rate", ("gamma", "lam", "critic_lam"))
def test_a_rate_at_a_masked_token_has_no_effect(backend, device, rate):
    rates = torch.full((7, 9), 0.9)
    plain = {"gamma": 0.9, "lam": 0.9, "critic_lam": 0.9}
    on = {"rewards": F["rewards"].to(device), "values": F["values"].to(device), "mask": MASK.to(device)}
    with rlfast.use_backend(backend):
        wanted = rlfast.gae(**on, **plain | {rate: rates.to(device)})
        got = rlfast.gae(**on, **plain | {rate: torch.where(MASK, rates, torch.nan).to(device)})
    for x, y in zip(got, wanted, strict=True):
        assert_same_bits(rate, x, y)
    if rate == "gamma":
        given = {"rewards": F["rewards"], "values": F["values"], "mask": MASK, "n": 3}
        spoiled = rlfast.n_step_returns(**given, gamma=torch.where(MASK, rates, torch.nan))
        assert_same_bits("n steps", spoiled, rlfast.n_step_returns(**given, gamma=rates))


@pytest.mark.parametrize("masking", ("carry", "zero"))
def test_returns_know_both_maskings(backend, device, masking):
    """A masked token of "zero" discounts what comes after it, as OpenRLHF's do; one of "carry" does not."""

    def plain(x):
        state, out = torch.zeros_like(x["values"][:, 0]), []
        for t in reversed(range(9)):
            moved = x["rewards"][:, t] * x["mask"][:, t] + 0.9 * state
            state = moved if masking == "zero" else torch.where(MASK[:, t], moved, state)
            out.append(torch.where(MASK[:, t], state, 0.0))
        return torch.stack(out[::-1], 1)

    given = F["rewards"].to(device), MASK.to(device)
    with rlfast.use_backend(backend):
        got = rlfast.discounted_returns(*given, gamma=0.9, masking=masking)
        sums = rlfast.reward_to_go(*given, masking=masking)
        same = rlfast.discounted_returns(*given, gamma=1.0, masking=masking)
    assert_value(masking, got.cpu(), plain(X), plain(F))
    assert_same_bits("γ = 1", sums, same)
    refused(rlfast.reward_to_go, {"rewards": N, "masking": "x"}, ValueError, ("masking: expected one of", "'x'"))


def test_bad_input_of_reductions():
    refused(rlfast.masked_whiten, {"x": N, "where": "under"}, ValueError, ("where: expected one of", "'under'"))
    refused(rlfast.masked_whiten, {"x": N, "eps": -1.0}, ValueError, ("eps: expected a float ≥ 0",))
    refused(rlfast.masked_mean, {"x": N, "mask": torch.ones(5)}, ValueError, ("mask: expected shape (6,)",))
    refused(rlfast.masked_mean, {"x": N, "like": "x"}, ValueError, ("like: expected one of",))
