"""What the demo counts: physical memory as the pool reports it, and what transformers' own caches would hold.

Bytes of other caches are computed from shapes. b is the size of one token's keys and values in one layer, w a layer's
sliding window (absent: unlimited).

StaticCache     each running job owns a full row: the sum over layers of min(row, w) * b, where row is the longest job
                of the model's trace.
DynamicCache    each running job of n tokens owns the sum over layers of min(n, w - 1) * b; and as torch.cat builds the
                longer tensors beside the old ones, one layer of one job is there twice: the longest, min(n, w - 1) * b.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from elastikv.demo.roles import Role
from elastikv.hf.geometry import KVGeometry

if TYPE_CHECKING:
    import elastikv


def static_cache_bytes(geometry: KVGeometry, dtype: torch.dtype, *, row: int, jobs: int) -> int:
    tokens = sum(min(row, window or row) for window in geometry.windows)
    return jobs * tokens * geometry.layer_bytes(dtype)


def dynamic_cache_bytes(geometry: KVGeometry, dtype: torch.dtype, lengths: Sequence[int]) -> int:
    def kept(length: int, window: int | None) -> int:
        return length if window is None else min(length, window - 1)

    held = sum(kept(length, window) for length in lengths for window in geometry.windows)
    copied = max((kept(length, window) for length in lengths for window in geometry.windows), default=0)
    return (held + copied) * geometry.layer_bytes(dtype)


@dataclass(frozen=True)
class ModelSample:
    """One model at one moment: bytes, and jobs that run."""

    physical: int
    static_cache: int
    dynamic_cache: int
    running: int


@dataclass(frozen=True)
class Sample:
    """Everything at one moment, seconds of the trace after its start."""

    seconds: float
    models: tuple[ModelSample, ...]
    physical: int  # of the whole pool
    waiting: int


@dataclass
class Service:
    """A role at work: its handle on the pool, its row, its counts. Owned by the server's thread."""

    role: Role
    handle: elastikv.Model
    row: int  # tokens
    jobs: int
    done: int = 0
    tokens: int = 0

    def sample(self, lengths: Sequence[int]) -> ModelSample:
        """lengths: tokens in the cache of each running job."""
        geometry, dtype = self.role.geometry, self.role.dtype
        return ModelSample(
            physical=self.handle.stats().physical_usage,
            static_cache=static_cache_bytes(geometry, dtype, row=self.row, jobs=len(lengths)),
            dynamic_cache=dynamic_cache_bytes(geometry, dtype, lengths),
            running=len(lengths),
        )


@dataclass
class Timeline:
    """The samples of a run, one a round, and their peaks."""

    samples: list[Sample] = field(default_factory=list)

    def peak(self, field_name: str, model: int | None = None) -> int:
        """Highest value of a ModelSample's field: of one model, or of all together at one moment."""
        return max(
            (
                sum(getattr(one, field_name) for i, one in enumerate(sample.models) if model in (None, i))
                for sample in self.samples
            ),
            default=0,
        )
