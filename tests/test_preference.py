"""The tables of preference losses: golden values, presets, options, mixtures, statistics, and bad input."""

from __future__ import annotations

import pytest
import torch

import rlfast
from rlfast import PREFERENCES, UNPAIRED
from rlfast import preference_inputs as inputs
from rlfast.ops import pair_loss as pair_op
from rlfast.ops import unpaired_loss as single_op
from rlfast.ops.preference_records import METRICS
from rlfast.preference_presets import PRESETS
from tests.cases import DTYPES
from tests.numerics import assert_gradient, assert_same_bits, assert_value

OP = "pair_loss"

# (S_w, S_l, S_w^ref, S_l^ref), (n_w, n_l), β
FIRST = (-40.0, -55.0, -42.0, -50.0), (20.0, 25.0), 0.1
SECOND = (-31.7, -48.3, -33.1, -44.9), (17.0, 29.0), 0.13
GOLDEN_FIRST = {
    "dpo": ({}, 0.403186),
    "cdpo": ({}, 0.473186),
    "robust": ({}, 0.315686),
    "hinge": ({}, 0.3),
    "ipo": ({}, 4.0),
    "ipo mean": ({"mean": True}, 22.09),
    "exo_pair": ({}, 1.657292),
    "nca_pair": ({}, 1.234247),
    "cpo": ({"nll": 0.0}, 0.201413),
    "bco_pair": ({}, 1.072216),
    "sppo_hard": ({"scale": 1.0}, 9.0),
    "apo_zero": ({}, 0.827707),
    "apo_down": ({}, 0.881646),
    "discopop": ({}, 0.496585),
    "dpo_norm": ({"beta": 5.0}, 0.201413),
    "f_dpo_js": ({}, 0.478632),
    "f_dpo_alpha": ({}, 0.089973),
    "simpo": ({"beta": 2.5, "gamma": 1.4}, 1.241154),
    "alpha_po": ({"beta": 2.5}, 0.535320),
    "orpo": ({"nll": 0.0}, 0.1 * 0.585641),
    "slic_hf": ({"beta": 1.0}, 4.0),
    "rpo_backward_kl": ({"margin": 1.0}, 0.009242),
    "rpo_squared": ({"margin": 1.0}, 0.09),
    "gpo_logistic": ({}, 0.403186),
    "gpo_hinge": ({}, 0.3),
}
# value, ∂/∂S_w, ∂/∂S_l
GOLDEN_SECOND = {
    "dpo": ({}, 0.429049, -0.045353, 0.045353),
    "cdpo": ({}, 0.491449, -0.032353, 0.032353),
    "robust": ({}, 0.351049, -0.061603, 0.061603),
    "hinge": ({}, 0.376, -0.13, 0.13),
    "ipo": ({}, 0.909822, 1.907692, -1.907692),
    "ipo mean": ({"mean": True}, 13.297396, -0.429007, 0.251487),
    "dpo_norm": ({}, 0.680258, -0.003774, 0.002212),
    "exo_pair": ({}, 1.763830, -0.185535, 0.185535),
    "nca_pair": ({}, 1.248609, -0.023652, 0.025432),
    "bco_pair": ({}, 1.102653, -0.059101, 0.050864),
    "sppo_hard": ({"scale": 1.0}, 6.182722, -4.892308, 0.892308),
    "apo_zero": ({}, 0.845890, -0.032232, 0.030963),
    "apo_down": ({}, 0.894247, 0.002701, 0.029531),
    "discopop": ({}, 0.535797, -0.069652, 0.069652),
    "f_dpo_js": ({}, 0.505984, -0.010212, 0.049954),
    "f_dpo_alpha": ({}, 0.242272, -0.013890, 0.153109),
    "f_dpo_forward_kl": ({}, 0.020782, -0.000659, 0.080116),
    "cpo": ({"nll": 0.0}, 0.109353, -0.013466, 0.013466),
    "simpo": ({"beta": 2.5, "gamma": 1.4}, 2.037623, -0.127891, 0.074971),
    "alpha_po": ({"beta": 2.5}, 1.520847, -0.183174, 0.102162),
    "orpo": ({"nll": 0.0}, 0.13 * 0.820577, 0.13 * -0.038969, 0.13 * 0.023806),
    "r_dpo": ({}, 0.388800, -0.041877, 0.041877),
    "cal_dpo": ({}, 3.099557, -2.454316, 0.454316),
    "rpo_backward_kl": ({"margin": 1.3}, 0.043265, -0.017512, 0.017512),
    "rpo_forward_kl": ({"margin": 1.3}, 0.047797, -0.019963, 0.019963),
    "gpo_exponential": ({}, 0.535797, -0.069654, 0.069654),
    "gpo_truncated_quadratic": ({}, 0.141376, -0.097760, 0.097760),
    "gpo_savage": ({}, 0.121712, -0.020605, 0.020605),
    "margin_dpo": ({"margin": 0.7}, 0.731869, -0.067469, 0.067469),
    "slic_hf": ({"beta": 1.0}, 3.17, -0.1, 0.0),
}
SIDES = ("chosen", "rejected")
LENGTHS_OF_MEANS = {"orpo": (-2.0, -2.2), "simpo": (-2.0, -2.2), "alpha_po": (-2.0, -2.2)}


def near(got, wanted: float) -> None:
    """To the digits that a golden value has."""
    assert abs(got.item() - wanted) <= 6e-7 + 2e-6 * abs(wanted), f"got {got.item()!r}, wanted {wanted!r}"


def value(name: str, options: dict, point, backend: str, device: str):
    """(loss, ∂/∂S_w, ∂/∂S_l) of one row at one point, in float64 where the backend has it."""
    (s_w, s_l, ref_w, ref_l), (n_w, n_l), beta = point
    options = {"beta": beta} | options
    margin = options.pop("margin", None)
    dtype = torch.float64 if backend in ("reference", "torch") else torch.float32
    made = [torch.tensor([x], dtype=dtype, device=device) for x in (s_w, s_l, ref_w, ref_l, n_w, n_l)]
    leaves = [x.requires_grad_() for x in made[:2]]
    margin = None if margin is None else torch.tensor([margin], dtype=dtype, device=device)
    with rlfast.use_backend(backend):
        out = rlfast.preference_loss(name.split()[0], **options)(
            *leaves, ref_chosen_logps=made[2], ref_rejected_logps=made[3], chosen_lengths=made[4],
            rejected_lengths=made[5], margin=margin,
        )  # fmt: skip
    return (out.loss, *torch.autograd.grad(out.loss, leaves))


def loose(got, wanted: float, backend: str) -> None:
    """A golden value in float32: the sums are rounded by 2⁻²⁴ of themselves, and differences of them by more."""
    if backend in ("reference", "torch"):
        near(got, wanted)
    else:
        assert abs(got.item() - wanted) <= 2e-5 * max(1.0, abs(wanted)), f"got {got.item()!r}, wanted {wanted!r}"


@pytest.mark.parametrize("name", GOLDEN_FIRST)
def test_golden_values(backend, device, name):
    options, wanted = GOLDEN_FIRST[name]
    point = FIRST
    if name in LENGTHS_OF_MEANS:  # the golden value is at means of its own
        point = ((*LENGTHS_OF_MEANS[name], 0.0, 0.0), (1.0, 1.0), 0.1)
    loose(value(name, options, point, backend, device)[0], wanted, backend)


@pytest.mark.parametrize("name", GOLDEN_SECOND)
def test_golden_values_and_gradients(backend, device, name):
    options, *wanted = GOLDEN_SECOND[name]
    for got, w in zip(value(name, options, SECOND, backend, device), wanted, strict=True):
        loose(got, w, backend)


def test_golden_dpop(backend, device):
    point = (-45.0, -60.0, -42.0, -50.0), (1.0, 1.0), 0.1
    loose(value("dpop", {}, point, backend, device)[0], 14.300001, backend)
    loose(value("dpop_outside", {}, point, backend, device)[0], 150.403186, backend)


def single(name: str, score: float, desirable: bool, backend: str, device: str, **call):
    """(loss, ∂/∂S) of one response."""
    dtype = torch.float64 if backend in ("reference", "torch") else torch.float32
    logps = torch.tensor([score], dtype=dtype, device=device, requires_grad=True)
    options = {k: call.pop(k) for k in ("beta", "tau") if k in call}
    call = {k: torch.tensor([x], dtype=dtype, device=device) if k == "extra" else x for k, x in call.items()}
    with rlfast.use_backend(backend):
        out = rlfast.unpaired_loss(name, reference_free=True, **options)(
            logps, torch.tensor([desirable], device=device), **call
        )
    return out.loss, *torch.autograd.grad(out.loss, logps)


def test_golden_unpaired(backend, device):
    loose(single("kto", 2.0, True, backend, device, shared=0.5)[0], 0.462570, backend)
    loose(single("kto", -5.0, False, backend, device, shared=0.5)[0], 0.365864, backend)
    for score, good, wanted in ((1.4, True, (0.467546, -0.032363)), (-3.4, False, (0.378952, 0.030595))):
        for got, w in zip(single("kto", score, good, backend, device, beta=0.13, shared=0.4), wanted, strict=True):
            loose(got, w, backend)
    loose(single("npo", -5.0, False, backend, device)[0], 9.481540, backend)
    for got, w in zip(single("npo", -3.4, False, backend, device, beta=0.13), (7.636484, 0.782529), strict=True):
        loose(got, w, backend)
    for score, good, wanted in ((1.4, True, (0.5453749 + 0.467546, 0.0)), (-3.4, False, (0.378952, 0.030595))):
        got = single("apo_down", score, good, backend, device, beta=0.13, shared=0.4)
        loose(got[0], wanted[0], backend)
        slope = 0.13 * (0.5453749 * 0.4546251) - 0.032363 if good else wanted[1]
        loose(got[1], slope, backend)
    for got, w in zip(single("dro_v", 2.0, True, backend, device, tau=0.5, extra=3.0), (2.0, -1.0), strict=True):
        loose(got, w, backend)


def test_bco_is_around_its_delta(backend, device):
    (s_w, s_l, ref_w, ref_l), _, beta = FIRST
    made = [torch.tensor([x], device=device) for x in (s_w, s_l, ref_w, ref_l)]
    with rlfast.use_backend(backend):
        out = rlfast.preference_loss("bco", beta=beta)(
            *made[:2], ref_chosen_logps=made[2], ref_rejected_logps=made[3], shared=0.25
        )
    wanted = torch.nn.functional.softplus(torch.tensor([-(0.2 - 0.25), -0.5 - 0.25])).sum()
    loose(out.loss, wanted.item(), "cpu")


def sums(pairs: int = 6, seed: int = 0) -> dict:
    """Sums of log-probs of a batch, and what belongs to them."""
    rng = torch.Generator().manual_seed(seed)
    ref = [-50 * torch.rand(pairs, generator=rng) - 5 for _ in range(2)]
    ours = [x + 3 * torch.randn(pairs, generator=rng) for x in ref]
    lengths = [torch.randint(5, 40, (pairs,), generator=rng) for _ in range(2)]
    return {
        "chosen_logps": ours[0], "rejected_logps": ours[1], "ref_chosen_logps": ref[0], "ref_rejected_logps": ref[1],
        "chosen_lengths": lengths[0], "rejected_lengths": lengths[1],
    }  # fmt: skip


def needed(row, pairs: int = 6) -> dict:
    """What a row cannot do without."""
    given = {"margin": torch.ones(pairs), "extra": torch.ones(pairs), "weights": torch.ones(pairs), "shared": 0.3}
    found = {name: given[name] for name in row.needs}
    if row.kl:
        found |= {"chosen_kl": torch.rand(pairs), "rejected_kl": torch.rand(pairs)}
    return found


@pytest.mark.parametrize("narrow", ("f32", "bf16", "f16"))
@pytest.mark.parametrize("name", PREFERENCES)
def test_every_row_on_every_backend(backend, device, name, narrow):
    """A row of the table runs, and agrees with the oracle's backend; so do its gradients."""
    row = PREFERENCES[name]
    torch.manual_seed(0)
    given = sums() | needed(row)
    if row.tail != 1.0:  # which has tokens alone
        del given["chosen_lengths"], given["rejected_lengths"]
        given = {k: x.unsqueeze(1) * torch.rand(6, 5) if k.endswith("_logps") else x for k, x in given.items()}
        given |= {f"{side}_mask": torch.arange(5) < torch.randint(1, 6, (6, 1)) for side in ("chosen", "rejected")}
    for key, x in given.items():
        if key.endswith(("_logps", "_kl")):
            given[key] = x.to(DTYPES[narrow])
    found = []
    for one, dtype in ((backend, None), ("reference", torch.float64), ("reference", torch.float32)):
        call = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in given.items()}
        call = {k: x.to(dtype) if dtype and isinstance(x, torch.Tensor) else x for k, x in call.items()}
        leaves = {k: call[k].detach().clone().requires_grad_() for k in ("chosen_logps", "rejected_logps")}
        with rlfast.use_backend(one):
            loss = row(**call | leaves).loss
        found.append([loss.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(loss, list(leaves.values())))])
    losses, *gradients = zip(*found, strict=True)
    assert losses[0].isfinite()
    assert_value(name, *losses)
    for side, of in zip(("chosen", "rejected"), gradients, strict=True):
        assert_gradient(f"gradient of {side}", *of)


def test_a_likelihood_beside_losses_that_sort_or_share(backend, device):
    """Of the responses and not of their sorted sums; its mean length is not BCO's δ."""
    given = {k: x.to(device).requires_grad_(k == "chosen_logps") for k, x in sums().items()}
    logp, n = given["chosen_logps"].detach().cpu().double(), given["chosen_lengths"].cpu().double()
    for options, plain, likelihood in (
        ({"nll": 0.5}, "aot", logp / n),
        ({"nll": 0.5, "nll_reduce": "batch"}, "bco_pair", logp / n.mean()),
        ({"nll": 0.5, "nll_reduce": "batch"}, "aot_unpaired", logp / n.mean()),
    ):
        row, weights = rlfast.preference_loss(plain, **options), torch.ones(6)
        fields = {"num_items": 7.0, "per_pair": True}
        if not row.sort:
            weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 3.0])
            fields |= {"weights": weights.to(device), "shared": 0.25}
        with rlfast.use_backend(backend):
            out, bare = row(**given, **fields), row.with_options(nll=0.0)(**given, **fields)
            slopes = [torch.autograd.grad(x.loss, given["chosen_logps"])[0].cpu().double() for x in (out, bare)]
        added = -0.5 * weights.double() * likelihood
        truth = bare.loss.detach().cpu().double() + added.sum() / 7
        assert_value(plain, out.loss.detach().cpu(), truth, truth.float(), truth.abs() + added.abs().sum() / 7)
        assert_value("metric", out.metrics["loss"].cpu(), truth, truth.float(), truth.abs() + added.abs().sum() / 7)
        sizes = bare.losses.cpu().double().abs() + added.abs()
        assert_value("losses", out.losses.cpu(), bare.losses.cpu().double() + added, bare.losses.cpu(), sizes)
        wanted = slopes[1] + added / logp / 7
        assert_value("slope", slopes[0].float(), wanted, wanted.float(), slopes[1].abs() + (added / logp / 7).abs())


def test_mpo_of_trl():
    """Its likelihood is of the batch, beside BCO with a δ of 0."""
    given = sums()
    d = [given[f"{s}_logps"] - given[f"ref_{s}_logps"] for s in ("chosen", "rejected")]
    softplus = torch.nn.functional.softplus
    row = rlfast.preference_loss("mpo", like="trl")
    beta = row.parts[0].hyper.get("beta", 0.1)
    dpo, bco = softplus(-beta * (d[0] - d[1])), softplus(-beta * d[0]) + softplus(beta * d[1])
    nll = -given["chosen_logps"].sum() / given["chosen_lengths"].sum()
    weights = [part.weight for part in row.parts]
    expected = weights[0] * dpo.mean() + weights[1] * bco.mean() + row.nll * nll
    torch.testing.assert_close(row(**given).loss, expected)


@pytest.mark.parametrize("form", ("padded", "packed", "rows", "packed_rows"))
@pytest.mark.parametrize("name", ("aot", "aot_unpaired"))
def test_a_tail_of_sorted_sums(name, form):
    """The tokens beyond the shorter response's length have their weight before the sums are sorted."""
    rng = torch.Generator().manual_seed(4)
    ours, ref = (-torch.rand(8, 6, generator=rng) for _ in range(2))
    lengths = torch.tensor([6, 2, 4, 5, 3, 6, 1, 6])
    mask = torch.arange(6) < lengths[:, None]
    shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
    scale = torch.where(torch.arange(6) < shorter[:, None], 1.0, 0.25) * mask
    sides = [(x * scale).sum(-1).chunk(2) for x in (ours, ref)]
    row = rlfast.preference_loss(name, tail=0.25)
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    expected = row.with_options(tail=1.0)(**dict(zip(names, (*sides[0], *sides[1]), strict=True))).loss
    ends = torch.arange(0, 49, 6)
    if form == "rows":
        out = row.rows(ours, ref_logps=ref, mask=mask)
    elif form == "packed_rows":
        out = row.rows(ours.flatten(), ref_logps=ref.flatten(), mask=mask.flatten(), cu_seqlens=ends)
    else:
        halves = [x.chunk(2) for x in (ours, ref, mask)]
        flat = [[y.flatten() if form == "packed" else y for y in x] for x in halves]
        given = dict(zip(names, (*flat[0], *flat[1]), strict=True))
        given |= {"chosen_mask": flat[2][0], "rejected_mask": flat[2][1]}
        if form == "packed":
            given |= {"chosen_cu_seqlens": ends[:5], "rejected_cu_seqlens": ends[:5]}
        out = row(**given)
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("name", ("ipo", "simpo", "alpha_po", "dpo_norm"))
def test_a_response_without_tokens_has_a_mean_of_0(backend, device, name):
    row = rlfast.preference_loss(name, **({"mean": True} if name == "ipo" else {}))
    logps = torch.full((4, 3), -1.5, device=device).requires_grad_()
    mask = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 1, 0], [0, 0, 0]], device=device)
    ref = torch.full((4, 3), -1.0, device=device)
    with rlfast.use_backend(backend):
        out = row.rows(logps, ref_logps=ref, mask=mask, per_pair=True)
        (g,) = torch.autograd.grad(out.loss, logps)
    assert out.loss.isfinite() and g.isfinite().all() and not g[1].any()
    with rlfast.use_backend("reference"):
        both = row(
            torch.zeros(1), torch.zeros(1), ref_chosen_logps=torch.zeros(1), ref_rejected_logps=torch.zeros(1),
            chosen_lengths=torch.ones(1), rejected_lengths=torch.ones(1),
        )  # fmt: skip
    assert_value("two of them", out.losses[1:].cpu(), both.loss.double().view(1), both.loss.view(1))


@pytest.mark.parametrize("reduce", ("mean", "sum", "batch"))
def test_the_likelihood_is_over_tokens(backend, device, reduce):
    """A mean or a sum of each response, and then the mean of the pairs; or the mean of all chosen tokens."""
    given = {k: x.to(device) for k, x in sums().items()}
    row = rlfast.preference_loss("dpo", nll=0.5, nll_reduce=reduce)
    with rlfast.use_backend(backend):
        losses = [one(**given).loss.cpu() for one in (row, row.with_options(nll=0.0))]
    logp, n = given["chosen_logps"].cpu().double(), given["chosen_lengths"].cpu().double()
    likelihood = {"mean": (logp / n).mean(), "sum": logp.mean(), "batch": logp.sum() / n.sum()}[reduce]
    truth = losses[1].double() - 0.5 * likelihood
    assert_value("loss", losses[0], truth, truth.float(), truth.abs() + likelihood.abs())


@pytest.mark.parametrize("like", PRESETS)
def test_presets_name_rows(like):
    for name in PRESETS[like]:
        rlfast.preference_loss(name, like=like)


def test_a_mixture_is_the_sum_of_its_rows():
    given = sums()
    mixed = rlfast.preference_loss({"dpo": 0.8, "bco_pair": 0.2, "nll": 1.0}, beta=0.2)(**given).loss
    parts = [rlfast.preference_loss(name, beta=0.2)(**given).loss for name in ("dpo", "bco_pair")]
    nll = -(given["chosen_logps"] / given["chosen_lengths"]).mean()
    torch.testing.assert_close(mixed, 0.8 * parts[0] + 0.2 * parts[1] + nll)
    torch.testing.assert_close(rlfast.preference_loss("mpo", beta=0.2)(**given).loss, mixed)


@pytest.mark.parametrize("name", ("tdpo1", "tdpo2"))
@pytest.mark.parametrize("form", ("sums", "padded", "packed"))
def test_tdpo_of_both_halves_in_one(name, form):
    """The same losses and gradients as from the two sides apart."""
    rng = torch.Generator().manual_seed(2)
    shape = (6,) if form == "sums" else (6, 4)
    fields = {k: -torch.rand(shape, generator=rng) for k in ("logps", "ref_logps", "kl")}
    leaves = {k: fields[k].clone().requires_grad_() for k in ("logps", "kl")}
    halves = {k: x.chunk(2) for k, x in (fields | leaves).items()}
    row, apart = rlfast.preference_loss(name), {}
    for i, side in enumerate(("chosen", "rejected")):
        apart |= {f"{side}_logps": halves["logps"][i], f"ref_{side}_logps": halves["ref_logps"][i]}
        apart[f"{side}_kl"] = halves["kl"][i]
    expected = row(**apart).loss
    rest = {"cu_seqlens": torch.arange(0, 25, 4)} if form == "packed" else {}
    given = {k: x.reshape(-1) if form == "packed" else x for k, x in (fields | leaves).items()}
    got = row.rows(given.pop("logps"), **given, **rest).loss
    for one, other in zip(*(torch.autograd.grad(x, list(leaves.values())) for x in (got, expected)), strict=True):
        assert_same_bits("gradient", one, other)
    assert_same_bits("loss", got.detach(), expected.detach())


def test_tdpo_adds_the_exact_kl():
    """TDPO1: β(Δ − (K_l − K_w)); TDPO2: no gradient through K_w."""
    given = sums()
    kl = [torch.rand(6, requires_grad=True) for _ in range(2)]
    delta = (given["chosen_logps"] - given["ref_chosen_logps"]) - (
        given["rejected_logps"] - given["ref_rejected_logps"]
    )
    one = rlfast.preference_loss("tdpo1")(**given, chosen_kl=kl[0], rejected_kl=kl[1]).loss
    torch.testing.assert_close(one, torch.nn.functional.softplus(-0.1 * (delta - (kl[1] - kl[0]))).mean())
    two = rlfast.preference_loss("tdpo2")(**given, chosen_kl=kl[0], rejected_kl=kl[1]).loss
    wanted = torch.nn.functional.softplus(-0.1 * (delta - 0.5 * (kl[1] - kl[0].detach()))).mean()
    torch.testing.assert_close(two, wanted)
    got, want = (torch.autograd.grad(x, kl, allow_unused=True) for x in (two, wanted))
    assert got[0] is None and want[0] is None
    torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize("form", ("sums", "tokens", "rows"))
@pytest.mark.parametrize("name", ("tdpo1", "tdpo2"))
def test_metrics_rewards_and_likelihood_of_tdpo_are_without_the_kl(backend, device, name, form):
    """Of the log-probs alone: those of DPO."""
    given, kl = sums(), [torch.rand(6) * 30, torch.rand(6) * 30]
    given = {k: x.to(device) for k, x in given.items()}
    if form == "tokens":
        given = {k: torch.stack((x / 4, x * 3 / 4), 1) for k, x in given.items() if "lengths" not in k}
        kl = [torch.stack((x, x), 1) for x in kl]
    kl = dict(zip(("chosen_kl", "rejected_kl"), (x.to(device) for x in kl), strict=True))
    found = []
    for row, rest in ((name, kl), ("dpo", {})):
        objective = rlfast.preference_loss(row, nll=0.5)
        call = given | rest
        if form == "rows":
            parts = {"logps": "{}_logps", "ref_logps": "ref_{}_logps", "lengths": "{}_lengths", "kl": "{}_kl"}
            both = {k: [call.get(of.format(s)) for s in ("chosen", "rejected")] for k, of in parts.items()}
            call = {k: torch.cat(x) for k, x in both.items() if x[0] is not None}
        with rlfast.use_backend(backend):
            out = (objective.rows if form == "rows" else objective)(**call, per_pair=True)
            bare = (objective.with_options(nll=0.0).rows if form == "rows" else objective.with_options(nll=0.0))(**call)
        found.append((out, out.loss - bare.loss))
    (out, likelihood), (dpo, plain) = found
    for field in ("chosen_rewards", "rejected_rewards"):
        assert_same_bits(field, getattr(out, field), getattr(dpo, field))
    for metric in set(METRICS) - {"loss"}:
        assert_same_bits(metric, out.metrics[metric], dpo.metrics[metric])
    torch.testing.assert_close(out.metrics["loss"], out.loss)
    torch.testing.assert_close(likelihood, plain)


@pytest.mark.parametrize("name", ("aot", "aot_unpaired"))
def test_optimal_transport_sorts_the_batch(name):
    given = sums(9)
    leaves = [given.pop(k).requires_grad_() for k in ("chosen_logps", "rejected_logps")]
    w, l_ = leaves
    if name == "aot":
        x = (w - l_).sort().values - (given["ref_chosen_logps"] - given["ref_rejected_logps"]).sort().values
    else:
        x = (w - given["ref_chosen_logps"]).sort().values - (l_ - given["ref_rejected_logps"]).sort().values
    wanted = torch.nn.functional.softplus(-0.1 * x).mean()
    got = rlfast.preference_loss(name)(*leaves, **given).loss
    torch.testing.assert_close(got, wanted)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_the_likelihood_may_be_the_callers():
    """ORPO in TRL has it over prompt and response."""
    given, nll = sums(), torch.tensor(2.5, requires_grad=True)
    row = rlfast.preference_loss("orpo", like="trl")
    given |= {"chosen_logps": -given["chosen_logps"].abs(), "rejected_logps": -given["rejected_logps"].abs()}
    out, without = row(**given, nll=nll).loss, row.with_options(nll=0.0)(**given).loss
    torch.testing.assert_close(out, without + 2.5)
    assert torch.autograd.grad(out, nll)[0].item() == 1.0


def test_metrics():
    given = sums()
    out = rlfast.preference_loss("dpo", beta=0.2)(**given, per_pair=True)
    w = 0.2 * (given["chosen_logps"] - given["ref_chosen_logps"])
    l_ = 0.2 * (given["rejected_logps"] - given["ref_rejected_logps"])
    torch.testing.assert_close(out.chosen_rewards, w)
    torch.testing.assert_close(out.metrics["accuracy"], (w > l_).float().mean())
    torch.testing.assert_close(out.metrics["reward_margin"], (w - l_).mean())
    torch.testing.assert_close(out.losses.mean(), out.loss)
    with pytest.raises(KeyError, match="reward_margin"):
        out.metrics["margin"]


def test_the_weight_of_a_part_is_an_option(backend, device):
    """ORPO's β, of its reward too, XPO's α, RPO's η and β; under a trainer's name as well."""
    given = {k: x.to(device) for k, x in sums().items()}
    s_w, s_l = given["chosen_logps"], given["rejected_logps"]
    with rlfast.use_backend(backend):

        def loss(name, extra=None, **options):
            return rlfast.preference_loss(name, **options)(**given, extra=extra, per_pair=True)

        for like in (None, "trl", "liger"):
            once, twice = (loss("orpo", like=like, beta=beta, nll=0.0) for beta in (0.1, 0.2))
            torch.testing.assert_close(twice.loss, 2 * once.loss)
            torch.testing.assert_close(twice.chosen_rewards, 0.2 * s_w / given["chosen_lengths"])
        ones = torch.ones_like(s_w)
        none, some = (loss("xpo", ones, alpha=alpha).loss for alpha in (0.0, 0.01))
        torch.testing.assert_close(some, none + 0.01 * s_w.mean())
        none, some = (loss("rpo", beta=0.2, eta=eta).loss for eta in (0.0, 0.01))
        torch.testing.assert_close(some, none - 0.2 * 0.01 * s_w.mean())
        torch.testing.assert_close(loss("slic_hf", nll=0.2).loss, torch.relu(1 - s_w + s_l).mean() - 0.2 * s_w.mean())


BAD = {
    "rejected_logps: expected 6 responses": {
        "rejected_logps": torch.zeros(5),
        "ref_rejected_logps": torch.zeros(5),
        "rejected_lengths": torch.ones(5),
    },
    "ref_chosen_logps: expected a tensor: dpo_norm needs it": {"ref_chosen_logps": None},
    "ref_chosen_logps: expected shape (6,) like chosen_logps": {"ref_chosen_logps": torch.zeros(5)},
    "chosen_lengths: expected a tensor [B]: dpo_norm divides by it": {"chosen_lengths": None},
    "rejected_lengths: expected shape (6,)": {"rejected_lengths": torch.ones(3)},
    "margin: expected shape (6,), one a pair": {"margin": torch.zeros(2)},
    "weights: expected shape (6,), one a pair": {"weights": torch.zeros(6, 1)},
    "chosen_mask: expected None beside sums": {"chosen_mask": torch.ones(6)},
    "ref_rejected_logps: expected a tensor that needs no gradient": {
        "ref_rejected_logps": torch.zeros(6, requires_grad=True)
    },
    "num_items: expected a finite float > 0": {"num_items": 0},
    "chosen_logps: expected shape [B] of sums": {"chosen_logps": torch.zeros(1, 2, 3)},
}


@pytest.mark.parametrize("said", BAD)
def test_bad_input_is_named(said):
    with pytest.raises(ValueError, match=r"^" + said.replace("[", r"\[").replace("(", r"\(").replace(")", r"\)")):
        rlfast.preference_loss("dpo_norm")(**sums() | BAD[said])


def test_wrong_types_are_named():
    with pytest.raises(TypeError, match="chosen_logps: expected dtype"):
        rlfast.preference_loss("dpo")(**sums() | {"chosen_logps": torch.zeros(6, dtype=torch.int64)})
    with pytest.raises(ValueError, match="logps: expected an even number of responses"):
        rlfast.preference_loss("dpo", reference_free=True).rows(torch.zeros(5))
    with pytest.raises(TypeError, match="desirable: expected dtype bool"):
        rlfast.unpaired_loss("npo", reference_free=True)(torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match="shared: expected a tensor: kto needs it"):
        rlfast.unpaired_loss("kto", reference_free=True)(torch.zeros(3), torch.ones(3, dtype=torch.bool))


def test_an_unknown_loss_lists_the_known():
    with pytest.raises(ValueError, match="name: expected one of dpo, "):
        rlfast.preference_loss("dp0")
    with pytest.raises(ValueError, match="like: expected one of 'trl', 'liger'"):
        rlfast.preference_loss("dpo", like="verl")
    with pytest.raises(ValueError, match=r"name: expected one of .* for like='liger', got 'ipo'"):
        rlfast.preference_loss("ipo", like="liger")
    with pytest.raises(TypeError, match=r"eps: expected an option of dpo: .*label_smoothing"):
        rlfast.preference_loss("dpo", eps=0.1)
    with pytest.raises(ValueError, match="name: expected one of kto"):
        rlfast.unpaired_loss("dpo")
    with pytest.raises(ValueError, match=r"name: expected one of .* for like='trl', got 'xpo'"):
        rlfast.preference_loss("xpo", like="trl")
    with pytest.raises(ValueError, match=r"name: expected one of kto, apo_zero for like='trl', got 'bco'"):
        rlfast.unpaired_loss("bco", like="trl")
    with pytest.raises(ValueError, match="name: expected rows of one sort"):
        rlfast.preference_loss({"dpo": 1.0, "aot": 1.0})


def test_a_mixture_has_one_kind_of_likelihood():
    """Whichever row comes first."""
    given = sums()
    losses = [
        rlfast.preference_loss(dict.fromkeys(order, 1.0), like="trl")(**given).loss
        for order in (("dpo", "irpo"), ("irpo", "dpo"))
    ]
    torch.testing.assert_close(*losses)
    mpo = {"dpo": 0.8, "bco_pair": 0.2, "nll": 1.0}
    row = rlfast.preference_loss("mpo", like="trl")
    torch.testing.assert_close(rlfast.preference_loss(mpo, like="trl")(**given).loss, row(**given).loss)


def test_cpo_ipo_of_trl_is_of_means():
    given, row = sums(), rlfast.preference_loss("cpo_ipo", like="trl", nll=0.0)
    means = [given[f"{s}_logps"] / given[f"{s}_lengths"] for s in ("chosen", "rejected")]
    beta = row.parts[0].hyper.get("beta", 0.1)
    torch.testing.assert_close(row(**given).loss, ((means[0] - means[1] - 0.5 / beta) ** 2).mean())


def test_running_statistics_survive_a_checkpoint():
    delta = rlfast.RunningDelta()
    delta.update(torch.tensor([1.0, 3.0]), torch.tensor([0.0]))
    again = rlfast.RunningDelta()
    again.load_state_dict(delta.state_dict())
    for one in (delta, again):
        one.update(torch.tensor([5.0]), torch.tensor([1.0]))
        assert one.value.item() == 2.0
    betas = rlfast.DynamicBeta(momentum=0.5, filtered=0.25)
    factor, keep = betas.update(torch.tensor([0.0, 1.0, 2.0, 9.0]), beta=0.1)
    assert keep.tolist() == [1.0, 1.0, 1.0, 0.0] and betas.mean.item() == 3.0
    torch.testing.assert_close(factor, 1 + 0.6 * torch.tensor([-3.0, -2.0, -1.0, 6.0]).clamp(min=(0.01 - 1) / 0.6))
    fresh = rlfast.DynamicBeta(momentum=0.5, filtered=0.25)
    fresh.load_state_dict(betas.state_dict())
    for one in (betas, fresh):
        one.update(torch.tensor([1.0, 1.0]), beta=0.1)
        assert one.mean.item() == 2.0


def test_kto_takes_its_reference_point_from_mismatched_pairs():
    z = rlfast.kto_reference_point(torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -4.0]))
    assert z.item() == 1.5 and rlfast.kto_reference_point(torch.tensor([-3.0]), torch.tensor([-2.0])).item() == 0.0
    logps, good = torch.tensor([2.0, -5.0]), torch.tensor([True, False])
    kto = rlfast.unpaired_loss("kto", reference_free=True)
    kto_ = rlfast.UNPAIRED["kto"].with_options(reference_free=True)
    given = kto_(logps, good, kl_logps=torch.tensor([-1.0, -2.0]), ref_kl_logps=torch.tensor([-2.0, -4.0])).loss
    assert given == kto(logps, good, shared=1.5).loss


def test_weights_of_wpo_and_bco():
    logps, squares = torch.full((2, 3), -1.0), torch.full((2, 3), -2.0)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    torch.testing.assert_close(rlfast.wpo_weights(logps, squares, mask), torch.tensor([1.0, 0.0]).exp())
    assert rlfast.wpo_weights(logps, squares, mask, most=1.0).max() == 1.0
    assert rlfast.udm_weights(torch.tensor([0.0, 0.5, 0.999])).tolist() == [0.5, 1.0, 10.0]
    assert rlfast.udm_weights(torch.tensor([0.75]), low=0.0, high=torch.inf).tolist() == [3.0]


def test_every_row_has_an_arxiv_id():
    for row in (*PREFERENCES.values(), *UNPAIRED.values()):
        assert row.paper.count(".") == 1 and len(row.paper) == 10, row.name


def test_an_option_goes_to_one_place():
    """No hyper-parameter of a link has the name of one of a score."""
    from rlfast.kernels.formulas import PAIRS, SCORES, SINGLES

    of_scores = {name for f in SCORES.values() for name in f.hyper._fields} - {"unused"}
    pairs = {name for row in PREFERENCES.values() for p in row.parts for name in PAIRS[p.link].hyper._fields}
    singles = {name for f in SINGLES.values() for name in f.hyper._fields}
    used = {p.score for row in PREFERENCES.values() for p in row.parts}
    assert of_scores == {"alpha"} and {"power", "alpha_divergence"} <= used
    for row in PREFERENCES.values():
        for part in row.parts:
            shared = set(SCORES[part.score].hyper._fields) & set(PAIRS[part.link].hyper._fields) - {"unused"}
            assert not shared, row.name
    assert not of_scores & singles and "alpha" in pairs  # D²O's, whose score has none
    assert rlfast.preference_loss("f_dpo_alpha", alpha=0.25).parts[0].score_hyper == {"alpha": 0.25}


@pytest.mark.unpoisoned
@pytest.mark.backends("torch", "cpu")
@pytest.mark.parametrize("form", ("sums", "padded", "rows"))
def test_opcheck(backend, device, form):
    row, shape = rlfast.preference_loss("dpo"), (4,) if form == "sums" else (4, 3)
    fields = [-torch.rand(shape) for _ in range(4)]
    mask = None if form == "sums" else torch.rand(shape) < 0.8
    sides = [inputs.Given(fields[i].requires_grad_(), fields[i + 2], None, mask, None, None) for i in (0, 1)]
    rest = inputs.PairGiven(torch.rand(2 if form == "rows" else 4), None, 0.5, None, 7.0)
    sides[1], names = (None, (inputs.ROWS,)) if form == "rows" else (sides[1], inputs.SIDES)
    with_nll, _, lengths, referenced, _ = row.prepared
    args = (*inputs.checked(tuple(sides), names, rest, row, lengths, referenced), *with_nll, [1.0, 1.0], 0)
    torch.library.opcheck(pair_op.op, (*args, [True, form != "rows", True], backend))


@pytest.mark.unpoisoned
@pytest.mark.backends("torch", "cpu")
@pytest.mark.parametrize("form", ("sums", "padded"))
def test_opcheck_of_single_responses(backend, device, form):
    row, shape = rlfast.unpaired_loss("kto"), (4,) if form == "sums" else (4, 3)
    given = inputs.Given(-torch.rand(shape, requires_grad=True), -torch.rand(shape), None, None, None, None)
    rest = inputs.PairGiven(None, None, 0.5, torch.rand(4), None)
    terms, lengths, referenced, _ = row.prepared
    args = inputs.checked_single(given, torch.tensor([True, False, True, True]), rest, "kto", lengths, referenced)
    torch.library.opcheck(single_op.op, (*args, *terms, [1.0, 1.0], 0, [True, True], backend))


UNREAD = {
    "margin: expected None: exo_pair does not read it": ("exo_pair", {"margin": torch.zeros(6)}),
    "extra: expected None: dpo does not read it": ("dpo", {"extra": torch.zeros(6)}),
    "shared: expected None: dpo does not read it": ("dpo", {"shared": 0.5}),
    "shared: expected None: irpo does not read it": ("irpo", {"shared": 0.5}),  # not even a "batch", whose mean it is
    "weights: expected None: aot does not read it": ("aot", {"weights": torch.ones(6)}),
    "margin: expected None: aot_unpaired does not read it": ("aot_unpaired", {"margin": torch.ones(6)}),
    "chosen_kl: expected None: dpo does not read it": ("dpo", {"chosen_kl": torch.zeros(6)}),
    "shared: expected a tensor that needs no gradient": ("bco", {"shared": torch.zeros((), requires_grad=True)}),
    "chosen_logps: expected tokens, [B, T] or [N] with chosen_cu_seqlens: ld_dpo weighs": ("ld_dpo", {}),
}


@pytest.mark.parametrize("said", UNREAD)
def test_nothing_is_ignored(said):
    """What a loss would not read, or could not do, is an error."""
    name, given = UNREAD[said]
    with pytest.raises(ValueError) as caught:
        rlfast.preference_loss(name, **({"nll_reduce": "batch"} if name == "irpo" else {}))(**sums(), **given)
    assert str(caught.value).startswith(said)
    with pytest.raises(ValueError, match="extra: expected None: kto does not read it"):
        rlfast.unpaired_loss("kto", reference_free=True)(
            torch.zeros(2), torch.tensor([True, False]), shared=0.0, extra=torch.zeros(2)
        )


@pytest.mark.parametrize("name", ("aot", "aot_unpaired"))
def test_metrics_and_rewards_of_sorted_losses_are_the_pairs(backend, device, name):
    given = {k: x.to(device) for k, x in sums().items()}
    with rlfast.use_backend(backend):
        got, dpo = (rlfast.preference_loss(one)(**given, per_pair=True) for one in (name, "dpo"))
    for field in ("chosen_rewards", "rejected_rewards"):
        assert_same_bits(field, getattr(got, field), getattr(dpo, field))
    for metric in set(METRICS) - {"loss"}:
        assert_same_bits(metric, got.metrics[metric], dpo.metrics[metric])
    torch.testing.assert_close(got.metrics["loss"], got.loss)


def test_exponents_at_which_a_score_is_another(backend, device):
    """AlphaPO's α = 0 is SimPO; the α-divergence's α = 1 the reverse KL."""
    given = {k: x.to(device) for k, x in sums().items()}
    simpo = {"beta": 2.5, "gamma": 0.5}
    for limit, row in (
        (rlfast.preference_loss("alpha_po", alpha=0.0), rlfast.preference_loss("simpo", **simpo)),
        (rlfast.preference_loss("f_dpo_alpha", alpha=1.0), rlfast.preference_loss("dpo")),
    ):
        found = []
        for one in (limit, row):
            leaves = [given[f"{side}_logps"].clone().requires_grad_() for side in ("chosen", "rejected")]
            call = given | dict(zip(("chosen_logps", "rejected_logps"), leaves, strict=True))
            with rlfast.use_backend(backend):
                loss = one(**call).loss
            found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
        for got, wanted in zip(*found, strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("epsilon", (0.0, 1.0))
def test_labels_that_are_surely_right_or_wrong(backend, device, epsilon):
    """ε at its bounds: the loss of the pair, or of the pair turned round."""
    given = {k: x.to(device) for k, x in sums().items()}
    turned = {k: given[k.replace(a, "?").replace(b, a).replace("?", b)] for k in given for a, b in (SIDES,)}
    with rlfast.use_backend(backend):
        got = rlfast.preference_loss("cdpo", label_smoothing=epsilon)(**given).loss
        wanted = rlfast.preference_loss("dpo")(**(turned if epsilon else given)).loss
    torch.testing.assert_close(got, wanted)


def test_a_batch_without_pairs_leaves_the_statistics():
    betas = rlfast.DynamicBeta()
    betas.update(torch.tensor([0.5, 1.5]), beta=0.1)
    before = betas.state_dict()
    factor, keep = betas.update(torch.zeros(0), beta=0.1)
    assert factor.shape == keep.shape == (0,) and betas.state_dict() == before


def test_pairs_that_stay_may_be_drawn():
    """As β-DPO's authors do: as many, the improbable more rarely."""
    gaps, stayed = torch.tensor([0.0, 0.1, -0.1, 0.2, 9.0]), torch.zeros(5)
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        _, keep = rlfast.DynamicBeta(filtered=0.2).update(gaps, beta=0.1, generator=draw)
        assert keep.sum() == 4 and set(keep.tolist()) == {0.0, 1.0}
        stayed += keep
    assert stayed[4] < stayed[:4].min() and stayed[:4].min() < 200


@pytest.mark.parametrize("call, message", (
    (lambda: rlfast.preference_loss("dpo")(**sums(), accumulation=0), "accumulation: expected a finite float > 0"),
    (lambda: rlfast.preference_loss("dpo")(**sums(), world_size=-1), "world_size: expected a finite float > 0, got -1"),
    (lambda: rlfast.preference_loss("irpo")(**sums(), nll=torch.ones(3)), "nll: expected a number or a 0-dim tensor"),
    (lambda: rlfast.kto_reference_point(*torch.zeros(2, 3, 4)), "kl_logps: expected shape [K] of sums, got (3, 4)"),
    (lambda: rlfast.wpo_weights(*torch.zeros(2, 3)), "logps: expected shape [B, T] of tokens, got (3,)"),
    (lambda: rlfast.DynamicBeta().update(torch.zeros(2, 3), 0.1), "gaps: expected shape [B], one a pair, got (2, 3)"),
    (lambda: rlfast.udm_weights(torch.tensor([0.5, 1.5])), "desirable_probability: expected a float in [0, 1] each"),
    (lambda: rlfast.udm_weights(torch.zeros(2), low=2.0, high=1.0), "low, high: expected low <= high, got 2.0, 1.0"),
    (lambda: rlfast.preference_loss("dpo", nll_reduce="tokens"), "nll_reduce: expected one of 'mean', 'sum'"),
    (lambda: rlfast.preference_loss({"slic_hf": 1.0, "irpo": 1.0}), "name: expected likelihoods of one nll_reduce"),
    (lambda: rlfast.preference_loss("ipo", beta=0.0), "beta: expected a float > 0, from 1e-30 to 1e+30, got 0.0"),
    (lambda: rlfast.preference_loss("cdpo", label_smoothing=2.0), "label_smoothing: expected a float in [0, 1], got 2"),
    (lambda: rlfast.preference_loss("robust", label_smoothing=0.5), "label_smoothing: expected a float in [0, ½), got"),
    (lambda: rlfast.preference_loss("exo_pair", label_smoothing=0.0), "label_smoothing: expected a float in (0, 1)"),
    (lambda: rlfast.preference_loss("discopop", tau=0.0), "tau: expected a float > 0"),
    (lambda: rlfast.preference_loss("ld_dpo", tail=1.5), "tail: expected a float in [0, 1], got 1.5"),
    (lambda: rlfast.unpaired_loss("npo", beta=0.0), "beta: expected a float > 0"),
    (lambda: rlfast.unpaired_loss("kto", desirable_weight=-1.0), "desirable_weight: expected a finite float ≥ 0"),
), ids=lambda x: x.split(":")[0] if isinstance(x, str) else "")  # fmt: skip
def test_bad_numbers_are_named(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)
