"""Over ranks: what ``process_group=`` takes, on ``torch.distributed`` as it is (docs/distributed.md)."""

from rlfast.distributed.gather import Gathered, gathered
from rlfast.distributed.groups import VocabParallel

__all__ = ["Gathered", "VocabParallel", "gathered"]
