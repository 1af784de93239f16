"""What the tests feed the preference losses, and how a result is held to the oracle."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

import rlfast
from rlfast.kernels.formulas import PAIRS, SINGLES
from rlfast.ops.oracle_preference import words
from rlfast.ops.preference_records import METRICS, SINGLE_METRICS, terms_of
from rlfast.reference.pair_loss import pair_loss as pair_reference
from rlfast.reference.sequences import sequence_sums
from rlfast.reference.unpaired_loss import unpaired_loss as single_reference
from tests.cases import DTYPES, f32, few
from tests.numerics import assert_gradient, assert_value, assert_zero, by_name

SIDES = ("chosen", "rejected")
FORMS = ("sums", "padded", "packed", "rows", "packed_rows", "sum_rows")
# Hyper-parameters that are float32 numbers, and at which every branch is taken on what ``drawn`` draws.
HYPER = {
    "logistic": {"beta": f32(0.13), "label_smoothing": f32(0.1), "gamma": f32(0.3), "length_price": f32(0.02)},
    "robust": {"beta": f32(0.13), "label_smoothing": f32(0.2)},
    "hinge": {"beta": f32(0.4), "delta": f32(0.7)},
    "exo_pair": {"beta": f32(0.13), "label_smoothing": f32(0.05)},
    "sppo_hard": {"beta": f32(0.13), "scale": 0.5},
    "sppo": {"beta": f32(0.13), "scale": 0.5},
    "discopop": {"beta": f32(0.13), "tau": f32(0.3)},
    "rpo_squared": {"beta": f32(0.13), "eta": f32(0.7)},
    "rpo_backward_kl": {"beta": f32(0.13), "eta": f32(0.7)},
    "rpo_forward_kl": {"beta": f32(0.13), "eta": f32(0.7)},
    "dpop": {"beta": f32(0.13), "penalty": f32(1.7)},
    "dpop_outside": {"beta": f32(0.13), "penalty": f32(1.7)},
    "cal_dpo": {"beta": f32(0.3), "calibration": f32(0.4)},
    "unequal": {"beta": f32(0.13), "alpha": f32(0.2)},
    "focal": {"gamma": f32(1.5)},
    "weighted_nll": {"beta": f32(0.13), "eta": f32(0.7)},
    "exploration": {"alpha": f32(0.3)},
    "barrier": {"limit": 5.0, "edge": f32(4.5), "barrier": f32(0.3)},
    "max_margin": {"penalty": f32(1.7)},
    "regression": {"target": f32(2.3)},
    "kto": {"beta": f32(0.13), "desirable_weight": f32(1.2), "undesirable_weight": f32(0.8)},
    "dro": {"tau": f32(0.6)},
}
BETA = {"beta": f32(0.13)}


def hyper_of(link: str, table: dict) -> dict:
    """The hyper-parameters of a link in the tests."""
    return HYPER.get(link, BETA if "beta" in table[link].hyper._fields else {})


@dataclass(frozen=True)
class PairCase:
    """One call. ``tokens`` are {side: {logp, ref_logp, mask}}, [B, T] each; a run sums or packs them."""

    objective: rlfast.PreferenceLoss
    tokens: dict
    rest: dict = field(default_factory=dict)  # margin, extra, shared, weights, num_items, world_size, …
    form: str = "padded"
    needs: tuple = SIDES
    upstream: float = 1.0


def drawn(pairs: int, length: int, dtype: str = "f32", seed: int = 0) -> dict:
    """Both sides, with log-ratios of some nats a response."""
    rng = torch.Generator().manual_seed(seed)
    kinds = iter(("f32", "bf16", "f16", "f32") if dtype == "mixed" else (dtype,) * 4)
    found = {}
    for side in SIDES:
        ref = -torch.rand(pairs, length, generator=rng) * 3 - 0.05
        logp = (ref + 0.3 * torch.randn(pairs, length, generator=rng)).clamp(max=-1e-3)
        count = torch.randint(1, length + 1, (pairs, 1), generator=rng)
        found[side] = {
            "logp": logp.to(DTYPES[next(kinds)]), "ref_logp": ref.to(DTYPES[next(kinds)]),
            "mask": torch.arange(length) < count,
        }  # fmt: skip
    return found


def rest_of(pairs: int, dtype: str = "f32", seed: int = 1) -> dict:
    """Every field of the pairs."""
    rng = torch.Generator().manual_seed(seed)
    kind = DTYPES["f32" if dtype == "mixed" else dtype]
    weights = torch.rand(pairs, generator=rng) + 0.5
    if pairs > 3:
        weights[1] = 0.0
    return {
        "margin": torch.randn(pairs, generator=rng).to(kind), "extra": torch.rand(pairs, generator=rng).to(kind),
        "shared": torch.tensor(f32(0.4)), "weights": weights.to(kind),
    }  # fmt: skip


def read_by(objective, rest: dict) -> dict:
    """Those fields that a loss reads."""
    return {k: x for k, x in rest.items() if k in objective.prepared[-1]}


def summed(side: dict) -> dict:
    """A side's sums, in its dtypes, and its lengths."""
    mask = side["mask"]
    sums = {k: torch.where(mask, side[k].double(), 0.0).sum(-1).to(side[k].dtype) for k in ("logp", "ref_logp")}
    return sums | {"lengths": mask.sum(-1)}


def packed(side: dict, start: int = 0) -> tuple[dict, torch.Tensor]:
    """A side's tokens one after the other, and where the responses end; every other token that is packed is masked."""
    real = side["mask"] | (torch.arange(side["mask"].shape[1]) % 3 == 0)
    ends = torch.cat((torch.zeros(1, dtype=torch.int64), real.sum(1).cumsum(0)))
    return {k: x[real] for k, x in side.items()}, ends, real


def arguments(case: PairCase) -> tuple[dict, dict]:
    """(leaves by side, the other arguments) of the public call, on the CPU; and how a gradient comes back."""
    form = case.form.replace("sum_rows", "sums").replace("packed_rows", "packed").replace("rows", "padded")
    sides = {"sums": summed}.get(form, dict)
    found = {side: sides(case.tokens[side]) for side in SIDES}
    together = case.form.endswith("rows")
    if together:
        both = {k: torch.cat([found[side][k] for side in SIDES]) for k in found["chosen"]}
        found = {"": both}
    if form == "packed":
        parts = {side: packed(x) for side, x in found.items()}
        found = {side: part[0] | {"cu_seqlens": part[1]} for side, part in parts.items()}
    return found


def call(case: PairCase, leaves: dict, device: str) -> rlfast.PreferenceOutput:
    """The public call with these log-probs."""
    found = arguments(case)
    rest = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in case.rest.items()}
    given = {}
    for side, x in found.items():
        for k, value in x.items():
            if k != "logp":
                name = {"ref_logp": f"ref_{side}_logps", "mask": f"{side}_mask"}.get(k, f"{side}_{k}")
                given[name.strip("_").replace("__", "_")] = value.to(device)
    if "" in found:
        return case.objective.rows(leaves[""], per_pair=True, **given, **rest)
    return case.objective(leaves["chosen"], leaves["rejected"], per_pair=True, **given, **rest)


def run(case: PairCase, backend: str, device: str = "cpu") -> tuple[rlfast.PreferenceOutput, dict]:
    """(output, {side: gradient by the log-probs, as the call had them})."""
    found = arguments(case)
    leaves = {
        side: x["logp"].detach().to(device).requires_grad_(side == "" or side in case.needs)
        for side, x in found.items()
    }
    with rlfast.use_backend(backend):
        out = call(case, leaves, device)
    wanted = {side: leaf for side, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(out.loss * case.upstream, list(wanted.values())) if wanted else ()
    return out, dict(zip(wanted, grads, strict=True))


def oracle(case: PairCase, dtype: torch.dtype, order=None) -> tuple[dict, dict]:
    """(loss and metrics, gradients) by the reference; ``order`` shuffles the pairs."""
    found = arguments(case)
    pick = slice(None) if order is None else order
    leaves = {side: x["logp"].detach().to(dtype).requires_grad_() for side, x in found.items()}
    sums = {side: side_sums(x, leaves[side], dtype, case.objective.tail, found) for side, x in found.items()}
    if "" in sums:
        pairs = sums[""][0].shape[0] // 2
        sums = {"chosen": [x[:pairs] for x in sums[""]], "rejected": [x[pairs:] for x in sums[""]]}
    sums = {side: [x[pick] for x in parts] for side, parts in sums.items()}
    rest = {k: x.to(dtype) if isinstance(x, torch.Tensor) else x for k, x in case.rest.items()}
    rest = {k: x[pick] if isinstance(x, torch.Tensor) and x.dim() else x for k, x in rest.items()}
    factor = rest.pop("world_size", 1) / rest.pop("accumulation", 1)
    n = rest.pop("num_items", None)
    n = 1.0 if case.objective.reduce == "sum" and n is None else n
    if case.objective.nll_reduce == "batch" and case.objective.nll:
        rest["shared"] = sums["chosen"][2].mean()
    terms = words(terms_of(*case.objective.prepared[0]), PAIRS)
    loss, metrics = pair_reference(sums["chosen"], sums["rejected"], **terms, **rest, n=n, factor=factor)
    grads = torch.autograd.grad(loss * case.upstream, list(leaves.values()), allow_unused=True)
    gradients = {
        side: torch.zeros_like(leaf) if g is None else g for (side, leaf), g in zip(leaves.items(), grads, strict=True)
    }
    back = slice(None) if order is None else order.argsort()
    metrics["losses"] = metrics["losses"][back]
    metrics["chosen_rewards"], metrics["rejected_rewards"] = (x.detach()[back] for x in metrics.pop("rewards"))
    return metrics | {"loss": loss.detach()}, gradients


def side_sums(x: dict, leaf, dtype, tail: float, found: dict) -> tuple:
    """(S, S_ref, n) of the responses of one argument."""
    ref = x["ref_logp"].to(dtype) if "ref_logp" in x else torch.zeros_like(leaf)
    if "lengths" in x or ("mask" not in x and "cu_seqlens" not in x):
        return leaf, ref, x["lengths"].to(dtype) if "lengths" in x else torch.ones_like(leaf)
    shared = shortest(found) if tail != 1.0 else None
    if shared is not None and len(found) == 1:
        shared = torch.cat((shared, shared))
    return sequence_sums(unpacked(x, leaf), unpacked(x, ref), unpacked(x, x["mask"]), shared, tail)


def unpacked(x: dict, tokens):
    """Packed tokens a response a row."""
    if "cu_seqlens" not in x:
        return tokens
    lengths = x["cu_seqlens"].diff()
    real = torch.arange(int(lengths.max()) if lengths.numel() else 0) < lengths.unsqueeze(1)
    return tokens.new_zeros(real.shape).masked_scatter(real, tokens)


def shortest(found: dict):
    """The tokens of the shorter response of each pair."""
    counts = [unpacked(x, x["mask"]).sum(-1) for x in found.values()]
    return torch.minimum(*(counts if len(counts) == 2 else counts[0].chunk(2)))


def yardsticks(case: PairCase, reference=None, pairs: int | None = None) -> tuple[dict, dict]:
    """(values, gradients) by PyTorch in float32, in several orders of the pairs."""
    reference = reference or oracle
    pairs = case.tokens["chosen"]["logp"].shape[0] if pairs is None else pairs

    def make(seed: int):
        order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed)) if seed else None
        return reference(case, torch.float32, order)

    return by_name(make)


def check(case: PairCase, backend: str, device: str = "cpu") -> None:
    """Loss, metrics and gradients of one call against the oracle."""
    out, gradients = run(case, backend, device)
    details = {name: getattr(out, name) for name in ("losses", "chosen_rewards", "rejected_rewards")}
    hold(out, details, gradients, oracle(case, torch.float64), yardsticks(case), METRICS)
    for side, x in arguments(case).items():
        if "mask" in x and side in gradients:
            assert_zero(f"gradient of masked {side}", gradients[side].cpu()[~x["mask"]])


def hold(out, details: dict, gradients: dict, truths, own, names) -> None:
    """Assert the contract for one run."""
    sizes = truths[0]["sizes"]
    assert out.loss.dim() == 0 and out.loss.dtype == out.metrics.values.dtype
    assert_value("loss", out.loss.detach().cpu(), truths[0]["loss"], own[0]["loss"], sizes["loss"])
    for name in names:
        got = out.metrics[name].cpu()
        assert_value(name, got, truths[0][name].to(torch.float64), own[0][name], sizes.get(name))
    for name, got in details.items():
        assert_value(name, got.cpu(), truths[0][name], own[0][name])
    for side, got in gradients.items():
        assert_gradient(f"gradient of {side}", got.cpu(), truths[1][side], own[1][side])


def pair_case(link: str, score: str = "log_ratio", mean: bool = False, form: str = "sums", dtype: str = "f32", **rest):
    """A case of one part, with every field that there is."""
    pairs, length = few(37, 5), few(40, 9)
    score_hyper = {"alpha": f32(0.4)} if score in ("power", "alpha_divergence") else {}
    part = rlfast.Part(link, hyper_of(link, PAIRS), score, score_hyper, mean, weight=f32(0.7))
    options = {k: rest.pop(k) for k in ("tail", "nll", "nll_reduce", "reduce", "reward", "reward_mean") if k in rest}
    objective = rlfast.PreferenceLoss((part,), **options)
    tokens = drawn(pairs, length, dtype)
    return PairCase(objective, tokens, read_by(objective, rest_of(pairs, dtype)) | rest, form)


@dataclass(frozen=True)
class SingleCase:
    """One call of ``unpaired_loss``."""

    objective: rlfast.UnpairedLoss
    tokens: dict  # logp, ref_logp, mask: [B, T]
    desirable: torch.Tensor
    rest: dict = field(default_factory=dict)
    form: str = "padded"
    upstream: float = 1.0


def single_case(link: str, form: str = "sums", dtype: str = "f32", more=(), **options) -> SingleCase:
    """A case of one part, with every field that there is."""
    rows, length = few(41, 6), few(40, 9)
    part = rlfast.Part(link, hyper_of(link, SINGLES), weight=f32(0.7))
    objective = rlfast.UnpairedLoss((part, *more), **options)
    rest = read_by(objective, rest_of(rows, dtype))
    return SingleCase(objective, drawn(rows, length, dtype)["chosen"], torch.arange(rows) % 3 != 0, rest, form)


def single_argument(case: SingleCase) -> dict:
    """The responses as the call has them."""
    if case.form == "sums":
        return summed(case.tokens)
    if case.form == "packed":
        part = packed(case.tokens)
        return part[0] | {"cu_seqlens": part[1]}
    return case.tokens


def run_single(case: SingleCase, backend: str, device: str = "cpu"):
    """(output, {"logps": gradient})."""
    x = single_argument(case)
    leaf = x["logp"].detach().to(device).requires_grad_()
    given = {{"ref_logp": "ref_logps"}.get(k, k): value.to(device) for k, value in x.items() if k != "logp"}
    rest = {k: value.to(device) if isinstance(value, torch.Tensor) else value for k, value in case.rest.items()}
    with rlfast.use_backend(backend):
        out = case.objective(leaf, case.desirable.to(device), per_response=True, **given, **rest)
    return out, {"logps": torch.autograd.grad(out.loss * case.upstream, leaf)[0]}


def single_oracle(case: SingleCase, dtype: torch.dtype, order=None) -> tuple[dict, dict]:
    """(loss and metrics, gradient) by the reference; ``order`` shuffles the responses."""
    x = single_argument(case)
    pick = slice(None) if order is None else order
    leaf = x["logp"].detach().to(dtype).requires_grad_()
    sums = [part[pick] for part in side_sums(x, leaf, dtype, 1.0, {})]
    rest = {k: value.to(dtype) if isinstance(value, torch.Tensor) else value for k, value in case.rest.items()}
    rest = {k: value[pick] if isinstance(value, torch.Tensor) and value.dim() else value for k, value in rest.items()}
    factor = rest.pop("world_size", 1) / rest.pop("accumulation", 1)
    n = rest.pop("num_items", 1.0 if case.objective.reduce == "sum" else None)
    terms = words(terms_of(*case.objective.prepared[0]), SINGLES)
    loss, metrics = single_reference(sums, case.desirable[pick], **terms, **rest, n=n, factor=factor)
    (g,) = torch.autograd.grad(loss * case.upstream, leaf)
    back = slice(None) if order is None else order.argsort()
    metrics["losses"], metrics["rewards"] = metrics["losses"][back], metrics["rewards"][0].detach()[back]
    return metrics | {"loss": loss.detach()}, {"logps": g}


def check_single(case: SingleCase, backend: str, device: str = "cpu") -> None:
    """Loss, metrics and gradient of one call against the oracle."""
    out, gradients = run_single(case, backend, device)
    own = yardsticks(case, single_oracle, case.desirable.shape[0])
    details = {"losses": out.losses, "rewards": out.rewards}
    hold(out, details, gradients, single_oracle(case, torch.float64), own, SINGLE_METRICS)
