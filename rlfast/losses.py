"""Policy losses: a surrogate, and the choices around it that trainers make differently."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch

from rlfast import backends, full_kl, heads, limits, loss_inputs, policy_linear, validate
from rlfast.corrections import CORRECTIONS, Correction
from rlfast.distributed.gather import within
from rlfast.full_kl import FULL
from rlfast.kernels.formulas import SURROGATES
from rlfast.kernels.formulas.kl import KlBounds
from rlfast.kl import of_loss
from rlfast.loss_outputs import LinearLossOutput, LossMetrics, LossOutput
from rlfast.ops import token_loss as op
from rlfast.ops.loss_records import (
    LEVELS,
    REDUCTIONS,
    SEQ_SUM_OVER_MAX_LEN,
    UNITS,
    Plan,
    Settings,
    row_wise,
)

KL_RATIOS = (None, "unit", "token", "score")
INFINITE = math.inf


class Prepared(NamedTuple):
    """What of an objective no tensor changes: the op's arguments, and what a call must and must not bring."""

    surrogate: str
    kl: str
    plan: Plan
    settings: Settings
    hyper: list[float]
    bounds: list[float]
    needs: tuple[str, ...]
    idle: tuple[str, ...]  # fields that nothing would read


# What belongs to a KL, and is at these values without one.
NO_KL = {"beta": 0.0, "kl_d_max": INFINITE, "kl_max": INFINITE, "kl_ratio": None}


@dataclass(frozen=True)
class Loss:
    """One objective. ``rlfast.loss(name)`` makes those of the table; this makes any other.

        loss = factor/n · Σ_t m_t·c_t·(s_t·ρ_t·w_t + beta·KL_t − entropy_coef·H_t)

    Args:
        surrogate: name of a formula of ``rlfast.kernels.formulas``, or one made with ``rlfast.formula``.
        hyper: its hyper-parameters by name; those not named have the formula's defaults.
        unit: "token", "seq_mean", "seq_sum" or "seq_mean_through": whose log-ratio the surrogate sees.
        reduce: "token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum" or "seq_sum_over_max_len".
        kl: "k1", "k2", "k3", "absolute" (or "abs") or None; with a "+", its value with the gradient of k2. Or "full":
            no estimate but KL(π‖π_ref) over the vocabulary, which the call is given or makes from two heads.
        beta: weight of the KL; a 0-dim tensor stays on its device. At 0 ``ref_logp`` may come, and is not read.
        kl_d_max, kl_max: bounds of |log π_ref − log π| and of the estimate.
        kl_ratio: multiplies the estimate by r, and differentiates through it: None, "unit" or "token"; with "score", by
            π/sg(π), whose value is 1.
        entropy_coef: weight of the entropy bonus; a 0-dim tensor stays on its device.
        entropy_mean: the bonus is a mean over the kept tokens, whatever ``reduce`` is.
        correction: a ``Correction``, or the name of one.
        weight_in_ratio: log ρ is added to the sequence's log-ratio, and multiplies nothing.
        off_policy: δ of the off-policy sequence mask; inf is off.
        log_ratio_low, log_ratio_high: bounds of a token's log-ratio.
        unit_low, unit_high: bounds of the unit's.
        signed: a token's log-ratio is bounded from above where A > 0, and from below where A < 0.
        mean_adv: each token has its sequence's mean advantage.
        count_empty: sequences without a token that counts are counted in a mean over sequences.
        needs: names of fields without which the objective is another one.
        paper: arXiv id.

    Raises:
        ValueError, TypeError: an argument is not one of the above, or a number is beyond its range in
            ``rlfast.limits``; the message names it.

    Example:
        >>> objective = rlfast.Loss("ppo_clip", {"eps_high": 0.28}, reduce="token_mean")
        >>> logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> out = objective(logp, adv=torch.tensor([1.0]), old_logp=logp.detach())
        >>> round(out.loss.item(), 4)
        -1.0
    """

    surrogate: str
    hyper: dict = field(default_factory=dict)
    unit: str = "token"
    reduce: str = "token_mean"
    kl: str | None = None
    beta: float | torch.Tensor = 0.0
    kl_d_max: float = INFINITE
    kl_max: float = INFINITE
    kl_ratio: str | None = None
    entropy_coef: float | torch.Tensor = 0.0
    entropy_mean: bool = False
    correction: Correction | str | None = None
    weight_in_ratio: bool = False
    off_policy: float = INFINITE
    log_ratio_low: float = -INFINITE
    log_ratio_high: float = INFINITE
    unit_low: float = -INFINITE
    unit_high: float = INFINITE
    signed: bool = False
    mean_adv: bool = False
    count_empty: bool = False
    needs: tuple[str, ...] = ()
    name: str = "loss"
    paper: str = ""

    def __post_init__(self):
        name = getattr(self.surrogate, "name", self.surrogate)
        if not isinstance(name, str) or name not in SURROGATES:
            validate.fail("surrogate", f"one of {', '.join(SURROGATES)}", repr(self.surrogate))
        formula = SURROGATES[name]
        if not isinstance(self.hyper, dict):
            validate.fail("hyper", "a dict of numbers by name", repr(self.hyper), TypeError)
        unknown = set(self.hyper) - set(formula.hyper._fields)
        if unknown:
            known = ", ".join(formula.hyper._fields)
            validate.fail("hyper", f"names among {known} for {self.surrogate}", ", ".join(sorted(unknown)))
        validate.one_of("unit", self.unit, UNITS)
        validate.one_of("reduce", self.reduce, REDUCTIONS)
        validate.one_of("kl_ratio", self.kl_ratio, KL_RATIOS)
        if self.kl is not None:
            object.__setattr__(self, "kl", of_loss("kl", self.kl))
        for option, off in NO_KL.items() if self.kl in (None, FULL) else ():
            value = getattr(self, option)
            if option != "kl_ratio":
                self._number(option)  # its range first
            if self.kl == FULL and option == "beta":
                continue
            if isinstance(value, torch.Tensor) or value != off:
                without = "without kl" if self.kl is None else f"with kl={FULL!r}"
                validate.fail(option, f"{off} {without}", repr(value))
        if self.weight_in_ratio and self.unit == "token":
            validate.fail("unit", "the unit of a sequence with weight_in_ratio", repr(self.unit))
        if isinstance(self.correction, str):
            validate.one_of("correction", self.correction, tuple(CORRECTIONS))
            object.__setattr__(self, "correction", CORRECTIONS[self.correction]())
        if self.correction is not None and not isinstance(self.correction, Correction):
            validate.fail("correction", "a Correction, or the name of one", repr(self.correction), TypeError)
        if not isinstance(self.needs, tuple):
            validate.fail("needs", "a tuple of names of fields", repr(self.needs), TypeError)
        for need in self.needs:
            validate.one_of("needs", need, loss_inputs.Given._fields)
        for option in limits.FLAGS:
            validate.flag(option, getattr(self, option))
        object.__setattr__(self, "prepared", self._prepare(formula))

    def _number(self, option: str) -> float:
        """An option within its range; the factor of a coefficient that is a tensor is 1."""
        limit = limits.OPTIONS[option]
        if option not in ("beta", "entropy_coef"):
            return validate.number(option, getattr(self, option), limit)
        x = validate.scalar(option, getattr(self, option), limit)
        return 1.0 if isinstance(x, torch.Tensor) else x

    def _prepare(self, formula) -> Prepared:
        c = self.correction or Correction()
        for low, high in limits.ORDERED:
            validate.ordered(low, self._number(low), high, self._number(high))
        beta, entropy = self._number("beta"), self._number("entropy_coef")
        kl = self.kl if self.has_kl and self.kl != FULL else ""
        beta = 0.0 if self.kl == FULL else beta
        plan = Plan(
            UNITS.index(self.unit), int(self.signed), int(self.mean_adv), int(kl.endswith("+")),
            KL_RATIOS.index(self.kl_ratio), REDUCTIONS.index(self.reduce), int(self.count_empty),
            int(self.entropy_mean), LEVELS.index(c.weight), int(self.weight_in_ratio), LEVELS.index(c.gate),
            int(c.gate_kind[1]), int(c.masks),
        )  # fmt: skip
        settings = Settings(
            beta, entropy, float(self.log_ratio_low), float(self.log_ratio_high), float(self.unit_low),
            float(self.unit_high), float(c.low), float(c.high), float(c.gate_low), float(c.gate_high),
            self._number("off_policy"),
        )  # fmt: skip
        ranges = limits.HYPER.get(formula.hyper, {})
        given = formula.hyper(**self.hyper)
        hyper = [validate.number(x, y, ranges.get(x, limits.ANY)) for x, y in zip(given._fields, given, strict=True)]
        bounds = list(KlBounds(self._number("kl_d_max"), self._number("kl_max")))
        needs = tuple(self.needs) + (("ref_logp",) if kl else ()) + (("full_kl",) if self.has_full_kl else ())
        needs += ("entropy",) if self.has_bonus else ()
        needs += ("rollout_logp",) if c.weight or c.gate else ()
        name = getattr(self.surrogate, "name", self.surrogate)
        idle = ("full_kl",) if self.kl != FULL else ()
        idle += ("ref_logp",) if self.kl in (None, FULL) else ()
        idle += () if "extra" in formula.reads else ("extra",)
        return Prepared(name, kl.removesuffix("+"), plan, settings, hyper, bounds, needs, idle)

    @property
    def has_kl(self) -> bool:
        """Whether it has a KL of any weight."""
        return self.kl is not None and (isinstance(self.beta, torch.Tensor) or self.beta != 0.0)

    @property
    def has_full_kl(self) -> bool:
        """Whether it reads exact KLs."""
        return self.kl == FULL and self.has_kl

    @property
    def has_bonus(self) -> bool:
        """Whether it reads entropies."""
        return isinstance(self.entropy_coef, torch.Tensor) or self.entropy_coef != 0.0

    def with_options(self, **options) -> Loss:
        """The same objective with some options changed; a hyper-parameter of the surrogate by its own name."""
        names = {f.name for f in fields(self)} - {"hyper", "name", "paper", "needs"}
        surrogate = options.get("surrogate", self.surrogate)
        formula = SURROGATES.get(getattr(surrogate, "name", surrogate))
        known = names | (set(formula.hyper._fields) if formula else set())
        validate.options(options, known, self.name)
        given = {k: v for k, v in options.items() if k in names}
        if given.get("kl") is not None:
            given["kl"] = of_loss("kl", given["kl"])
        if "kl" in given and given["kl"] != self.kl:  # the bounds are the other estimator's
            given = {k: v for k, v in NO_KL.items() if given["kl"] is None or k.startswith("kl_")} | given
        base = {} if "surrogate" in options else self.hyper
        return replace(self, **given, hyper=base | {k: v for k, v in options.items() if k not in names})

    def __call__(
        self, logp, *, adv=None, old_logp=None, mask=None, ref_logp=None, rollout_logp=None, entropy=None, weights=None,
        extra=None, keep=None, cu_seqlens=None, num_items=None, max_len=None, world_size=1, accumulation=1,
        full_kl=None,
    ) -> LossOutput:  # fmt: skip
        """The loss of a batch, in one launch with its gradient by ``logp`` and ``entropy``.

        Args:
            logp: [B, T] padded, or [N] packed with ``cu_seqlens``; float. log π of the tokens, with gradient.
            adv: [B, T] or [B]; [N] or [B] when packed (one a token where both fit). Advantages.
            old_logp: like logp. log π_old; None is the value of logp itself (on-policy).
            mask: like logp, bool or number. 0 takes a token out; what it holds has no effect.
            ref_logp: like logp. log π_ref, for the KL; None where there is none.
            rollout_logp: like logp. log-probs of the engine that sampled, for the correction.
            entropy: like logp. Entropies in nats, with gradient, for the bonus and the metric.
            weights: like logp, or [B]. Multiply the surrogate; no gradient.
            extra: like logp. What the surrogate calls ``extra``; None where it has no use for it.
            keep: like logp, bool. Tokens whose surrogate counts; the others keep their KL and their place in n.
            cu_seqlens: int [B + 1]. Where packed sequences begin and end; on logp's device, or on the host.
            num_items: number or 0-dim tensor in place of this batch's own count of tokens (or of sequences) in n.
            max_len: the length of ``seq_sum_over_max_len``; T if None.
            world_size, accumulation: the loss is multiplied by the one and divided by the other.
            full_kl: like logp. KL(π‖π_ref) of the tokens' distributions, with gradient, for kl="full": the value of
                ``rlfast.divergence(…, kind="reverse_kl")``.

        Returns:
            LossOutput(loss, metrics).

        Raises:
            ValueError, TypeError: a field is missing, nothing would read it, or it has another shape, dtype or device;
                the message names it. On a GPU, and in compiled code, what num_items and cu_seqlens hold is not looked
                at.
        """
        given = loss_inputs.Given(
            logp, old_logp, ref_logp, rollout_logp, adv, entropy, weights, extra, mask, keep, cu_seqlens, num_items,
            full_kl,
        )  # fmt: skip
        batch, settings = self.checked(given, max_len, world_size, accumulation)
        exact = loss_inputs.like_first("full_kl", full_kl, logp) if self.has_full_kl else None
        want = torch.is_grad_enabled()
        needs = tuple(want and x is not None and x.requires_grad for x in (logp, entropy, exact))
        out = self.launch(batch, settings, exact, needs, backends.requested())[0]
        return LossOutput(out.loss, LossMetrics(out.metrics))

    def launch(self, fields, settings: Settings, exact, needs: tuple, backend: str) -> tuple:
        """(the loss of checked fields, with its gradient by logp and entropy; the same of the exact KL alone, or None).

        Args:
            fields, settings: of a call.
            exact: KL(π‖π_ref) of the tokens, or None.
            needs: whether logp, entropy and the KL need a gradient.
            backend: that was asked for.
        """
        surrogate, kl, plan, _, hyper, bounds, *_ = self.prepared
        out = op.call(*fields, surrogate, kl, plan, settings, hyper, bounds, needs[:2], backend)
        if exact is None:
            return out, None
        term = full_kl.term(self.prepared, self._number("beta"), fields, settings, exact, needs[2], backend)
        return full_kl.added(out, term), term

    def checked(self, given: loss_inputs.Given, max_len, world_size, accumulation, first: str = "logp") -> tuple:
        """(the op's fields, its settings) of a call, or an error that names the argument."""
        plan, settings, needs, idle = self.prepared.plan, self.prepared.settings, *self.prepared[-2:]
        batch = loss_inputs.checked(given, self.name, needs, idle, (self.beta, self.entropy_coef), first)
        shape, cu_seqlens = given.logp.shape, given.cu_seqlens
        if len(shape) == 1 and cu_seqlens is None and row_wise(plan, settings):
            validate.fail("cu_seqlens", f"the boundaries of packed sequences: {self.name} is one of sequences", "None")
        if world_size != 1 or accumulation != 1:
            factor = validate.positive("world_size", world_size) / validate.positive("accumulation", accumulation)
            settings = settings._replace(factor=factor, entropy_factor=1.0 / accumulation)
        if plan.reduce == SEQ_SUM_OVER_MAX_LEN:
            if max_len is None and cu_seqlens is not None:
                validate.fail("max_len", "the length that packed sequences are divided by", "None")
            length = shape[-1] if max_len is None else max_len
            settings = settings._replace(max_len=validate.positive("max_len", length) if length else 1.0)
        return batch, settings

    @within
    def linear(
        self, hidden, weight, targets, bias=None, *, adv=None, old_logp=None, mask=None, ref_logp=None,
        rollout_logp=None, weights=None, extra=None, keep=None, cu_seqlens=None, num_items=None, max_len=None,
        world_size=1, accumulation=1, temperature=1.0, softcap=None, logit_scale=1.0, entropy=False,
        memory_budget=None, ref_hidden=None, ref_weight=None, ref_bias=None,
        lora=None, accumulate_grad=False, sync=False, process_group=None,
    ) -> LinearLossOutput:  # fmt: skip
        """The loss of a batch from the last hidden states and the head, without its logits.

            logp_t = log softmax((hidden_t·weightᵀ + bias)·logit_scale, soft-capped, ÷ temperature)[target_t]

        A chunk of the batch at a time: its logits, its log-probs, the loss's coefficients, and, while the logits are
        still there, ∂hidden, ∂weight and ∂bias: three products with the head, where a backward that comes later has to
        make the logits again.

        Args:
            hidden: [B, T, D], or [N, D] packed with ``cu_seqlens``; float32, bfloat16 or float16. The last hidden
                states, with gradient.
            weight: [V, D] of hidden's dtype: the head. Frozen if it needs no gradient, which then costs nothing.
            targets: [B, T] or [N] ids in [0, V); −100 marks a token that is not counted, as ``mask`` does.
            bias: [V] of hidden's dtype, or None.
            adv, old_logp, mask, ref_logp, rollout_logp, weights, extra, keep, cu_seqlens, num_items, max_len,
                world_size, accumulation: as when called, with the shape of targets for that of logp.
            temperature, softcap, logit_scale: as in ``rlfast.linear_token_logps``.
            entropy: whether the entropies come back; the loss makes its own for its bonus in any case.
            memory_budget: bytes of float32 logits that may be there at once; by default 512 MiB, or, up to 2 GiB, those
                of 512 rows or of the longest sequence. Chunks are as large as it allows; of a loss with a unit, weight
                or gate of sequences they end where sequences do. If a sequence does not fit then, or less than 512
                rows, the backward makes the logits again: four products.
            ref_hidden: like hidden, [·, E]: the reference's last hidden states, for kl="full": the KL of a token is
                KL(π‖π_ref) over the vocabulary, under the same temperature, soft-cap and scale.
            ref_weight: [V, E] of hidden's dtype: the reference's head.
            ref_bias: [V] of hidden's dtype, or None.
            lora: (a [r, D], b [V, r], scale) beside a frozen weight: the logits are hidden·(weight + scale·b·a)ᵀ +
                bias. The factors are of hidden's dtype, get their gradients, and there is none of the weight's size.
            accumulate_grad: the backward adds weight's gradient, in float32, straight to ``weight.main_grad`` if there
                is one, as Megatron's parameters have, else to ``weight.grad``; no copy of it in weight's dtype is
                made. Hooks of the parameter are not called. One backward only, by ``backward`` and not by
                ``torch.autograd.grad``, and not in compiled code.
            sync: tokens that are masked go into no product on a GPU either, for which the host waits to learn how many
                are left, once a chunk. On the CPU they never do.
            process_group: as in ``rlfast.linear_token_logps``: weight, bias, ref_weight, ref_bias and lora's b are this
                rank's rows, and so are their gradients. ``Gathered`` goes with no ``accumulate_grad``.

        Returns:
            LinearLossOutput(loss, metrics, logp, entropy). The gradients are made with the loss, and kept until its
            backward: call it under ``torch.no_grad()`` where no backward follows.

        Raises:
            ValueError, TypeError: as when called, and as in ``rlfast.linear_token_logps``.

        Reference:
            docs/fused_objective.md.

        Example:
            >>> hidden, head = torch.randn(2, 5, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
            >>> out = rlfast.loss("dapo").linear(hidden, head, torch.randint(100, (2, 5)), adv=torch.randn(2))
            >>> out.loss.backward()
            >>> head.grad.shape
            torch.Size([100, 16])
        """
        head = heads.Head(
            weight, bias, temperature, softcap, logit_scale, memory_budget, accumulate_grad, process_group
        )
        given = {
            "old_logp": old_logp, "ref_logp": ref_logp, "rollout_logp": rollout_logp, "adv": adv, "weights": weights,
            "extra": extra, "mask": mask, "keep": keep, "cu_seqlens": cu_seqlens, "num_items": num_items,
        }  # fmt: skip
        call, ref = (max_len, world_size, accumulation), (ref_hidden, ref_weight, ref_bias)
        tokens = policy_linear.checked(self, head, hidden, targets, given, call, ref, lora, sync, entropy)
        wanted = validate.flag("entropy", entropy)
        out, found = policy_linear.run(self, tokens, head.budget(), wanted)
        return LinearLossOutput(out.loss, LossMetrics(out.metrics), found.logp, found.entropy if wanted else None)
