"""What can go wrong. Every class derives from `VmmError` and from the built-in exception that fits.

The message says what was asked, and what would be right; the attributes named below carry the numbers.
"""

from __future__ import annotations

import torch

__all__ = [
    "AlreadyMapped",
    "CudaError",
    "DeviceUnavailable",
    "HandoffFailed",
    "InvalidAlignment",
    "InvalidArgument",
    "InvalidOffset",
    "InvalidPageSize",
    "InvalidSize",
    "LedgerError",
    "MappingFailed",
    "ModelAlreadyExists",
    "ModelNotFound",
    "ModelPaused",
    "NotMapped",
    "OutOfPhysicalMemory",
    "OutOfVirtualMemory",
    "PoolClosed",
    "RankFailed",
    "UnmappingFailed",
    "VmmError",
    "WaitCancelled",
]


class VmmError(RuntimeError):
    """Base of all errors that elastikv raises."""


class CudaError(VmmError):
    """A driver call failed for a reason that no other class names. `code` is the CUresult, 0 if there is none."""

    code: int = 0


class DeviceUnavailable(VmmError):
    """No driver, no such device, or a device without virtual memory management."""


class OutOfVirtualMemory(VmmError, MemoryError):
    """No addresses are left for a reservation of `requested` bytes."""

    requested: int = 0


class OutOfPhysicalMemory(VmmError, torch.OutOfMemoryError, MemoryError):
    """`requested` bytes were lacking and `available` left, after everything reclaimable had been reclaimed."""

    requested: int = 0
    available: int = 0


class InvalidOffset(VmmError, ValueError):
    """[offset, offset + size) is not within the capacity."""

    offset: int = 0
    size: int = 0
    capacity: int = 0


class InvalidSize(VmmError, ValueError):
    """A size of zero, below zero, or beyond 64 bits."""


class InvalidAlignment(VmmError, ValueError):
    """An address or offset that is not on the boundary that it needs."""


class InvalidPageSize(VmmError, ValueError):
    """Not a power of two, or not a multiple of the device's granularity."""


class InvalidArgument(VmmError, ValueError):
    """Any other value that can't be served; the message says what would be right."""


class AlreadyMapped(VmmError, ValueError):
    """Some of the range is allocated already."""


class NotMapped(VmmError, ValueError):
    """Some of the range is not allocated."""


class MappingFailed(VmmError):
    """The driver did not map memory or give access to it."""


class UnmappingFailed(VmmError):
    """The driver did not unmap memory."""


class ModelNotFound(VmmError, KeyError):
    """No model of that name is registered."""

    __str__ = Exception.__str__  # KeyError's would put the message in quotes


class ModelAlreadyExists(VmmError, ValueError):
    """A model of that name is registered already."""


class ModelPaused(VmmError):
    """Used while its memory is paused; `Model.resume()` comes first."""


class WaitCancelled(VmmError):
    """A wait for memory that was called off."""


class LedgerError(VmmError):
    """A ledger that processes share can't be used: damaged, of another version or user, full, or not there."""


class HandoffFailed(VmmError):
    """Memory of another process can't be had: it has exited, does not answer, or has taken the memory back."""


class PoolClosed(VmmError):
    """Used after `close()`, or in a process forked from the one that made the pool."""


class RankFailed(VmmError):
    """Another rank of a group did not do its part, so nobody did. `rank` is which, None where that is not known."""

    def __init__(self, message: str, *, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank
