"""What the tests feed ``Loss.linear``, and how a result is held to the oracle."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

import rlfast
from rlfast.reference.linear_divergence import linear_divergence as pair_reference
from rlfast.reference.linear_token_logps import linear_token_logps as reference
from tests.cases import DTYPES, KERNELS, few, interpreted
from tests.loss_cases import LossCase
from tests.loss_cases import oracle as loss_oracle
from tests.numerics import assert_gradient, assert_same_bits, assert_value, assert_zero, by_name

VOCAB, DEPTH, RANK = 1301, 24, 5
# Rows of logits at once: none, those of one sequence or of some, all; "part of one" is for few losses.
BUDGETS = ("recompute", "a sequence", "some sequences", "keep")
FORMS = ("padded", "packed")
# Nothing of the loss's kind is the head's: what goes through every loss leaves Triton's interpreter out.
QUICK = ("reference", "torch", "cpu", "cuda", *(() if interpreted() else ("triton",)))
BONUS = {"entropy_coef": 0.125}
REFERENCE = ("ref_hidden", "ref_weight", "ref_bias")
FACTORS = ("lora_a", "lora_b")
OF_VOCABULARY = ("weight", "bias", "ref_weight", "ref_bias", *FACTORS)


@dataclass(frozen=True)
class Case:
    """One call; the tokens of ``data`` are [B, T]."""

    loss: rlfast.Loss
    data: dict
    form: str = "padded"
    budget: str = "some sequences"
    rest: dict = field(default_factory=dict)  # num_items, world_size, temperature, …
    needs: tuple = ("hidden", "weight", "bias")
    upstream: float = 1.0
    lora: float = 0.0  # the scale of the low-rank part; 0: there is none

    def fields(self) -> dict:
        """Those that the loss reads."""
        idle = (*self.loss.prepared.idle, "hidden", "weight", "bias", "targets", "live", *REFERENCE, *FACTORS)
        return {k: x for k, x in self.data.items() if k not in idle}

    def reference(self) -> dict:
        """The reference's head, if the loss reads one."""
        return {k: self.data[k] for k in REFERENCE} if self.loss.has_full_kl else {}

    def call(self) -> dict:
        """What is said beside them."""
        length = {"max_len": 11} if self.loss.reduce == "seq_sum_over_max_len" else {}
        return length | self.rest


def drawn(rows: int = 0, length: int = 0, dtype: str = "f32", seed: int = 2) -> dict:
    """Responses of different lengths, with a mask, labels of −100, and NaN where neither counts."""
    rows, length = rows or few(64, 3), length or few(7, 4)
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, DEPTH, generator=rng).to(DTYPES[dtype])
    weight = (torch.randn(VOCAB, DEPTH, generator=rng) * 2 / DEPTH**0.5).to(DTYPES[dtype])
    bias = torch.randn(VOCAB, generator=rng).to(DTYPES[dtype])
    targets = torch.randint(VOCAB, (rows, length), generator=rng)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=rng)
    mask[0, :2], targets[0, 0] = True, -100
    live = mask & (targets != -100)
    logp = reference(hidden, weight, targets.clamp(min=0), bias, dtype=torch.float64)["logp"].float()
    hidden[~live] = torch.nan
    ref_hidden = torch.randn(rows, length, DEPTH + 5, generator=rng).to(DTYPES[dtype])
    ref_hidden[~live] = torch.nan
    moved = torch.randn(VOCAB, DEPTH + 5, generator=rng) * 0.5 / DEPTH**0.5
    moved[:, :DEPTH] += weight.float()
    ref_hidden[..., :DEPTH] = hidden

    def near(spread: float):
        return torch.where(live, logp + spread * torch.randn(rows, length, generator=rng), torch.nan)

    return {
        "hidden": hidden, "weight": weight, "bias": bias, "targets": targets, "mask": mask, "live": live,
        "adv": torch.randn(rows, generator=rng), "old_logp": near(0.2), "ref_logp": near(0.3),
        "rollout_logp": near(0.1), "weights": torch.rand(rows, length, generator=rng) + 0.5,
        "extra": (torch.rand(rows, length, generator=rng) < 0.4).float(),
        "keep": torch.rand(rows, length, generator=rng) < 0.8, "ref_hidden": ref_hidden,
        "ref_weight": moved.to(DTYPES[dtype]), "ref_bias": bias,
        "lora_a": (torch.randn(RANK, DEPTH, generator=rng) / DEPTH**0.5).to(DTYPES[dtype]),
        "lora_b": (torch.randn(VOCAB, RANK, generator=rng) * 0.5).to(DTYPES[dtype]),
    }  # fmt: skip


def case_of(name: str = "grpo", dtype: str = "f32", options: dict | None = None, rows: int = 0, **rest) -> Case:
    """A row of the table on drawn data."""
    return Case(rlfast.loss(name, **(options or {})), drawn(rows, dtype=dtype), **rest)


def run(case: Case, backend: str, device: str = "cpu", scale: float = 1.0) -> tuple:
    """(output, {name: gradient})."""
    data = {k: x if x is None else x.to(device) for k, x in case.data.items()}
    leaves = {k: data[k].detach().clone().requires_grad_() for k in case.needs if data[k] is not None}
    rows, length = data["targets"].shape
    given = {k: data[k] for k in (*case.fields(), *case.reference(), "hidden", "targets")}
    given |= {"bias": data["bias"]} | leaves
    if case.form == "packed":
        given = {
            k: x.flatten(0, 1) if k not in (*OF_VOCABULARY, "adv") and x is not None else x for k, x in given.items()
        }
        given["cu_seqlens"] = torch.arange(rows + 1, device=device) * length
    size = VOCAB * (8 if data["hidden"].dtype == torch.float64 else 4)
    budget = {"recompute": 0, "part of one": 0.5, "a sequence": 1, "some sequences": 9, "keep": 1 << 20}[case.budget]
    budget *= length * size
    rest = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in case.call().items()}
    if case.lora:
        rest["lora"] = (*(given.pop(k) if k in given else data[k] for k in FACTORS), case.lora)
    with rlfast.use_backend(backend):
        given.setdefault("weight", data["weight"])
        out = case.loss.linear(**given, **rest, entropy=True, memory_budget=budget)
        grads = torch.autograd.grad(out.loss * case.upstream, list(leaves.values())) if leaves else ()
    return out, dict(zip(leaves, grads, strict=True))


HEAD_OPTIONS = ("temperature", "softcap", "logit_scale", "sync")


def oracle(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[dict, dict]:
    """(loss, metrics, log-probs, entropies; gradients) by autograd.

    With a ``seed`` the sum over the depth is shuffled, and each sequence has products of its own, as a chunk has. With
    an odd one a low-rank part is not in the weight, but a product of its own, as LoRA's layers have it.
    """
    data = case.data
    clean = torch.where(data["live"].unsqueeze(-1), data["hidden"], torch.zeros((), dtype=data["hidden"].dtype))
    head = {"hidden": clean, "weight": data["weight"], "bias": data["bias"]}
    head |= {k: data[k] for k in FACTORS} if case.lora else {}
    leaves = {k: x.to(dtype).clone().requires_grad_(k in case.needs) for k, x in head.items() if x is not None}
    options = {k: x for k, x in case.rest.items() if k in HEAD_OPTIONS and k != "sync"}
    options = {k: x.to(dtype) if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    hidden, weight, bias = leaves["hidden"], leaves["weight"], leaves.get("bias")
    if case.lora and seed % 2:
        hidden = torch.cat((hidden, case.lora * (hidden @ leaves["lora_a"].T)), -1)
        weight = torch.cat((weight, leaves["lora_b"]), -1)
    elif case.lora:
        weight = weight + case.lora * leaves["lora_b"] @ leaves["lora_a"]
    if seed:
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(seed))
        hidden, weight = hidden[..., order], weight[:, order]

    def numbers(rows: slice) -> dict:
        some = {k: x[rows] if isinstance(x, torch.Tensor) else x for k, x in options.items()}
        own, targets, live = hidden[rows], data["targets"][rows], data["live"][rows]
        found = reference(own, weight, targets, bias, mask=live, dtype=dtype, **some)
        if case.loss.has_full_kl:
            ref = {k: None if x is None else x.to(dtype) for k, x in case.reference().items()}
            ref["ref_hidden"] = torch.where(live.unsqueeze(-1), ref["ref_hidden"][rows], 0.0)
            both = some | {f"ref_{k}": x for k, x in some.items()}
            pair = pair_reference(own, weight, **ref, bias=bias, mask=live, dtype=dtype, kind="reverse_kl", **both)
            found["full_kl"] = pair["value"]
        return found

    count = data["targets"].shape[0]
    parts = [numbers(slice(i, i + 1)) for i in range(count)] if seed else [numbers(slice(None))]
    made = ("logp", "entropy", *(("full_kl",) if case.loss.has_full_kl else ()))
    values = {k: torch.cat([part[k] for part in parts]) for k in made}
    fields = case.fields() | {k: x.detach() for k, x in values.items()} | {"mask": data["live"]}
    fields = {k: x.unsqueeze(1) if x.dim() == 1 else x for k, x in fields.items()}
    read = [k for k in made if k != "entropy" or case.loss.has_bonus]
    call = {k: x for k, x in case.call().items() if k not in HEAD_OPTIONS}
    found, by = loss_oracle(LossCase(case.loss, fields, False, call, None, read, case.upstream), dtype)
    wanted = {k: x for k, x in leaves.items() if x.requires_grad}
    grads = ()
    if wanted:
        grads = torch.autograd.grad([values[k] for k in by], list(wanted.values()), [by[k].to(dtype) for k in by])
    found |= {k: torch.where(data["live"], x.detach(), 0.0) for k, x in values.items() if k == "logp"}
    # rounding a log-prob moves the loss by its derivative
    moved = sum((by[k] * values[k].detach()).nan_to_num().abs().sum() for k in by if k != "entropy")
    found["size"] = found["sizes"]["loss"] + moved / abs(case.upstream)
    found["entropies"] = torch.where(data["live"], values["entropy"].detach(), 0.0)
    return found, dict(zip(wanted, grads, strict=True))


def check(case: Case, backend: str, device: str = "cpu") -> None:
    """The loss, log-probs, entropies and gradients; the metrics are those of the loss from these log-probs."""
    out, gradients = run(case, backend, device)
    truth, wanted = oracle(case, torch.float64)
    own, own_gradients = by_name(lambda seed: oracle(case, torch.float32, seed))
    live = case.data["live"]
    assert_value("loss", out.loss.detach().cpu(), truth["loss"], own["loss"], truth["size"])
    for name, got in (("logp", out.logp), ("entropies", out.entropy)):
        assert not got.requires_grad
        got = got.cpu().view(live.shape)
        assert_zero(f"{name} of masked tokens", got[~live])
        assert_value(name, got, truth[name], own[name])
    if not case.loss.has_full_kl or backend in KERNELS:  # torch's products have other bits for other numbers of rows
        again = from_log_probs(case, out, backend)
        assert_same_bits("loss", out.loss.detach(), again.loss)
        assert_same_bits("metrics", out.metrics.values, again.metrics.values)
    for name, got in gradients.items():
        assert got.dtype == case.data[name].dtype
        assert_gradient(f"gradient of {name}", got.cpu().view(wanted[name].shape), wanted[name], own_gradients[name])
    if "hidden" in gradients:
        assert_zero("gradient of masked tokens", gradients["hidden"].cpu().view(*live.shape, DEPTH)[~live])


def from_log_probs(case: Case, out, backend: str) -> rlfast.LossOutput:
    """The loss called with log-probs."""
    fields = case.fields() | {"mask": case.data["live"]}
    call = {k: x for k, x in case.call().items() if k not in HEAD_OPTIONS}
    if case.form == "packed":
        rows, length = case.data["targets"].shape
        fields = {k: x.flatten(0, 1) if k != "adv" else x for k, x in fields.items()}
        fields["cu_seqlens"] = torch.arange(rows + 1) * length
    fields = {k: x.to(out.logp.device) for k, x in fields.items()}
    with rlfast.use_backend(backend):
        if case.loss.has_full_kl:
            assert not case.lora
            heads = {k: case.data[k].to(out.logp.device) for k in ("hidden", "weight", "bias", *REFERENCE)}
            heads |= {k: heads[k].view(*out.logp.shape, -1) for k in ("hidden", "ref_hidden")}
            options = {k: x for k, x in case.rest.items() if k in HEAD_OPTIONS and k != "sync"}
            options |= {f"ref_{k}": x for k, x in options.items()}
            pair = rlfast.linear_divergence(**heads, kind="reverse_kl", mask=fields["mask"], **options)
            fields["full_kl"] = pair.value
        return case.loss(out.logp, entropy=out.entropy, **fields, **call)
