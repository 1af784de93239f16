"""Losses of reward models: golden values, the regressions beside them, bad input."""

from __future__ import annotations

import pytest
import torch

import rlfast
from rlfast import REWARD_LOSSES
from tests.cases import DTYPES
from tests.numerics import assert_gradient, assert_value

OP = "pair_loss"
# r_w = 1.5, r_l = 0.3
GOLDEN = {
    "bradley_terry": ({}, {}, 0.263282),
    "margin": ({}, {"margin": 1.0}, 0.598139),
    "centred": ({}, {}, 0.263282 + 0.0324),
    "soft_label": ({}, {"probability": 0.75}, 0.263282 + 0.25 * 1.2),
    "scaled": ({}, {"weights": 3.0}, 3 * 0.263282),
    "focal_barrier": ({}, {}, 0.056428 - 0.126797),
    "max_margin": ({}, {}, -1.2),
    "gpm": ({}, {}, 0.263282),
    "gpm_regression": ({}, {}, 0.5 * 8.8**2),
}


@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_golden_values(backend, device, name):
    options, call, wanted = GOLDEN[name]
    call = {k: torch.tensor([x], device=device) for k, x in call.items()}
    chosen, rejected = (torch.tensor([x], device=device, requires_grad=True) for x in (1.5, 0.3))
    with rlfast.use_backend(backend):
        out = rlfast.reward_loss(name, **options)(chosen, rejected, **call)
    torch.testing.assert_close(out.loss.item(), wanted, rtol=2e-6, atol=1e-6)
    assert out.metrics["accuracy"].item() == 1.0
    torch.testing.assert_close(out.metrics["reward_margin"].item(), 1.2, rtol=1e-6, atol=0.0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.loss, (chosen, rejected)))


@pytest.mark.parametrize("dtype", ("f32", "bf16", "f16"))
@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_every_dtype(backend, device, name, dtype):
    """The loss and its gradients, against the oracle's backend in float64."""
    rng, row, found = torch.Generator().manual_seed(0), rlfast.reward_loss(name), []
    rewards = [(2 * torch.randn(37, generator=rng)).clamp(-4.5, 4.5).to(DTYPES[dtype]) for _ in range(2)]
    given = {"margin": torch.rand(37, generator=rng), "probability": torch.rand(37, generator=rng)}
    given |= {"weights": torch.rand(37, generator=rng) + 0.5}
    given = {k: x.to(DTYPES[dtype]) for k, x in given.items()}
    needs = ["probability" if need == "extra" else need for need in row.objective.needs]
    for one, to in ((backend, None), ("reference", torch.float64), ("reference", torch.float32)):
        place = device if one == backend else "cpu"
        leaves = [x.to(place, to or x.dtype).clone().requires_grad_() for x in rewards]
        rest = {k: given[k].to(place, to or DTYPES[dtype]) for k in needs}
        with rlfast.use_backend(one):
            loss = row(*leaves, **rest).loss
        found.append([x.detach().cpu() for x in (loss, *torch.autograd.grad(loss, leaves))])
    losses, *gradients = zip(*found, strict=True)
    assert_value(name, *losses)
    for side, of in zip(("chosen", "rejected"), gradients, strict=True):
        assert_gradient(f"gradient of {side}", *of)


def test_the_barrier_has_a_weight():
    chosen, rejected = torch.tensor([1.5]), torch.tensor([0.3])
    found = [rlfast.reward_loss("focal_barrier", barrier=x)(chosen, rejected).loss for x in (0.0, 0.02, 0.04)]
    torch.testing.assert_close(found[2] - found[0], 2 * (found[1] - found[0]))


OPTIONS = {"nll": 1.0, "mean": True, "tail": 0.5, "kl": 0.5, "sort": "pairs", "reference_free": False}
OPTIONS |= {"length_price": 0.1, "reward_mean": True, "score": "power"}


@pytest.mark.parametrize("option", OPTIONS)
def test_what_means_nothing_for_rewards_is_no_option(option):
    with pytest.raises(
        TypeError, match=rf"^{option}: expected an option of bradley_terry: beta, centring, gamma, label"
    ):
        rlfast.reward_loss("bradley_terry", **{option: OPTIONS[option]})


@pytest.mark.parametrize("options", ({"nll": 1.0}, {"sort": "pairs"}, {"tail": 0.5}, {"kl": 1.0}), ids=str)
def test_a_loss_of_responses_is_none_of_rewards(options):
    with pytest.raises(ValueError, match="objective: expected a loss of two scores and nothing else"):
        rlfast.RewardLoss(rlfast.preference_loss("dpo", reference_free=True, **options))
    with pytest.raises(ValueError, match=r"objective: .* got simpo"):
        rlfast.RewardLoss(rlfast.preference_loss("simpo"))


def test_max_margin_counts_wrong_pairs_twice():
    out = rlfast.reward_loss("max_margin", penalty=2.0)(torch.tensor([0.0]), torch.tensor([1.0]))
    assert out.loss.item() == 2.0


def test_centring_is_an_option():
    chosen, rejected = torch.tensor([1.5]), torch.tensor([0.3])
    plain = rlfast.reward_loss("bradley_terry")(chosen, rejected).loss
    centred = rlfast.reward_loss("bradley_terry", centring=0.1)(chosen, rejected).loss
    torch.testing.assert_close(centred, plain + 0.1 * (chosen + rejected).square().sum())
    assert rlfast.reward_loss("centred", centring=0.0)(chosen, rejected).loss == plain


def test_the_general_preference_model_is_antisymmetric():
    torch.manual_seed(0)
    w, l_ = torch.randn(3, 4), torch.randn(3, 4)
    there, zero = rlfast.gpm_scores(w, l_)
    back, _ = rlfast.gpm_scores(l_, w)
    torch.testing.assert_close(there, -back)
    by_hand = (w[:, 0] * l_[:, 1] - w[:, 1] * l_[:, 0] + w[:, 2] * l_[:, 3] - w[:, 3] * l_[:, 2]) / 0.1
    torch.testing.assert_close(there, by_hand)
    assert zero.count_nonzero() == 0
    exact, _ = rlfast.gpm_scores(w.double(), l_.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, there.double())


def test_regressions_under_a_mask():
    predicted = torch.tensor([[1.0, torch.nan], [2.0, 3.0]], requires_grad=True)
    target, mask = torch.tensor([[0.0, torch.nan], [2.0, 1.0]]), torch.tensor([[1, 0], [1, 1]])
    loss = rlfast.attribute_regression_loss(predicted, target, mask)
    torch.testing.assert_close(loss.item(), (1 + 0 + 4) / 3)
    (g,) = torch.autograd.grad(loss, predicted)
    torch.testing.assert_close(g, torch.tensor([[2.0, 0.0], [0.0, 4.0]]) / 3)
    quantiles = rlfast.quantile_loss(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[2.0]]), torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(quantiles.item(), (0.1 * 1 + 0.1 * 1) / 2)
    nll = rlfast.gaussian_reward_loss(torch.tensor([[1.0]]), torch.tensor([[0.5]]), torch.tensor([[3.0]]))
    torch.testing.assert_close(nll, 0.5 * (0.5 + 4 * torch.tensor(-0.5).exp()))
    assert rlfast.attribute_regression_loss(predicted, target, torch.zeros(2, 2)).item() == 0.0


def test_process_and_generative_rewards():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 7, requires_grad=True), torch.tensor([[-100, 2, -100], [5, -100, 2]])
    loss, metrics = rlfast.process_reward_loss(logits, labels)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(wanted, logits)[0])
    right = (logits.argmax(-1) == labels)[labels != -100].float().mean()
    assert metrics["steps"].item() == 3 and metrics["accuracy"] == right
    verdicts = torch.randn(2, 7)
    loss, rewards = rlfast.generative_reward_loss(verdicts, torch.tensor([True, False]), yes_id=1, no_id=4)
    logp = verdicts.log_softmax(-1)
    torch.testing.assert_close(loss, -(logp[0, 1] + logp[1, 4]) / 2)
    torch.testing.assert_close(rewards, logp[:, 1] - logp[:, 4])


def test_grm_mixes():
    chosen, rejected = torch.tensor([1.5]), torch.tensor([0.3])
    bt = rlfast.reward_loss("bradley_terry")(chosen, rejected).loss
    torch.testing.assert_close(rlfast.grm_loss(chosen, rejected, torch.tensor(2.0)), 0.99 * bt + 0.02)


def test_bad_input_is_named():
    one = torch.zeros(3)
    with pytest.raises(ValueError, match="rejected_rewards: expected 3 responses"):
        rlfast.reward_loss("bradley_terry")(one, torch.zeros(2))
    with pytest.raises(TypeError, match=r"chosen_rewards: expected a torch\.Tensor"):
        rlfast.reward_loss("bradley_terry")([1.0], one)
    with pytest.raises(ValueError, match="probability: expected a tensor: soft_label needs it"):
        rlfast.reward_loss("soft_label")(one, one)
    with pytest.raises(ValueError, match="margin: expected a tensor: margin needs it"):
        rlfast.reward_loss("margin")(one, one)
    with pytest.raises(ValueError, match=r"chosen_rewards: expected shape \[B\], one reward a response, got \(3, 2\)"):
        rlfast.reward_loss("bradley_terry")(torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="probability: expected None: bradley_terry does not read it, got a value"):
        rlfast.reward_loss("bradley_terry")(one, one, probability=one)
    with pytest.raises(ValueError, match=r"probability: expected a float in \[0, 1\] each, got 7"):
        rlfast.reward_loss("soft_label")(one, one, probability=torch.tensor([0.0, 1.0, 7.0]))
    with pytest.raises(ValueError, match=r"gamma: expected a finite float ≥ 0, got -1"):
        rlfast.reward_loss("focal_barrier", gamma=-1.0)
    with pytest.raises(ValueError, match=r"edge, limit: expected edge <= limit, got 6\.0, 5\.0"):
        rlfast.reward_loss("focal_barrier", edge=6.0)
    with pytest.raises(ValueError, match=r"quantiles: expected a float in \(0, 1\) each, got 2"):
        rlfast.quantile_loss(torch.zeros(2, 3, 1), torch.zeros(2, 3), torch.tensor([2.0]))
    with pytest.raises(ValueError, match="name: expected one of bradley_terry"):
        rlfast.reward_loss("bt")
    with pytest.raises(TypeError, match="gamma_: expected an option of focal_barrier"):
        rlfast.reward_loss("focal_barrier", gamma_=1.0)
    with pytest.raises(ValueError, match="target: expected shape"):
        rlfast.attribute_regression_loss(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="alpha: expected a float in"):
        rlfast.grm_loss(one, one, torch.zeros(()), alpha=2.0)
    with pytest.raises(ValueError, match="chosen: expected shape"):
        rlfast.gpm_scores(torch.zeros(2, 3), torch.zeros(2, 3))
