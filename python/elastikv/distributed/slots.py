"""Rows of slots that have the same memory on every rank of a group."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from elastikv import _core
from elastikv.errors import InvalidArgument, OutOfPhysicalMemory, RankFailed

if TYPE_CHECKING:
    import torch

    from elastikv.distributed.ranks import Proposal, Ranks

Rows = Sequence[int]


class RankedSlots:
    """A SlotTensor whose rows grow and shrink on all ranks or on none.

    Every rank must make the same calls in the same order. A call that changes no rank's memory costs nothing, others
    one small collective each. Memory is taken exactly; what `prefetch` maps ahead is idle memory of the rank, like what
    it keeps parked. The rank's own errors are raised as they are; others' as Ranks.grow has it. Not thread-safe.
    """

    def __init__(self, slots: _core.SlotTensor, ranks: Ranks) -> None:
        self.slots = slots
        self.ranks = ranks
        self._pending: Proposal | None = None
        self._before: dict[int, int] = {}  # tokens of the rows that a pending growth has, without it

    # ---- changes that all ranks make

    def grow(self, rows: Rows, tokens: Rows, *, exact: bool = False) -> None:
        """As SlotTensor.grow, always exactly. Raises on every rank alike: OutOfPhysicalMemory, RankFailed."""
        self.settle()
        if self._lacks(rows, tokens):
            self._propose(rows, tokens).finish()

    def begin_growth(self, rows: Rows, tokens: Rows) -> None:
        """Takes the memory, asks the other ranks, and does not wait for them: `settle`, or the next change, does.

        If it fails for want of memory nothing has changed, and nobody is told: whoever needs it calls `grow`.
        """
        self.settle()
        if self._lacks(rows, tokens):
            before = {row: self.slots.resident(row) for row in rows}
            self._pending = self._propose(rows, tokens)
            self._before = before

    def settle(self) -> None:
        """Waits for what `begin_growth` asked. Raises RankFailed, and the rank's own error."""
        pending, self._pending, self._before = self._pending, None, {}
        if pending is None:
            return
        with contextlib.suppress(OutOfPhysicalMemory):
            pending.finish()

    def shrink(self, rows: Rows, tokens: Rows) -> None:
        """As SlotTensor.shrink. Raises InvalidArgument on all ranks where any holds views."""
        self.settle()
        if not any(self.slots.resident(row) > length for row, length in zip(rows, tokens)):
            return
        try:
            self.ranks.propose("shrink", [*rows, *tokens], lambda: _Shrinking(self.slots, rows, tokens)).finish()
        except RankFailed as error:
            if error.rank is None:
                raise
            raise InvalidArgument(f"rank {error.rank} can't shrink its rows: it holds views of them") from error

    @property
    def views(self) -> int:
        """Tensors on the memory besides the windows, of the rank that has most. A collective."""
        self.settle()
        return self.ranks.most(self.slots.views)

    def fork(self, to: int, source: int, tokens: int) -> None:
        raise InvalidArgument("rows of a group of ranks can't fork: each rank would copy and share by itself")

    def make_writable(self, row: int, begin: int, end: int) -> None:
        """Nothing: no row shares memory with another."""

    # ---- the rank's own

    def prefetch(self, rows: Rows, tokens: Rows) -> None:
        self.slots.prefetch(rows, tokens)

    def window(self, offset: int, shape: Sequence[int]) -> torch.Tensor:
        return self.slots.window(offset, shape)

    def resident(self, row: int) -> int:
        """Tokens that the row has memory for, but for those of a growth that is not settled."""
        held = self._before.get(row)
        return self.slots.resident(row) if held is None else held

    def forked(self, row: int) -> int:
        return 0  # none do

    @property
    def settled(self) -> bool:
        """Whether nothing is being asked."""
        return self._pending is None

    def record_stream(self, stream: torch.cuda.Stream | int) -> None:
        self.slots.record_stream(stream)

    @property
    def rows(self) -> int:
        return self.slots.rows

    @property
    def max_tokens(self) -> int:
        return self.slots.max_tokens

    @property
    def pitch(self) -> int:
        return self.slots.pitch

    @property
    def token_bytes(self) -> int:
        return self.slots.token_bytes

    @property
    def claimed_bytes(self) -> int:
        return self.slots.claimed_bytes

    @property
    def model(self) -> _core.Model:
        return self.slots.model

    # ---- inside

    def _lacks(self, rows: Rows, tokens: Rows) -> bool:
        """Whether any row has less; the same on all ranks, as their rows are."""
        return any(self.slots.resident(row) < wanted for row, wanted in zip(rows, tokens))

    def _propose(self, rows: Rows, tokens: Rows) -> Proposal:
        rows, tokens = list(rows), list(tokens)
        return self.ranks.propose("grow", [*rows, *tokens], lambda: _core.StagedSlots(self.slots, rows, tokens))


class _Shrinking:
    """Nothing is done before all agree, as a shrink can't be undone."""

    def __init__(self, slots: _core.SlotTensor, rows: Rows, tokens: Rows) -> None:
        self._slots, self._rows, self._tokens = slots, rows, tokens
        if slots.views:
            raise InvalidArgument(f"shrink while {slots.views} views are held: they could reach into memory that goes")

    def commit(self) -> None:
        self._slots.shrink(self._rows, self._tokens)

    def drop(self) -> None:
        pass
