"""verl's functions, under verl's names and signatures, on rlfast's kernels, and what of verl they replace.

    verl_functional   of logits, of hidden states and of masks
    verl_losses       the policy losses, the critic's, ``agg_loss`` and ``kl_penalty``
    verl_advantages   the estimators of advantages
    verl_megatron     of logits that Megatron's ranks share

``replacements`` is what ``rlfast.patch("verl")`` puts in place. The functions need no verl and can be called directly.
"""

from __future__ import annotations

import importlib
import inspect
import sys

from rlfast.integrations.patching import Swap, or_original, refuse_strange, refuse_untested, say_once, takes
from rlfast.integrations.verl_advantages import (
    baseline_unsupported,
    compute_gae_advantage_return,
    compute_gdpo_outcome_advantage,
    compute_gpg_outcome_advantage,
    compute_grpo_outcome_advantage,
    compute_grpo_passk_outcome_advantage,
    compute_grpo_vectorized_outcome_advantage,
    compute_multi_turn_optimal_token_baseline_advantage,
    compute_opo_outcome_advantage,
    compute_optimal_token_baseline_advantage,
    compute_reinforce_plus_plus_baseline_outcome_advantage,
    compute_reinforce_plus_plus_outcome_advantage,
    compute_remax_outcome_advantage,
    compute_rloo_outcome_advantage,
    compute_rloo_vectorized_outcome_advantage,
    gae_unsupported,
    remax_unsupported,
    returns_unsupported,
    rows_unsupported,
    tokens_unsupported,
    turns_unsupported,
)
from rlfast.integrations.verl_functional import (
    FusedLinearForPPO,
    FusedLinearForPPOFunction,
    calculate_sum_pi_squared_from_logits,
    chunks_unsupported,
    cross_entropy_unsupported,
    entropy_from_logits,
    entropy_from_logits_with_chunking,
    fused_linear_for_ppo,
    head_unsupported,
    linear_cross_entropy,
    logits_unsupported,
    logprobs_from_logits,
    logprobs_from_logits_v2,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
    squares_unsupported,
    sum_unsupported,
    values_unsupported,
)
from rlfast.integrations.verl_losses import (
    agg_loss,
    agg_unsupported,
    compute_policy_loss_cispo,
    compute_policy_loss_clip_cov,
    compute_policy_loss_dppo_kl,
    compute_policy_loss_dppo_tv,
    compute_policy_loss_dro,
    compute_policy_loss_geo_mean,
    compute_policy_loss_gpg,
    compute_policy_loss_gspo,
    compute_policy_loss_kl_cov,
    compute_policy_loss_reinforce,
    compute_policy_loss_sapo,
    compute_policy_loss_vanilla,
    compute_value_loss,
    kl_penalty,
    kl_unsupported,
    policy_unsupported,
    value_unsupported,
)
from rlfast.integrations.verl_megatron import (
    MODULE,
    entropy_unsupported,
    vocab_parallel_entropy,
    vocab_parallel_entropy_with_chunking,
    vocab_parallel_log_probs_from_logits,
    vocab_parallel_sum_pi_squared,
)
from rlfast.integrations.verl_megatron import squares_unsupported as shared_squares_unsupported

TESTED = ("0.9",)
CORE = "verl.trainer.ppo.core_algos"
FUNCTIONAL = "verl.utils.torch_functional"
FUSED = "verl.utils.experimental.torch_functional"
CROSS_ENTROPY = "verl.utils.kernel.linear_cross_entropy"

# Ours, under the name that verl has for it, and why a call is not ours to take.
PLACES = {
    FUNCTIONAL: (
        (logprobs_from_logits, logits_unsupported),
        (logprobs_from_logits_v2, logits_unsupported),
        (entropy_from_logits, logits_unsupported),
        (entropy_from_logits_with_chunking, chunks_unsupported),
        (calculate_sum_pi_squared_from_logits, squares_unsupported),
        (masked_sum, sum_unsupported),
        (masked_mean, values_unsupported),
        (masked_var, values_unsupported),
        (masked_whiten, values_unsupported),
    ),
    CORE: (
        (agg_loss, agg_unsupported),
        (compute_value_loss, value_unsupported),
        (kl_penalty, kl_unsupported),
        (compute_policy_loss_vanilla, policy_unsupported("vanilla")),
        (compute_policy_loss_dppo_tv, policy_unsupported("dppo_tv")),
        (compute_policy_loss_dppo_kl, policy_unsupported("dppo_kl")),
        (compute_policy_loss_gspo, policy_unsupported("gspo")),
        (compute_policy_loss_sapo, policy_unsupported("sapo")),
        (compute_policy_loss_gpg, policy_unsupported("gpg")),
        (compute_policy_loss_clip_cov, policy_unsupported("clip_cov")),
        (compute_policy_loss_kl_cov, policy_unsupported("kl_cov")),
        (compute_policy_loss_geo_mean, policy_unsupported("geo_mean")),
        (compute_policy_loss_dro, policy_unsupported("dro")),
        (compute_policy_loss_cispo, policy_unsupported("cispo")),
        (compute_policy_loss_reinforce, policy_unsupported("reinforce")),
        (compute_gae_advantage_return, gae_unsupported),
        (compute_grpo_outcome_advantage, rows_unsupported),
        (compute_grpo_vectorized_outcome_advantage, rows_unsupported),
        (compute_gdpo_outcome_advantage, tokens_unsupported),
        (compute_grpo_passk_outcome_advantage, rows_unsupported),
        (compute_reinforce_plus_plus_baseline_outcome_advantage, tokens_unsupported),
        (compute_rloo_outcome_advantage, rows_unsupported),
        (compute_rloo_vectorized_outcome_advantage, rows_unsupported),
        (compute_opo_outcome_advantage, tokens_unsupported),
        (compute_reinforce_plus_plus_outcome_advantage, returns_unsupported),
        (compute_remax_outcome_advantage, remax_unsupported),
        (compute_gpg_outcome_advantage, rows_unsupported),
        (compute_optimal_token_baseline_advantage, baseline_unsupported),
        (compute_multi_turn_optimal_token_baseline_advantage, turns_unsupported),
    ),
    MODULE: (
        (vocab_parallel_log_probs_from_logits, logits_unsupported),
        (vocab_parallel_entropy, entropy_unsupported),
        (vocab_parallel_entropy_with_chunking, entropy_unsupported),
        (vocab_parallel_sum_pi_squared, shared_squares_unsupported),
    ),
}
AWAITED = (MODULE,)  # imported by Megatron's workers alone
REGISTRIES = ("POLICY_LOSS_REGISTRY", "ADV_ESTIMATOR_REGISTRY")
OWN_NAME = "rlfast_{}"  # of a registered function, beside verl's
# Estimators that verl's trainer knows by their names, and gives what it gives no other: they have no second name.
BY_NAME = ("gae", "grpo", "gdpo", "remax", "optimal_token_baseline", "tir_optimal_token_baseline")


def replacements(untested: bool):
    """What to swap in the installed verl: a function that lists the swaps, its version, and what brings more of them.

    Raises:
        RuntimeError: the version is not one of ``TESTED`` and ``untested`` is False, or a signature is not as known.
            The function raises it too, of what is imported later.
    """
    version = importlib.import_module("verl").__version__
    refuse_untested("verl", version, TESTED, untested)
    strange: list[str] = []
    fixed = [swap for name in PLACES if name not in AWAITED for swap in _functions(name, strange)]
    fixed += _registered({id(swap.original): swap.replacement for swap in fixed})
    fixed += _heads(strange)
    refuse_strange("verl", version, strange, untested)
    if not fixed:
        raise RuntimeError(f'rlfast.patch("verl"): nothing in verl {version} has a signature that rlfast knows')
    later: dict[str, list[Swap]] = {}

    def swaps() -> list[Swap]:
        for name in AWAITED:
            if name in sys.modules and name not in later:
                odd: list[str] = []
                later[name] = _functions(name, odd)
                refuse_strange("verl", version, odd, untested)
        return fixed + [swap for made in later.values() for swap in made]

    return swaps, version, AWAITED


def _module(name: str):
    """A module of verl's, or None where it cannot be imported, which is said once."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        say_once(f"{name} is left alone: it cannot be imported: {error}")
        return None


def _functions(name: str, strange: list[str]) -> list[Swap]:
    """The swaps of a module's functions, in every module of verl that holds them."""
    module, swaps = _module(name), []
    for ours, why_not in PLACES[name] if module is not None else ():
        original = getattr(module, ours.__name__, None)
        if takes(original, inspect.signature(ours).parameters, f"{name}.{ours.__name__}", strange):
            swaps.append(Swap(original, or_original(ours, original, why_not), prefix="verl"))
    return swaps


class Registry:
    """A registry of verl's whose entries are attributes: to set one to None takes it out.

    What somebody registers after we did stays theirs.
    """

    def __init__(self, entries: dict, name: str):
        vars(self).update(entries=entries, put={}, __module__=CORE, __qualname__=name)

    def __getattr__(self, name):
        return self.entries.get(name)

    def __setattr__(self, name, value):
        if name in self.put and self.entries.get(name) is not self.put[name]:
            return
        self.put[name] = value
        self.entries[name] = value
        if value is None:
            del self.entries[name]


def _registered(replacement: dict[int, object]) -> list[Swap]:
    """The registries' entries that are replaced functions, under verl's names and again under our own."""
    swaps, core = [], _module(CORE)
    for registry in REGISTRIES if core is not None else ():
        owner = Registry(getattr(core, registry), registry)
        for name, original in list(owner.entries.items()):
            ours = replacement.get(id(original))
            if ours is not None:
                swaps.append(Swap(original, ours, owner=owner, name=name))
                if name not in BY_NAME:
                    swaps.append(Swap(None, ours, owner=owner, name=OWN_NAME.format(name)))
    return swaps


def _heads(strange: list[str]) -> list[Swap]:
    """The fused heads: verl's module asks its autograd function, unless its user asked for Liger's."""
    swaps, fused, kernel = [], _module(FUSED), _module(CROSS_ENTROPY)
    head = getattr(fused, "FusedLinearForPPOFunction", None)
    wanted = inspect.signature(fused_linear_for_ppo).parameters
    name = f"{FUSED}.FusedLinearForPPOFunction.forward"
    if fused is not None and takes(getattr(head, "forward", None), wanted, name, strange, skip="ctx"):
        apply = or_original(fused_linear_for_ppo, head.apply, head_unsupported)
        ours = type(head.__name__, (head,), {"apply": staticmethod(apply), "__doc__": head.__doc__})
        swaps.append(Swap(head, ours, prefix="verl"))
    head = getattr(kernel, "LinearCrossEntropy", None)
    wanted = inspect.signature(linear_cross_entropy).parameters
    name = f"{CROSS_ENTROPY}.LinearCrossEntropy.forward"
    if kernel is not None and takes(getattr(head, "forward", None), wanted, name, strange, skip="ctx"):
        original = kernel.linear_cross_entropy  # the class's ``apply``, which others import by value
        ours = or_original(linear_cross_entropy, original, cross_entropy_unsupported)
        swaps.append(Swap(original, ours, prefix="verl"))
    return swaps


__all__ = [
    "FusedLinearForPPO",
    "FusedLinearForPPOFunction",
    *(ours.__name__ for place in PLACES.values() for ours, _ in place),
]
