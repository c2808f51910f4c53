"""Memory for rows that grow by a token a step, always mapped before it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from elastikv.distributed.slots import RankedSlots
from elastikv.errors import OutOfPhysicalMemory

if TYPE_CHECKING:
    import elastikv
    from elastikv.hf.slots import Slots

#: Tokens that are claimed ahead of the longest step, so that the books are opened once in so many steps.
SLACK = 32


class Room:
    """Says before each step that there is memory for one more token in every row, and makes it so.

    Claims a few tokens ahead, and has the pool's worker map an eighth beyond: in steady decode the calling thread finds
    its pages mapped. `used` are upper bounds of the rows' lengths: the device may know of rows that have ended already.
    bounds: what the rows grow to at most; beside that they have a place to write to once they have ended.
    """

    def __init__(self, slots: Slots, rows: Sequence[int], used: Sequence[int], bounds: Sequence[int]) -> None:
        self._slots = slots
        self._rows = list(rows)
        self._bounds = list(bounds)
        self.used = list(used)
        self._ahead = [0] * len(self._rows)  # what the worker was asked to map
        self._steps = 0  # so many more steps have room

    @property
    def longest(self) -> int:
        return max(self.used)

    def make(self) -> None:
        """Room for one more token in each row; nothing changes if there is none. Raises OutOfPhysicalMemory."""
        if self._steps > 0:
            return
        self._claim()
        tensor = self._tensor
        held = [tensor.resident(row) for row in self._rows]
        self._steps = min(tokens - used for tokens, used in zip(held, self.used))
        # What the next claim may ask for must be on its way already; then an eighth more, so that extents are few.
        late = [
            index
            for index, tokens in enumerate(held)
            if self._ahead[index] < tokens + SLACK and tokens <= self._bounds[index]
        ]
        for index in late:
            wanted = max(held[index] + 2 * SLACK, self.used[index] + SLACK + self._share(index))
            self._ahead[index] = min(wanted, tensor.max_tokens)
        late = [index for index in late if self._ahead[index] > held[index]]
        if late:
            tensor.prefetch([self._rows[index] for index in late], [self._ahead[index] for index in late])

    def _share(self, index: int) -> int:
        """Tokens that are worth an extent: an eighth of the row, as far as it is its own. Forks share extents whole."""
        share = (self.used[index] - self._tensor.forked(self._rows[index])) // 8
        largest = self._slots.largest_extent // self._tensor.token_bytes
        return min(share, largest) if largest else share

    def _claim(self) -> None:
        for slack in (SLACK, 1):
            try:
                self._tensor.grow(self._rows, self._wanted(slack), exact=True)
                break
            except OutOfPhysicalMemory:
                if slack == 1:
                    raise

    def _wanted(self, slack: int) -> list[int]:
        return [min(used + slack, self._tensor.max_tokens) for used in self.used]

    @property
    def _tensor(self) -> elastikv.SlotTensor | RankedSlots:
        assert self._slots.tensor is not None
        return self._slots.tensor

    def set_row(self, index: int, row: int, used: int, bound: int) -> None:
        """Another row in this place."""
        self._rows[index], self.used[index], self._bounds[index], self._ahead[index] = row, used, bound, 0
        self._steps = 0

    def took(self, ended: Sequence[bool]) -> None:
        """A step ran; rows that had ended before it did not grow."""
        for index, end in enumerate(ended):
            if not end:
                self.used[index] = min(self.used[index] + 1, self._bounds[index])
        self._steps -= 1


class RankedRoom(Room):
    """The same where ranks must agree: they are asked some steps before it is needed, so that no step waits for it."""

    _asked = False

    def make(self) -> None:
        if self._steps == 0:
            self._asked = False
            super().make()
        elif self._steps <= SLACK // 2 and not self._asked:
            self._asked = True
            tensor = self._tensor
            assert isinstance(tensor, RankedSlots)
            tensor.begin_growth(self._rows, self._wanted(self._steps + SLACK))
