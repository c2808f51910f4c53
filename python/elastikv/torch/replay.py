"""Replays a log of allocations on torch's current CUDA allocator, or on a heap on host memory, and times it.

A replay has no device work: it shows what an allocator costs and how much memory it takes, not what a model costs.
Memory of private pools is replayed as common memory. Where a block's free was completed late, another stream used it;
which one, torch does not tell, so the replay records a stream that nothing else uses.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from elastikv import _core
from elastikv.errors import InvalidArgument
from elastikv.torch.allocation_log import BLOCK_ACTIONS, AllocationEvent

ALLOCATE, FREE, RECORD_STREAM = 0, 1, 2
UNIT = 512  # bytes; all allocators here round sizes up to a multiple


@dataclass
class Operations:
    """What a replay does, one operation an index: action, block, bytes (0 but for allocations), stream."""

    actions: array[int] = field(default_factory=lambda: array("B"))
    blocks: array[int] = field(default_factory=lambda: array("I"))
    sizes: array[int] = field(default_factory=lambda: array("Q"))
    streams: array[int] = field(default_factory=lambda: array("H"))

    def __len__(self) -> int:
        return len(self.actions)

    def add(self, action: int, block: int, size: int = 0, stream: int = 0) -> None:
        self.actions.append(action)
        self.blocks.append(block)
        self.sizes.append(size)
        self.streams.append(stream)

    def peak_allocated(self) -> int:
        """The most bytes that are allocated at once, each block rounded up to 512."""
        held: dict[int, int] = {}
        now = peak = 0
        for action, block, size in zip(self.actions, self.blocks, self.sizes):
            if action == ALLOCATE:
                held[block] = -(-size // UNIT) * UNIT
                now += held[block]
                peak = max(peak, now)
            elif action == FREE:
                now -= held.pop(block)
        return peak

    def replay(self) -> _core.Replay:
        """Checked and packed. Raises InvalidArgument, naming the operation that makes no sense."""
        return _core.Replay(self.actions, self.blocks, self.sizes, self.streams)


def operations_of(events: Iterable[AllocationEvent], device: int | None = None) -> Operations:
    """The operations that a log tells of, on one device (default: that of its first event)."""
    operations = Operations()
    numbers: dict[int, int] = {}  # of the log's blocks in the replay
    of_device = [event for event in events if event.action in BLOCK_ACTIONS]
    if device is None and of_device:
        device = of_device[0].device
    of_device = [event for event in of_device if event.device == device and (event.size or event.action != "alloc")]
    elsewhere = max((event.stream for event in of_device), default=0) + 1
    late = {
        event.id
        for before, event in pairwise(of_device)
        if event.action == "free_completed" and not (before.action == "free_requested" and before.id == event.id)
    }
    for event in of_device:
        if event.id is None:
            raise InvalidArgument(f"{event.action} without an id")
        if event.action == "alloc":
            if event.id in numbers:
                raise InvalidArgument(f"block {event.id} is allocated a second time")
            numbers[event.id] = len(numbers)
            operations.add(ALLOCATE, numbers[event.id], event.size, event.stream)
        elif event.action == "free_requested" and event.id in numbers:
            if event.id in late:
                operations.add(RECORD_STREAM, numbers[event.id], stream=elsewhere)
            operations.add(FREE, numbers[event.id])
    return operations
