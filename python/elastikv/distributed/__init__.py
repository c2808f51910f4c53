"""Ranks of a tensor-parallel group whose memory grows together or not at all, and models that are split among them."""

from elastikv.distributed.ranks import Ranks
from elastikv.distributed.slots import RankedSlots
from elastikv.distributed.tensor_parallel import split

__all__ = ["RankedSlots", "Ranks", "split"]
