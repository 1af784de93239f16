"""What the tests feed ``token_loss``, and how a result is held to the oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

import rlfast
from rlfast import Correction
from rlfast.kernels.formulas import SURROGATES
from rlfast.ops.loss_records import METRICS, REDUCTIONS, UNITS
from rlfast.ops.oracle_loss import named, options
from rlfast.reference.token_loss import token_loss as reference
from tests.cases import DTYPES, f32, few
from tests.numerics import assert_gradient, assert_value, assert_zero, by_name

BUILT_IN = tuple(name for name in SURROGATES if "." not in name)  # not those that tests make
LEAVES = ("logp", "entropy")
# The two say how n was split between the gradient and its scale, which each backend may do its own way.
COMPARED = tuple(name for name in METRICS if name not in ("scale", "entropy_scale"))
CORRECTIONS = {
    "none": None,
    "tis": rlfast.corrections.tis(),
    "icepop": rlfast.corrections.icepop(f32(0.8), f32(1.3)),
    "sequence_tis": rlfast.corrections.sequence_tis(f32(1.1)),
    "sequence_mask": rlfast.corrections.sequence_mask(),
    "geometric_mask": rlfast.corrections.geometric_mask(0.9, 1.1),
    "masked_tokens": Correction(gate="token", gate_low=f32(-0.2), gate_high=f32(0.3), masks=True),
    "masked_sequences": Correction(gate="seq_sum", gate_kind="k3", gate_high=f32(0.3), masks=True),
    "mean_k2": Correction(weight="seq_mean", low=f32(0.9), gate="seq_mean", gate_kind="k2", gate_high=f32(0.02)),
}
# Hyper-parameters at which bounds are active on what ``drawn`` draws; the others keep their defaults.
ACTIVE = {
    "ppo_clip": {"eps_low": f32(0.1), "eps_high": f32(0.15), "dual_clip": f32(1.25)},
    "cispo": {"eps_low": f32(0.1), "eps_high": f32(0.3)},
    "cispo_capped": {"cap": f32(1.2)},
    "sapo": {"tau_pos": f32(0.7), "tau_neg": f32(1.6)},
    "vespo": {"k_pos": 1.0, "lambda_pos": f32(1.7), "k_neg": 2.0, "lambda_neg": f32(0.6)},
    "squared_residual": {"tau": f32(0.7), "scale": 0.5},
    "quadratic_penalty": {"tau": f32(0.7), "scale": 0.5},
    "apa": {"inv_lambda": f32(0.3)},
    "awr": {"coef": f32(1.2), "max_weight": f32(1.4)},
    "a_lol": {"eps_low": f32(0.15), "eps_high": f32(0.1)},
    "dppo_tv": {"eps_low": f32(0.03), "eps_high": f32(0.02), "cap": f32(1.2)},
    "dppo_kl": {"eps_low": f32(0.004), "eps_high": f32(0.002), "cap": f32(1.2)},
    "kl_cov": {"coef": f32(0.6)},
    "cpgd": {"eps_low": f32(0.15), "eps_high": f32(0.12), "alpha": f32(0.3)},
    "nash_md": {"pull": f32(0.3)},
    "value_clipped": {"clip": f32(0.1)},
    "value_huber": {"delta": f32(0.8), "clip": f32(0.1)},
}
OTHERS = {"ppo_clip": {"delta": f32(1.1)}, "topr": {"cap": f32(1.3)}}
HYPER = {"default": {}, "active": ACTIVE, "other": ACTIVE | OTHERS}
# The axes of an objective and its inputs; the first value of each is the default.
AXES = {
    "surrogate": BUILT_IN,
    "hyper": tuple(HYPER),
    "unit": UNITS,
    "reduce": REDUCTIONS,
    "kl": (None, "k1", "k2", "k3", "absolute", "k3+", "k1+"),
    "kl_ratio": (None, "unit", "token", "score"),
    "kl_bounds": (False, True),
    "entropy_coef": (0.0, f32(0.1)),
    "entropy_mean": (False, True),
    "correction": tuple(CORRECTIONS),
    "weight_in_ratio": (False, True),
    "off_policy": (math.inf, f32(0.02)),
    "bounds": ("none", "inner", "unit", "signed"),
    "mean_adv": (False, True),
    "count_empty": (False, True),
    "num_items": (None, 17.0, "tensor"),
    "coefs": ("numbers", "tensors"),
    "dtype": ("f32", "bf16", "f16", "mixed"),
    "layout": ("padded", "strided", "packed", "one_row", "left", "by_token", "packed_masked"),
    "masked": ("anything", "garbage"),
    "weights": ("tokens", "rows"),
    "fields": ("all", "few"),
    "needs": (LEAVES, ("logp",), ("entropy",), ()),
    "upstream": (1.0, f32(0.37)),
}


@dataclass(frozen=True)
class LossCase:
    """One call. ``fields`` are [rows, T] on the CPU; a run moves and packs them."""

    objective: rlfast.Loss
    fields: dict
    packed: bool = False
    call: dict = field(default_factory=dict)  # num_items, max_len, world_size, accumulation
    lengths: tuple | None = None  # of packed sequences whose mask is passed too; None: what is masked is not packed
    needs: tuple = LEAVES
    upstream: float = 1.0

    def __post_init__(self):
        idle = self.objective.prepared.idle
        object.__setattr__(self, "fields", {k: x for k, x in self.fields.items() if k not in idle})

    def leaves(self) -> tuple:
        """The fields that need a gradient."""
        return tuple(name for name in self.needs if name in self.fields)


def drawn(rows: int, length: int, dtype: str, seed: int = 0) -> dict:
    """Every field, with ratios within a few tenths of 1."""
    rng = torch.Generator().manual_seed(seed)
    kinds = iter(("f32", "bf16", "f32", "f16", "f32", "bf16", "f32", "f32") if dtype == "mixed" else (dtype,) * 8)

    def normal(*shape, scale=1.0):
        return torch.randn(shape, generator=rng) * scale

    def typed(x):
        return x.to(DTYPES[next(kinds)])

    old = -torch.rand(rows, length, generator=rng) * 3 - 0.05
    adv = normal(rows, 1)
    return {
        "logp": typed((old + normal(rows, length, scale=0.2)).clamp(max=-1e-3)),
        "old_logp": typed(old),
        "ref_logp": typed((old + normal(rows, length, scale=0.3)).clamp(max=-1e-3)),
        "rollout_logp": typed((old + normal(rows, length, scale=0.1)).clamp(max=-1e-3)),
        "adv": typed(adv),
        "entropy": typed(torch.rand(rows, length, generator=rng)),
        "weights": typed(torch.rand(rows, length, generator=rng) + 0.5),
        "extra": typed((torch.rand(rows, length, generator=rng) < 0.4).float()),
        "mask": torch.rand(rows, length, generator=rng) < 0.8,
        "keep": torch.rand(rows, length, generator=rng) < 0.8,
    }


def with_garbage(fields: dict) -> dict:
    """Masked tokens hold NaN, the infinities and 1e30, in every field that has a number a token."""
    mask = fields["mask"]
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30]).repeat(mask.numel() // 4 + 1)[: mask.numel()]
    by_token = [k for k, x in fields.items() if x.shape == mask.shape and x.is_floating_point()]
    return fields | {k: torch.where(mask, fields[k], bad.reshape(mask.shape).to(fields[k].dtype)) for k in by_token}


def case_of(combination: dict) -> LossCase:
    """The case that a combination of the axes names."""
    c = {name: values[0] for name, values in AXES.items()} | combination
    rows, length = (1, few(700, 70)) if c["layout"] == "one_row" else (few(24, 4), few(40, 11))
    fields = drawn(rows, length, c["dtype"])
    if c["layout"] == "strided":
        wide = {k: torch.stack((x, x), 1).flatten(1) if x.shape[1] > 1 else x for k, x in fields.items()}
        fields = {k: x[:, :length] for k, x in wide.items()}
    if c["layout"] == "left":
        fields["mask"] = torch.arange(length) >= torch.arange(rows).unsqueeze(1) * length // rows
    if c["layout"] == "by_token":
        fields["adv"] = fields["adv"] + torch.linspace(-1, 1, length).to(fields["adv"].dtype)
    lengths = None
    if c["layout"] in ("packed", "packed_masked") and rows > 2:
        fields["mask"][1] = False  # an empty sequence: nothing of it is packed
    if c["layout"] == "packed_masked":
        lengths = tuple(0 if row == 1 else length - row * length // (2 * rows) for row in range(rows))
        fields["mask"] &= torch.arange(length) < torch.tensor(lengths).unsqueeze(1)
        fields["adv"] = fields["adv"] + torch.linspace(-1, 1, length).to(fields["adv"].dtype)
    if c["weights"] == "rows":
        fields["weights"] = fields["weights"][:, :1]
    if c["masked"] == "garbage":
        fields = with_garbage(fields)
    has_kl = c["kl"] is not None
    if c["fields"] == "few":
        needed = {"logp", "adv", "mask", "entropy", *(("ref_logp",) if has_kl else ())}
        needed |= {"rollout_logp"} if c["correction"] != "none" else set()
        fields = {k: x for k, x in fields.items() if k in needed}
    tensors = c["coefs"] == "tensors"
    limits = {
        "inner": {"log_ratio_low": f32(-0.2), "log_ratio_high": f32(0.3)},
        "unit": {"unit_low": f32(-0.1), "unit_high": f32(0.15)},
        "signed": {"signed": True, "log_ratio_low": f32(-0.1), "log_ratio_high": f32(0.1)},
    }.get(c["bounds"], {})
    kl = {"beta": torch.tensor(f32(0.3)) if tensors else f32(0.3), "kl_ratio": c["kl_ratio"]} if has_kl else {}
    kl |= {"kl_d_max": f32(0.25), "kl_max": f32(0.1)} if has_kl and c["kl_bounds"] else {}
    coef = f32(c["entropy_coef"])
    objective = rlfast.Loss(
        c["surrogate"], HYPER[c["hyper"]].get(c["surrogate"], {}), unit=c["unit"], reduce=c["reduce"], kl=c["kl"],
        **kl, entropy_coef=torch.tensor(coef) if tensors else coef, entropy_mean=c["entropy_mean"],
        correction=CORRECTIONS[c["correction"]], off_policy=c["off_policy"], mean_adv=c["mean_adv"],
        count_empty=c["count_empty"], weight_in_ratio=c["weight_in_ratio"] and c["unit"] != "token", **limits,
    )  # fmt: skip
    call = {} if c["num_items"] is None else {"num_items": 17.0}
    if c["num_items"] == "tensor":
        call["num_items"] = torch.tensor(17)
    if c["reduce"] == "seq_sum_over_max_len":
        call["max_len"] = length
    packed = c["layout"] in ("packed", "packed_masked")
    return LossCase(objective, fields, packed, call, lengths, c["needs"], c["upstream"])


def oracle(case: LossCase, dtype: torch.dtype, order: torch.Tensor | None = None) -> tuple[dict, dict]:
    """(loss and metrics, gradients by logp and entropy) by the reference; ``order`` shuffles a row's tokens."""
    surrogate, kl, plan, settings, hyper, bounds, *_ = case.objective.prepared
    call = dict(case.call)
    if "max_len" in call:
        settings = settings._replace(max_len=float(call.pop("max_len")))
    factor = call.pop("world_size", 1) / call.get("accumulation", 1)
    settings = settings._replace(factor=factor, entropy_factor=1 / call.pop("accumulation", 1))
    words = options(plan, settings, kl, bounds) | {"surrogate": surrogate, "hyper": named(surrogate, hyper)}
    for name, at in (("beta", "beta"), ("entropy_coef", "entropy_coef")):
        value = getattr(case.objective, name)
        words[at] = value.double().to(dtype) if isinstance(value, torch.Tensor) else words[at]
    if case.objective.has_full_kl:
        words |= {"kl": "full", "beta": words["beta"] or case.objective.beta}
    shape = case.fields["logp"].shape
    fields = {k: x.expand(shape) for k, x in case.fields.items()}
    fields = fields if order is None else {k: x[:, order] for k, x in fields.items()}
    leaves = {k: fields[k].detach().to(dtype).requires_grad_() for k in case.leaves()}
    loss, metrics = reference(**fields | leaves | call, dtype=dtype, **words)
    found = [None] * len(leaves)
    if loss.requires_grad:
        found = torch.autograd.grad(loss * case.upstream, list(leaves.values()), allow_unused=True)
    back = slice(None) if order is None else order.argsort()
    gradients = {}
    for (name, leaf), g in zip(leaves.items(), found, strict=True):
        gradients[name] = (torch.zeros_like(leaf) if g is None else g)[:, back].detach()
    return metrics | {"loss": loss.detach()}, gradients


def yardsticks(case: LossCase) -> tuple[dict, dict]:
    """(values, gradients) by PyTorch in float32, in several orders of a row's tokens."""
    length = case.fields["logp"].shape[1]

    def make(seed: int):
        order = torch.randperm(length, generator=torch.Generator().manual_seed(seed)) if seed else None
        return oracle(case, torch.float32, order)

    return by_name(make)


def packed(fields: dict, chosen: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """(fields of the chosen tokens, one after the other, cu_seqlens); what is one number a sequence stays so."""
    flat = {k: x[chosen] if x.shape == chosen.shape else x.reshape(-1) for k, x in fields.items()}
    return flat, torch.cat((torch.zeros(1, dtype=torch.int64), chosen.sum(1).cumsum(0)))


def run(case: LossCase, backend: str, device: str = "cpu") -> tuple[rlfast.LossOutput, dict]:
    """(output, gradients as [rows, T]) of the public function on this backend."""
    fields, call, shape = dict(case.fields), dict(case.call), case.fields["logp"].shape
    if case.packed:
        chosen = fields["mask"] != 0
        if case.lengths is not None:
            chosen = torch.arange(shape[1]) < torch.tensor(case.lengths).unsqueeze(1)
        fields, call["cu_seqlens"] = packed(fields, chosen)
    else:
        fields = {k: x if x.shape == shape or x.shape[0] != shape[0] else x.squeeze(1) for k, x in fields.items()}
    fields = {k: x.to(device) for k, x in fields.items()}
    call = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in call.items()}
    leaves = {k: fields[k].detach().requires_grad_() for k in case.leaves()}
    coefs = {k: getattr(case.objective, k) for k in ("beta", "entropy_coef")}
    coefs = {k: x.to(device) for k, x in coefs.items() if isinstance(x, torch.Tensor)}
    objective = replace(case.objective, **coefs) if coefs else case.objective
    with rlfast.use_backend(backend):
        out = objective(**fields | leaves, **call)
    assert out.loss.requires_grad == bool(leaves)
    found = torch.autograd.grad(out.loss * case.upstream, list(leaves.values())) if leaves else ()
    gradients = dict(zip(leaves, found, strict=True))
    if case.packed:
        gradients = {k: g.new_zeros(shape).cpu().masked_scatter(chosen, g.cpu()) for k, g in gradients.items()}
    return out, gradients


def check(case: LossCase, backend: str, device: str = "cpu") -> None:
    """Loss, metrics and gradients of one call against the oracle."""
    out, gradients = run(case, backend, device)
    truths, own = oracle(case, torch.float64), yardsticks(case)
    hold(case, out, gradients, truths, own)


def hold(case: LossCase, out, gradients, truths, own) -> None:
    """Assert the contract for one run."""
    assert out.loss.dim() == 0 and out.loss.dtype == out.metrics.values.dtype
    sizes = truths[0]["sizes"]
    assert_value("loss", out.loss.detach().cpu(), truths[0]["loss"], own[0]["loss"], sizes["loss"])
    for name in COMPARED:
        assert_value(name, out.metrics[name].cpu(), truths[0][name], own[0][name], sizes.get(name))
    masked = case.fields.get("mask")
    for name, got in gradients.items():
        assert got.dtype == case.fields[name].dtype, f"gradient of {name}: {got.dtype}"
        got = got.cpu()
        if masked is not None:
            assert_zero(f"gradient of masked {name}", got[masked == 0])
        assert_gradient(f"gradient of {name}", got, truths[1][name], own[1][name])
