"""Ranks of a tensor-parallel group whose tensors grow together or not at all."""

from elastikv.distributed.ranks import Ranks

__all__ = ["Ranks"]
