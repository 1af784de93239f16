"""Every row of the tables with its defaults, and the presets of trainers that are not here, by formulas written out:
what a row adds up, its weights, scores, means, likelihood and numbers.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid, relu

import rlfast
from rlfast import PREFERENCES, UNPAIRED
from rlfast.preference_presets import PRESETS
from rlfast.unpaired import PRESETS as SINGLE_PRESETS

OP = "pair_loss"
# (S_w, S_l, S_w^ref, S_l^ref), (n_w, n_l)
POINTS = {
    "first": ((-40.0, -55.0, -42.0, -50.0), (20.0, 25.0)),
    "second": ((-31.7, -48.3, -33.1, -44.9), (17.0, 29.0)),
    "wrong": ((-44.3, -40.9, -41.6, -42.5), (31.0, 18.0)),
}
FIELDS = {"margin": 0.7, "extra": 0.25, "shared": 0.4, "weights": 1.5}
KL = {"chosen_kl": 5.0, "rejected_kl": 30.0}


def ns(x):
    """−log σ(x)."""
    return -logsigmoid(x)


def kl(a, b):
    """Of the choices whose log-odds are a and b."""
    up, down = torch.sigmoid(a), torch.sigmoid(-a)
    return up * (logsigmoid(a) - logsigmoid(b)) + down * (logsigmoid(-a) - logsigmoid(-b))


def odds(mean):
    """log p/(1 − p)."""
    return mean - torch.log(-torch.expm1(mean))


def bend(mean):
    """AlphaPO's, α = 0.25."""
    return (1 - torch.exp(-0.25 * mean)) / 0.25


ROWS = {
    "dpo": lambda p: ns(0.1 * p.gap),
    "cdpo": lambda p: 0.9 * ns(0.1 * p.gap) + 0.1 * ns(-0.1 * p.gap),
    "robust": lambda p: (0.9 * ns(0.1 * p.gap) - 0.1 * ns(-0.1 * p.gap)) / 0.8,
    "hinge": lambda p: relu(1 - 0.1 * p.gap),
    "ipo": lambda p: (p.gap - 5) ** 2,
    "dpo_norm": lambda p: ns(5 * (p.d_w / p.n_w - p.d_l / p.n_l)),
    "margin_dpo": lambda p: ns(0.1 * p.gap - p.margin),
    "step_dpo": lambda p: ns(0.1 * p.gap),
    "r_dpo": lambda p: ns(0.1 * p.gap - 0.01 * (p.n_w - p.n_l)),
    "wpo": lambda p: p.weights * ns(0.1 * p.gap),
    "beta_dpo": lambda p: ns(0.1 * p.extra * p.gap),
    "exo_pair": lambda p: kl(0.1 * p.gap, torch.tensor(0.999 / 0.001).double().log()),
    "nca_pair": lambda p: ns(0.1 * p.d_w) + 0.5 * ns(-0.1 * p.d_w) + 0.5 * ns(-0.1 * p.d_l),
    "bco_pair": lambda p: ns(0.1 * p.d_w) + ns(-0.1 * p.d_l),
    "bco": lambda p: ns(0.1 * p.d_w - p.shared) + ns(p.shared - 0.1 * p.d_l),
    "sppo_hard": lambda p: 0.5 * ((p.d_w - 500) ** 2 + (p.d_l + 500) ** 2),
    "sppo": lambda p: 0.5 * ((p.d_w - (p.extra - 0.5) / 1e-3) ** 2 + (p.d_l + (p.extra - 0.5) / 1e-3) ** 2),
    "aot": lambda p: ns(0.1 * p.gap),
    "aot_unpaired": lambda p: ns(0.1 * p.gap),
    "apo_zero": lambda p: 1 - torch.sigmoid(0.1 * p.d_w) + torch.sigmoid(0.1 * p.d_l),
    "apo_down": lambda p: torch.sigmoid(0.1 * p.d_w) + 1 - torch.sigmoid(0.1 * p.gap),
    "discopop": lambda p: torch.lerp(ns(0.1 * p.gap), torch.exp(-0.1 * p.gap), torch.sigmoid(0.1 * p.gap / 0.05)),
    "f_dpo_reverse_kl": lambda p: ns(0.1 * p.gap),
    "f_dpo_forward_kl": lambda p: ns(0.1 * (torch.exp(-p.d_l) - torch.exp(-p.d_w))),
    "f_dpo_js": lambda p: ns(0.1 * (logsigmoid(p.d_w) - logsigmoid(p.d_l))),
    "f_dpo_alpha": lambda p: ns(0.1 * 2 * (torch.exp(-0.5 * p.d_l) - torch.exp(-0.5 * p.d_w))),
    "dpop": lambda p: ns(0.1 * (p.gap - 50 * relu(-p.d_w))),
    "dpop_outside": lambda p: ns(0.1 * p.gap) + 50 * relu(-p.d_w),
    "tdpo1": lambda p: ns(0.1 * (p.gap - (p.rejected_kl - p.chosen_kl))),
    "tdpo2": lambda p: ns(0.1 * (p.gap - 0.5 * (p.rejected_kl - p.chosen_kl))),
    "cal_dpo": lambda p: ns(p.gap) + 0.5 * ((p.d_w - 5) ** 2 + (p.d_l + 5) ** 2),
    "d2o": lambda p: ns(0.1 * p.d_w - 0.1 * p.d_l),
    "gpo_logistic": lambda p: ns(0.1 * p.gap),
    "gpo_hinge": lambda p: relu(1 - 0.1 * p.gap),
    "gpo_squared": lambda p: (0.1 * p.gap - 1) ** 2,
    "gpo_exponential": lambda p: torch.exp(-0.1 * p.gap),
    "gpo_truncated_quadratic": lambda p: relu(1 - 0.1 * p.gap) ** 2,
    "gpo_savage": lambda p: (1 + torch.exp(0.1 * p.gap)) ** -2,
    "rpo_squared": lambda p: (0.2 * p.gap - p.margin) ** 2,
    "rpo_backward_kl": lambda p: kl(p.margin, 0.2 * p.gap),
    "rpo_forward_kl": lambda p: kl(0.2 * p.gap, p.margin),
    "mpo": lambda p: 0.8 * ns(0.1 * p.gap) + 0.2 * (ns(0.1 * p.d_w) + ns(-0.1 * p.d_l)) - p.s_w / p.n_w,
    "irpo": lambda p: ns(0.1 * p.gap) - p.s_w / p.n_w,
    "rpo": lambda p: ns(0.1 * p.gap) - 0.1 * 0.005 * p.s_w,
    "xpo": lambda p: ns(0.1 * p.gap) + 1e-5 * (p.extra * p.s_w + (1 - p.extra) * p.s_l),
    "cpo": lambda p: ns(0.1 * (p.s_w - p.s_l)) - p.s_w / p.n_w,
    "cpo_hinge": lambda p: relu(1 - 0.1 * (p.s_w - p.s_l)) - p.s_w / p.n_w,
    "cpo_ipo": lambda p: (p.s_w - p.s_l - 5) ** 2 - p.s_w / p.n_w,
    "orpo": lambda p: 0.1 * ns(odds(p.s_w / p.n_w) - odds(p.s_l / p.n_l)) - p.s_w / p.n_w,
    "simpo": lambda p: ns(2 * (p.s_w / p.n_w - p.s_l / p.n_l) - 1),
    "cpo_simpo": lambda p: ns(2 * (p.s_w / p.n_w - p.s_l / p.n_l) - 1) - p.s_w / p.n_w,
    "alpha_po": lambda p: ns(2.5 * (bend(p.s_w / p.n_w) - bend(p.s_l / p.n_l)) - 0.5),
    "slic_hf": lambda p: relu(1 - p.s_w + p.s_l) - 0.1 * p.s_w,
}  # fmt: skip

# What the trainers compute, transcribed from them.
TRAINERS = {
    "openrlhf": {
        "dpo": lambda p: ns(0.1 * p.gap),
        "cdpo": lambda p: ns(0.1 * p.gap) * (1 - 0.1) + ns(-0.1 * p.gap) * 0.1,
        "ipo": lambda p: (p.gap - 5) ** 2,
        "irpo": lambda p: ns(0.1 * p.gap) - p.s_w / p.n_w,
    },
    "halos": {
        "dpo": lambda p: ns(0.1 * p.d_w - 0.1 * p.d_l),
        "cdpo": lambda p: 0.8 * ns(0.1 * p.d_w - 0.1 * p.d_l) + 0.2 * ns(0.1 * p.d_l - 0.1 * p.d_w),
        "ipo": lambda p: (p.d_w / p.n_w - p.d_l / p.n_l - 1 / (2 * 0.1)) ** 2,
        "simpo": lambda p: ns(10 * (p.s_w / p.n_w - p.s_l / p.n_l - 0.3)),
        "slic_hf": lambda p: (1 - p.s_w + p.s_l).clamp(min=0) + 0.1 * -p.s_w,
    },
}


def by_hand(formula, point: str) -> list[float]:
    """[loss, ∂/∂S_w, ∂/∂S_l] in float64."""
    (s_w, s_l, ref_w, ref_l), (n_w, n_l) = POINTS[point]
    s_w, s_l = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (s_w, s_l))
    d_w, d_l = s_w - ref_w, s_l - ref_l
    fields = {k: torch.tensor(x, dtype=torch.float64) for k, x in (FIELDS | KL).items()}
    p = SimpleNamespace(s_w=s_w, s_l=s_l, n_w=n_w, n_l=n_l, d_w=d_w, d_l=d_l, gap=d_w - d_l, **fields)
    loss = formula(p)
    return [loss.item(), *(g.item() for g in torch.autograd.grad(loss, (s_w, s_l), materialize_grads=True))]


def ours(row, point: str, backend: str, device: str) -> list[float]:
    """The same by a row, in float64 where the backend has it."""
    dtype = torch.float64 if backend in ("reference", "torch") else torch.float32

    def there(x):
        return torch.tensor([x], dtype=dtype, device=device)

    sums, lengths = POINTS[point]
    leaves = [there(x).requires_grad_() for x in sums[:2]]
    given = dict(zip(("ref_chosen_logps", "ref_rejected_logps"), map(there, sums[2:]), strict=True))
    given |= dict(zip(("chosen_lengths", "rejected_lengths"), map(there, lengths), strict=True))
    given |= {k: x if k == "shared" else there(x) for k, x in FIELDS.items() if k in row.needs}
    given |= {k: there(x) for k, x in KL.items()} if row.kl else {}
    with rlfast.use_backend(backend):
        out = row(*leaves, **given)
    return [out.loss.item(), *(g.item() for g in torch.autograd.grad(out.loss, leaves))]


def assert_near(got, wanted, backend: str) -> None:
    """To more digits than numbers that are float32 inside have; of float32 those of sums of 50 nats."""
    bound = 1e-7 if backend in ("reference", "torch") else 2e-5
    assert got == pytest.approx(wanted, rel=bound, abs=bound)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", ROWS)
def test_every_row_by_hand(backend, device, name, point):
    assert_near(ours(PREFERENCES[name], point, backend, device), by_hand(ROWS[name], point), backend)


def test_no_row_is_left_out():
    assert set(ROWS) == set(PREFERENCES) - {"ld_dpo"}  # which has tokens alone


def test_ld_dpo_by_hand(backend, device):
    """Half of the tokens beyond the length of the shorter response."""
    w, l_ = torch.tensor([[-1.0, -2.0, -4.0, -8.0]], device=device), torch.tensor([[-3.0, -5.0]], device=device)
    given = {"ref_chosen_logps": torch.zeros_like(w), "ref_rejected_logps": torch.zeros_like(l_)}
    with rlfast.use_backend(backend):
        loss = rlfast.preference_loss("ld_dpo")(w, l_, **given).loss.item()
    assert loss == pytest.approx(ns(torch.tensor(0.1 * (-3 - 0.5 * 12 + 8))).item(), rel=1e-6)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("like, name", [(like, name) for like, rows in TRAINERS.items() for name in rows])
def test_presets_by_hand(backend, device, like, name, point):
    row = rlfast.preference_loss(name, like=like)
    assert_near(ours(row, point, backend, device), by_hand(TRAINERS[like][name], point), backend)


@pytest.mark.parametrize("like", TRAINERS)
def test_no_preset_is_left_out(like):
    assert set(TRAINERS[like]) == set(PRESETS[like])


# Of a desirable response, and of another; D, S, n, z = shared, r = extra.
SINGLES = {
    "kto": (lambda p: 1 - torch.sigmoid(0.1 * (p.d - p.shared)), lambda p: 1 - torch.sigmoid(0.1 * (p.shared - p.d))),
    "bco": (lambda p: ns(0.1 * p.d - p.shared), lambda p: ns(p.shared - 0.1 * p.d)),
    "apo_zero": (lambda p: 1 - torch.sigmoid(0.1 * p.d), lambda p: torch.sigmoid(0.1 * p.d)),
    "apo_down": (
        lambda p: torch.sigmoid(0.1 * p.d) + 1 - torch.sigmoid(0.1 * (p.d - p.shared)),
        lambda p: 1 - torch.sigmoid(0.1 * (p.shared - p.d)),
    ),
    "npo": (lambda p: 0 * p.d, lambda p: 20 * ns(-0.1 * p.d)),
    "npo_retain": (lambda p: -p.s / p.n, lambda p: 20 * ns(-0.1 * p.d)),
    "dro_v": (lambda p: 0.5 * (p.extra - p.d) ** 2,) * 2,
}


@pytest.mark.parametrize("like", (None, *SINGLE_PRESETS))
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("desirable", (True, False))
def test_single_responses_by_hand(backend, device, like, point, desirable):
    """Every row; the trainers have the same."""
    dtype = torch.float64 if backend in ("reference", "torch") else torch.float32
    (s, _, ref, _), (n, _) = POINTS[point]
    for name in UNPAIRED if like is None else SINGLE_PRESETS[like]:
        row = rlfast.unpaired_loss(name, like=like)
        leaf = torch.tensor([s], dtype=dtype, device=device, requires_grad=True)
        given = {"ref_logps": leaf.new_tensor([ref]), "lengths": leaf.new_tensor([n])}
        given |= {k: FIELDS[k] if k == "shared" else leaf.new_tensor([FIELDS[k]]) for k in row.needs}
        with rlfast.use_backend(backend):
            loss = row(leaf, torch.tensor([desirable], device=device), **given).loss
        own = torch.tensor(s, dtype=torch.float64, requires_grad=True)
        p = SimpleNamespace(s=own, d=own - ref, n=n, shared=FIELDS["shared"], extra=FIELDS["extra"])
        wanted = SINGLES[name][not desirable](p)
        got = [loss.item(), torch.autograd.grad(loss, leaf)[0].item()]
        assert_near(got, [wanted.item(), torch.autograd.grad(wanted, own)[0].item()], backend)
    assert set(SINGLES) == set(UNPAIRED)


def test_the_value_of_dro_v_has_the_other_half_of_its_gradient():
    """Both are of ½(r − V − τD)²: the policy's by ``dro_v``, V's by ``value_loss``."""
    draw = torch.Generator().manual_seed(0)
    logps, ref, rewards, values = (torch.randn(5, generator=draw, dtype=torch.float64) for _ in range(4))
    leaves = [x.requires_grad_() for x in (logps, values)]
    whole = 0.5 * (rewards - values - 0.3 * (logps - ref)) ** 2
    wanted = torch.autograd.grad(whole.mean(), leaves)
    row, good = rlfast.unpaired_loss("dro_v", tau=0.3), torch.ones(5, dtype=torch.bool)
    policy = row(logps, good, ref_logps=ref, extra=(rewards - values).detach()).loss
    returns = (rewards - 0.3 * (logps - ref)).detach()
    critic = rlfast.value_loss(values[:, None], None, returns[:, None], clip=None).loss
    for loss in (policy, critic):
        torch.testing.assert_close(loss, whole.mean())
    torch.testing.assert_close(torch.autograd.grad(policy, logps), wanted[:1])
    torch.testing.assert_close(torch.autograd.grad(critic, values), wanted[1:])
