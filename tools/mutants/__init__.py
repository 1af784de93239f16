"""The mistakes that ``mutate.py`` plants, a file for each family of ops; and two in every formula."""

from mutants import (
    advantages,
    attention,
    fused,
    integrations,
    linear,
    log_probs,
    preferences,
    ranked_loss,
    ranks,
    rollout,
    sampling,
    shared_vocabulary,
    token_loss,
)
from mutants.formulas import FORMULAS

_FAMILIES = (
    log_probs,
    linear,
    token_loss,
    preferences,
    ranked_loss,
    ranks,
    advantages,
    attention,
    fused,
    integrations,
    rollout,
    sampling,
    shared_vocabulary,
)
CPP = [mutant for family in _FAMILIES for mutant in getattr(family, "CPP", ())]
CUDA = [mutant for family in _FAMILIES for mutant in getattr(family, "CUDA", ())]
PYTHON = [*(mutant for family in _FAMILIES for mutant in getattr(family, "PYTHON", ())), *FORMULAS]
