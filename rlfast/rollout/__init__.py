"""Generation for RL: an engine in the trainer's process, and the same interface to engines elsewhere."""

from rlfast.rollout.api import Packed, Request, Rollout, RolloutBackend, SamplingParams, Score, pack
from rlfast.rollout.engine import Engine
from rlfast.rollout.parallel import RankPool
from rlfast.rollout.prefixes import restarts

__all__ = [
    "Engine",
    "Packed",
    "RankPool",
    "Request",
    "Rollout",
    "RolloutBackend",
    "SamplingParams",
    "Score",
    "pack",
    "restarts",
]
