"""``rlfast.loss``: golden values, every row on every backend, the defaults of its paper, errors that name things."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import rlfast
from rlfast import limits
from rlfast.loss_table import LOSSES
from tests.cases import few
from tests.loss_cases import LossCase, check, drawn

OP = "token_loss"
# Four tokens of one sequence, and the value that each loss has for A = +1 and A = −1.
LOGP = torch.tensor([[-1.0, -0.5, -2.0, -0.1]])
OLD_LOGP = torch.tensor([[-1.2, -0.5, -1.2, -0.6]])
REF_LOGP = torch.tensor([[-1.1, -0.7, -1.9, -0.3]])
GOLDEN = {
    "ppo": ({}, -0.962332, 1.167531),
    "dapo": ({}, -0.987683, 1.167531),
    "gspo": ({}, -0.975310, 0.999700),
    "gspo_token": ({}, -0.975310, 0.999700),
    "cispo_capped": ({"cap": 1.2}, 0.679664, -0.679664),
    "cispo": ({}, 0.855000, -0.855000),
    "sapo": ({}, -2.077557, 1.982096),
    "gmpo": ({}, -0.951229, 1.077884),
}
GOLDEN_KL = {"k1": 0.1, "k2": 0.0125, "k3": 0.011867}
# name → (arXiv id, unit, reduction, KL and its weight, hyper-parameters that are on)
PAPERS = {
    "nash_md": ("2312.00886", "token", "seq_mean_token_sum", None, {"pull": 0.1}),
    "reinforce": ("Williams 1992", "token", "token_mean", None, {}),
    "rloo": ("2402.14740", "token", "seq_mean_token_sum", None, {}),
    "remax": ("2310.10505", "token", "seq_mean_token_sum", None, {}),
    "gpg": ("2504.02546", "token", "token_mean", None, {}),
    "opo": ("2505.23585", "token", "seq_mean_token_sum", None, {}),
    "asymre": ("2506.20520", "token", "seq_mean_token_sum", None, {}),
    "c_rlft": ("2309.11235", "token", "token_mean", None, {}),
    "raft": ("2304.06767", "token", "token_mean", None, {}),
    "awr": ("1910.00177", "token", "token_mean", None, {"coef": 1.0, "max_weight": 20.0}),
    "ppo": ("1707.06347", "token", "token_mean", None, {"eps_low": 0.2, "eps_high": 0.2}),
    "dual_clip_ppo": ("1912.09729", "token", "token_mean", None, {"eps_low": 0.2, "eps_high": 0.2, "dual_clip": 3.0}),
    "reinforce++": ("2501.03262", "token", "token_mean", None, {"eps_low": 0.2, "eps_high": 0.2}),
    "grpo": ("2402.03300", "token", "seq_mean_token_mean", ("k3", 0.04), {"eps_low": 0.2, "eps_high": 0.2}),
    "dr_grpo": ("2503.20783", "token", "seq_sum_over_max_len", None, {"eps_low": 0.2, "eps_high": 0.2}),
    "bnpo": ("2506.02864", "token", "token_mean", None, {"eps_low": 0.2, "eps_high": 0.2}),
    "dapo": ("2503.14476", "token", "token_mean", None, {"eps_low": 0.2, "eps_high": 0.28}),
    "two_sided_grpo": (
        "2505.07291", "token", "seq_mean_token_mean", None, {"eps_low": 0.2, "eps_high": 0.2, "delta": 4.0},
    ),
    "clip_cov": ("2505.22617", "token", "token_mean", None, {"eps_low": 0.2, "eps_high": 0.2}),
    "kl_cov": ("2505.22617", "token", "token_mean", None, {"coef": 1.0}),
    "gspo": ("2507.18071", "seq_mean", "seq_mean_token_mean", None, {"eps_low": 3e-4, "eps_high": 4e-4}),
    "gspo_token": ("2507.18071", "seq_mean_through", "seq_mean_token_mean", None, {"eps_low": 3e-4, "eps_high": 4e-4}),
    "luspo": ("2602.05261", "seq_mean", "seq_mean_token_sum", None, {"eps_low": 2e-3, "eps_high": 2.5e-3}),
    "gmpo": ("2507.20673", "seq_mean", "seq_mean_token_mean", None, {}),
    "vespo": (
        "2602.10693", "seq_sum", "token_mean", None,
        {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0},
    ),
    "cispo": ("2506.13585", "token", "token_mean", None, {"eps_low": 0.2, "eps_high": 0.2}),
    "cispo_capped": ("2506.13585", "token", "token_mean", None, {"cap": 5.0}),
    "topr": ("2503.14286", "seq_sum", "seq_mean_token_sum", None, {"cap": 1.0}),
    "a_lol": ("2305.14718", "seq_sum", "seq_mean_token_sum", None, {"eps_low": 0.9, "eps_high": 0.9}),
    "dppo_tv": ("2602.04879", "token", "token_mean", None, {"eps_low": 0.15, "eps_high": 0.15, "cap": 20.0}),
    "dppo_kl": ("2602.04879", "token", "token_mean", None, {"eps_low": 0.05, "eps_high": 0.05, "cap": 20.0}),
    "sapo": ("2511.20347", "token", "seq_mean_token_mean", None, {"tau_pos": 1.0, "tau_neg": 1.05}),
    "cpgd": ("2505.12504", "token", "token_mean", None, {"eps_low": 0.2, "eps_high": 0.2, "alpha": 0.1}),
    "apa": ("2306.02231", "token", "token_mean", None, {"inv_lambda": 10.0}),
    "kimi": ("2501.12599", "seq_sum", "seq_mean_token_mean", None, {"tau": 0.1, "scale": 1.0}),
    "kimi_token": ("2501.12599", "token", "token_mean", None, {"tau": 0.1, "scale": 1.0}),
    "dro": ("2405.19107", "seq_sum", "seq_mean_token_mean", None, {"tau": 1.0, "scale": 0.5}),
    "a_star_po": ("2505.20686", "seq_sum", "seq_mean_token_mean", None, {"tau": 1e-3, "scale": 1.0}),
}  # fmt: skip


def golden(objective: rlfast.Loss, sign: float, device: str, **fields) -> float:
    out = objective(LOGP.to(device), adv=torch.tensor([sign], device=device), **fields)
    return round(out.loss.item(), 6)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(backend, device, name):
    options, up, down = GOLDEN[name]
    old = OLD_LOGP.to(device)
    with rlfast.use_backend(backend):
        got = [golden(rlfast.loss(name, **options), sign, device, old_logp=old) for sign in (1.0, -1.0)]
    assert got == pytest.approx([up, down], abs=1.01e-6)  # they are given to six decimals


@pytest.mark.parametrize("kl", GOLDEN_KL)
def test_golden_kl(backend, device, kl):
    with rlfast.use_backend(backend):
        objective = rlfast.loss("reinforce", kl=kl, beta=1.0)
        assert golden(objective, 0.0, device, ref_logp=REF_LOGP.to(device)) == pytest.approx(GOLDEN_KL[kl], abs=1.01e-6)
        if kl == "k3":
            both = {"ref_logp": REF_LOGP.to(device), "old_logp": OLD_LOGP.to(device)}
            weighted = golden(replace(objective, kl_ratio="token"), 0.0, device, **both)
            assert weighted == pytest.approx(0.014461, abs=1.01e-6)


@pytest.mark.parametrize("dtype", ("f32", "bf16", "f16"))
@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
@pytest.mark.parametrize("name", LOSSES)
def test_every_row(backend, device, name, packed, dtype):
    call = {"max_len": 30} if LOSSES[name].reduce == "seq_sum_over_max_len" else {}
    check(LossCase(LOSSES[name], drawn(few(24, 4), few(30, 9), dtype), packed, call), backend, device)


def test_the_table_is_what_the_papers_say():
    for name, (paper, unit, reduce, kl, hyper) in PAPERS.items():
        row = LOSSES[name]
        assert (row.paper, row.unit, row.reduce) == (paper, unit, reduce), name
        assert (row.kl and (row.kl, row.beta)) == kl, name
        on = rlfast.loss(name).prepared.hyper
        fields = rlfast.kernels.formulas.SURROGATES[row.surrogate].hyper._fields
        values = {k: v for k, v in zip(fields, on, strict=True) if k != "unused" and v != float("inf")}
        assert values == hyper, name


def tokens(**changes) -> dict:
    fields = {"adv": torch.ones(2), "old_logp": torch.zeros(2, 3), "mask": torch.ones(2, 3)}
    return fields | changes


WRONG = {
    "old_logp: expected shape (2, 3) like logp, got (2, 4)": {"old_logp": torch.zeros(2, 4)},
    "adv: expected shape (2, 3) like logp, or (2,), one a sequence, got (3,)": {"adv": torch.ones(3)},
    "mask: expected shape (2, 3) like logp, got (2,)": {"mask": torch.ones(2)},
    "adv: expected a tensor: grpo needs it, got None": {"adv": None},
    "ref_logp: expected a tensor: grpo needs it, got None": {"ref_logp": None},
    "old_logp: expected a tensor that needs no gradient, got requires_grad=True": {
        "old_logp": torch.zeros(2, 3, requires_grad=True)
    },
    "num_items: expected a finite float > 0, got 0": {"num_items": 0},
    "num_items: expected a finite float > 0, got -4.0": {"num_items": torch.tensor(-4.0)},
    "num_items: expected a finite float > 0, got nan": {"num_items": torch.tensor(float("nan"))},
    "world_size: expected a finite float > 0, got -1": {"world_size": -1},
    "cu_seqlens": {"cu_seqlens": torch.tensor([0, 3, 6])},
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_input_is_named(said):
    fields = tokens(ref_logp=torch.zeros(2, 3)) | WRONG[said]
    match = re.escape(said) if said != "cu_seqlens" else r"logp: expected shape \[N\] with cu_seqlens"
    with pytest.raises(ValueError, match=match):
        rlfast.loss("grpo")(torch.zeros(2, 3), **fields)


@pytest.mark.parametrize("ends", ([0, 3, 5], [1, 3, 6], [0, 4, 3, 6]))
def test_wrong_boundaries(ends):
    with pytest.raises(ValueError, match="cu_seqlens: expected"):
        rlfast.loss("ppo")(torch.zeros(6), adv=torch.ones(len(ends) - 1), cu_seqlens=torch.tensor(ends))


def test_wrong_types_are_named():
    with pytest.raises(TypeError, match="logp: expected dtype"):
        rlfast.loss("ppo")(torch.zeros(2, 3, dtype=torch.int64), **tokens())
    with pytest.raises(TypeError, match=r"logp: expected a torch\.Tensor, got list"):
        rlfast.loss("ppo")([[0.0]], **tokens())
    with pytest.raises(ValueError, match="old_logp: expected device"):
        rlfast.loss("ppo")(torch.zeros(2, 3), **tokens(old_logp=torch.zeros(2, 3, device="meta")))


def test_an_unknown_loss_lists_the_known():
    with pytest.raises(ValueError, match=r"name: expected one of .*dapo.*, got 'grp0'"):
        rlfast.loss("grp0")
    with pytest.raises(ValueError, match=r"like: expected one of 'trl', .*, got 'tlr'"):
        rlfast.loss("grpo", like="tlr")
    with pytest.raises(TypeError, match=r"epsilon: expected an option of ppo: .*eps_low"):
        rlfast.loss("ppo", epsilon=0.1)
    with pytest.raises(ValueError, match=r"reduce: expected one of 'token_mean'"):
        rlfast.loss("ppo", reduce="mean")
    with pytest.raises(ValueError, match=r"unit: expected the unit of a sequence with weight_in_ratio, got 'token'"):
        rlfast.loss("vespo", unit="token")
    with pytest.raises(TypeError, match=r"dual_clip: expected an option of cispo"):
        rlfast.loss("cispo", dual_clip=3.0)


def test_what_nothing_would_read_is_refused():
    """A β without a KL, or a field that no term has, is a mistake, not a wish."""
    logp = torch.zeros(2, 3)
    for name, options, said in (
        ("dapo", {"beta": 0.04}, "beta: expected 0.0 without kl, got 0.04"),
        ("dapo", {"beta": torch.tensor(0.0)}, "beta: expected 0.0 without kl"),
        ("dapo", {"kl_ratio": "unit"}, "kl_ratio: expected None without kl, got 'unit'"),
        ("grpo", {"kl": None, "kl_max": 3.0}, "kl_max: expected inf without kl, got 3.0"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            rlfast.loss(name, **options)
    for field in ("ref_logp", "extra"):
        with pytest.raises(ValueError, match=f"{field}: expected None: dapo reads none, got Tensor"):
            rlfast.loss("dapo")(logp, **tokens(**{field: logp}))
    off = rlfast.loss("grpo", beta=0.0)(logp, **tokens(ref_logp=logp + 1))  # a trainer's β may be 0
    assert off.loss.item() == rlfast.loss("grpo", kl=None)(logp, **tokens()).loss.item()


@pytest.mark.parametrize("name", ("gspo", "gmpo", "vespo", "kimi", "grpo", "rloo"))
def test_tokens_without_their_boundaries_are_no_sequence(name):
    given = {k: torch.ones(6) for k in ("adv", "old_logp", "ref_logp")}
    given = {k: x for k, x in given.items() if k not in rlfast.loss(name).prepared.idle}
    with pytest.raises(ValueError, match=f"cu_seqlens: expected the boundaries .*: {name} is one of sequences, got No"):
        rlfast.loss(name)(torch.zeros(6), **given)
    assert rlfast.loss("ppo")(torch.zeros(6), adv=torch.ones(6)).loss.item() == -1.0  # tokens alone will do


def test_another_estimator_has_its_own_bounds():
    grpo = rlfast.loss("grpo", like="verl", beta=0.1)
    assert (grpo.kl_d_max, grpo.kl_max) == (20.0, 10.0)
    k2 = grpo.with_options(kl="k2")
    assert (k2.kl_d_max, k2.kl_max, k2.beta) == (float("inf"), float("inf"), 0.1)
    assert k2 == rlfast.loss("grpo", like="verl", beta=0.1, kl="k2")
    absolute = rlfast.loss("grpo", kl="absolute", kl_max=3.0)
    assert absolute.with_options(kl="abs").kl_max == 3.0  # another name of the same
    assert grpo.with_options(kl="k3").kl_max == 10.0 and grpo.with_options(kl="k2", kl_max=5.0).kl_max == 5.0
    nemo = rlfast.loss("grpo", like="nemo-rl", kl="k2")
    assert (nemo.kl_d_max, nemo.kl_max) == (20.0, 10.0)
    for off in (grpo.with_options(kl=None), rlfast.loss("grpo", like="nemo-rl", kl=None)):
        assert (off.kl, off.beta, off.kl_max, off.kl_ratio) == (None, 0.0, float("inf"), None)


def test_the_pull_of_nash_md_is_set_by_name():
    given = {"adv": torch.ones(1), "old_logp": torch.full((1, 2), -1.0)}
    losses = [rlfast.loss("nash_md", pull=pull)(torch.full((1, 2), -2.0), **given).loss.item() for pull in (0.1, 0.5)]
    assert losses == pytest.approx([4.4, 6.0])


@pytest.mark.backends("torch", "cpu", "triton", "cuda")
def test_sapo_far_from_the_old_policy(backend, device):
    """r = e^200 is infinite in float32: the gate is shut, and its slope is 0, not 0·∞."""
    leaf = torch.tensor([[-1.0, -1.0]], device=device, requires_grad=True)
    old = torch.tensor([[-201.0, -1.0]], device=device)
    with rlfast.use_backend(backend):
        out = rlfast.loss("sapo")(leaf, adv=torch.ones(1, device=device), old_logp=old)
    out.loss.backward()
    assert out.loss.item() == -3.0 and leaf.grad.tolist() == [[0.0, -0.5]]


NAN = float("nan")
NUMBERS = [
    ("ppo", {"eps_low": NAN}, "eps_low: expected a float ≥ 0 (inf is off), got nan"),
    ("ppo", {"eps_low": -1.0}, "eps_low: expected a float ≥ 0 (inf is off), got -1.0"),
    ("ppo", {"eps_high": True}, "eps_high: expected a float ≥ 0 (inf is off), got True"),
    ("ppo", {"eps_low": "a"}, "eps_low: expected a float ≥ 0 (inf is off), got 'a'"),
    ("ppo", {"dual_clip": None}, "dual_clip: expected a float ≥ 1 (inf is off), got None"),
    ("ppo", {"dual_clip": 0.5}, "dual_clip: expected a float ≥ 1 (inf is off), got 0.5"),
    ("ppo", {"delta": 0.0}, "delta: expected a float > 0 (inf is off), got 0.0"),
    ("ppo", {"off_policy": NAN}, "off_policy: expected a float ≥ 0 (inf is off), got nan"),
    ("ppo", {"beta": NAN}, "beta: expected a finite float, got nan"),
    ("ppo", {"beta": "x"}, "beta: expected a finite float, got 'x'"),
    ("ppo", {"beta": torch.zeros(2)}, "beta: expected a number or a 0-dim tensor, got (2,)"),
    ("ppo", {"entropy_coef": float("inf")}, "entropy_coef: expected a finite float, got inf"),
    ("ppo", {"kl_max": -1.0}, "kl_max: expected a float ≥ 0 (inf is off), got -1.0"),
    ("ppo", {"kl_d_max": NAN}, "kl_d_max: expected a float ≥ 0 (inf is off), got nan"),
    ("ppo", {"log_ratio_low": 1.0, "log_ratio_high": -1.0}, "expected log_ratio_low <= log_ratio_high, got 1.0, -1.0"),
    ("gmpo", {"log_ratio_low": NAN}, "log_ratio_low: expected a float, got nan"),
    ("gspo", {"unit_low": 2.0, "unit_high": 1.0}, "unit_low, unit_high: expected unit_low <= unit_high, got 2.0, 1.0"),
    ("ppo", {"signed": "no"}, "signed: expected True or False, got 'no'"),
    ("ppo", {"correction": 3}, "correction: expected a Correction, or the name of one, got 3"),
    ("cispo_capped", {"cap": -1.0}, "cap: expected a float > 0 (inf is off), got -1.0"),
    ("cpgd", {"eps_low": 1.5}, "eps_low: expected a float in [0, 1), got 1.5"),
    ("cpgd", {"eps_low": 1.0}, "eps_low: expected a float in [0, 1), got 1.0"),
    ("cpgd", {"alpha": -0.1}, "alpha: expected a finite float ≥ 0, got -0.1"),
    ("sapo", {"tau_pos": 0.0}, "tau_pos: expected a float > 0, from 1e-30 to 1e+30, got 0.0"),
    ("kimi", {"tau": float("inf")}, "tau: expected a finite float ≥ 0, got inf"),
    ("awr", {"coef": NAN}, "coef: expected a finite float, got nan"),
    ("ppo", {"like": "verl", "kl": ["k3"]}, "kl: expected one of 'k1', 'k2', 'k3', "),
    (["ppo"], {}, "name: expected one of 'reinforce', 'rloo', "),
]


@pytest.mark.parametrize("name, options, said", NUMBERS, ids=[f"{n}-{o}" for n, o, _ in NUMBERS])
def test_a_number_beyond_its_range_is_refused(name, options, said):
    with pytest.raises((ValueError, TypeError), match=re.escape(said)):
        rlfast.loss(name, **options)


def test_what_is_no_record_of_an_objective_is_refused():
    for options, said in (
        ({"surrogate": None}, "surrogate: expected one of ppo_clip, .*, got None"),
        ({"surrogate": ["ppo_clip"]}, r"surrogate: expected one of ppo_clip, .*, got \['ppo_clip'\]"),
        ({"surrogate": "ppo_clip", "hyper": 3}, "hyper: expected a dict of numbers by name, got 3"),
        ({"surrogate": "ppo_clip", "needs": 3}, "needs: expected a tuple of names of fields, got 3"),
        ({"surrogate": "ppo_clip", "needs": ("logits",)}, "needs: expected one of 'logp', .*, got 'logits'"),
    ):
        with pytest.raises((ValueError, TypeError), match=said):
            rlfast.Loss(**options)


def test_every_hyper_parameter_has_a_range():
    formulas = rlfast.kernels.formulas
    built_in = {f.hyper for name, f in formulas.SURROGATES.items() if "." not in name}
    built_in |= {f.hyper for table in (formulas.SCORES, formulas.PAIRS, formulas.SINGLES) for f in table.values()}
    assert built_in >= set(limits.HYPER)  # a new formula's may have any number until it says which
    for hyper, ranges in limits.HYPER.items():
        assert set(ranges) == set(hyper._fields) - {"unused"}, hyper
        for name, limit in ranges.items():
            assert limit.low <= hyper._field_defaults[name] <= limit.high, (hyper, name)


def test_no_bound_is_infinite(backend, device):
    """inf is off: eps_low = 1 leaves the ratio 0 below, and inf no bound at all."""
    logp, old = LOGP.to(device), OLD_LOGP.to(device) + 3.0
    for name in ("ppo", "cispo", "a_lol", "dppo_tv", "dppo_kl"):
        with rlfast.use_backend(backend):
            open_ = rlfast.loss(name, eps_low=float("inf"), eps_high=float("inf"))
            out = open_(logp, adv=torch.ones(1, device=device), old_logp=old)
        assert out.loss.isfinite() and out.metrics["clip_low"].item() == out.metrics["clip_high"].item() == 0.0, name


CORRECTIONS = {
    "high: expected a float ≥ 0 (inf is off), got nan": lambda c: c.tis(NAN),
    "high: expected a float ≥ 0 (inf is off), got '2'": lambda c: c.tis("2"),
    "low: expected a float ≥ 0 (inf is off), got -1.0": lambda c: c.icepop(-1.0, 5.0),
    "high: expected a float ≥ 0 (inf is off), got None": lambda c: c.sequence_mask(None),
    "gate_high: expected a float, got None": lambda c: c.rejection(high=None),
    "gate_low: expected a float, got nan": lambda c: rlfast.Correction(gate="token", gate_low=NAN),
    "low, high: expected low <= high, got 3.0, 2.0": lambda c: rlfast.Correction("token", low=3.0, high=2.0),
    "gate_low, gate_high: expected gate_low <= gate_high": lambda c: c.geometric_mask(1.002, 0.999),
    "masks: expected True or False, got 'no'": lambda c: rlfast.Correction(masks="no"),
    "weight: expected one of None, 'token'": lambda c: rlfast.Correction("word"),
}


@pytest.mark.parametrize("said", CORRECTIONS)
def test_a_correction_names_what_is_wrong(said):
    with pytest.raises((ValueError, TypeError), match=re.escape(said)):
        CORRECTIONS[said](rlfast.corrections)


def test_a_bound_of_zero_is_none():
    assert rlfast.corrections.icepop(0, 5).gate_low == rlfast.corrections.sequence_mask().gate_low == -float("inf")


@pytest.mark.parametrize("name", ("clip_cov", "kl_cov", "kimi", "apa"))
def test_a_missing_field_names_the_loss_that_needs_it(name):
    *_, missing = LOSSES[name].needs
    given = {field: torch.zeros(2, 3) for field in LOSSES[name].needs if field not in (missing, "adv")}
    with pytest.raises(ValueError, match=rf"{missing}: expected a tensor: {name} needs it"):
        rlfast.loss(name)(torch.zeros(2, 3), adv=torch.ones(2), **given)


def test_the_normaliser_is_explicit(backend, device):
    """num_items replaces the count, world_size multiplies, accumulation divides, max_len is the divisor's length."""
    logp, adv = -torch.ones(2, 4, device=device), torch.ones(2, device=device)
    with rlfast.use_backend(backend):

        def value(name, **options):
            return rlfast.loss(name)(logp, adv=adv, **options).loss.item()

        assert value("reinforce") == 1.0
        assert value("reinforce", num_items=16) == 0.5
        assert value("reinforce", num_items=torch.tensor(16, device=device)) == 0.5
        assert value("reinforce", num_items=16, world_size=4, accumulation=2) == 1.0
        assert value("rloo") == 4.0 and value("rloo", num_items=8) == 1.0
        assert value("dr_grpo") == -1.0 and value("dr_grpo", max_len=8) == -0.5
        assert rlfast.loss("reinforce", reduce="token_sum")(logp, adv=adv).loss.item() == 8.0


def test_metrics_have_names():
    out = rlfast.loss("ppo")(torch.zeros(1, 2), adv=torch.ones(1))
    assert out.metrics["tokens"].item() == 2.0 and set(out.metrics.as_dict()) == set(out.metrics.keys())
    with pytest.raises(KeyError, match="clip_low"):
        out.metrics["clipfrac"]
