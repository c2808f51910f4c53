"""Rows of a batch that become what others were: beam search, parallel sampling, batches that lose or gain rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from elastikv.hf.slots import upload

if TYPE_CHECKING:
    from elastikv.hf.slots import Slots


class Lineage:
    """How many tokens, from the first on, two rows are known to have in common, because one of them was the other."""

    def __init__(self) -> None:
        self._common: list[list[int]] = []

    def common(self, row: int, other: int) -> int:
        return self._common[row][other] if max(row, other) < len(self._common) else 0

    def rearranged(self, sources: Sequence[int], lengths: Sequence[int]) -> None:
        """Row i became what sources[i] was, and holds lengths[i] tokens."""
        self._common = [
            [lengths[i] if one == other else self.common(one, other) for other in sources]
            for i, one in enumerate(sources)
        ]

    def cropped(self, length: int) -> None:
        self._common = [[min(tokens, length) for tokens in row] for row in self._common]


def rearrange_even(slots: Slots, sources: Sequence[int], length: int, lineage: Lineage) -> None:
    """The first rows, all of which hold ``length`` tokens, become what rows ``sources`` were.

    Copies from the first token on in which some row differs from what it becomes: of beams that come from one another,
    little more than what has happened since. One layer is copied aside at a time.
    """
    changed = [row for row, source in enumerate(sources) if lineage.common(row, source) < length and row != source]
    if changed:
        start = min(lineage.common(row, sources[row]) for row in changed)
        for row in changed:
            slots.make_writable(row, start, length)
        places = upload(changed, slots.device)
        origins = upload([sources[row] for row in changed], slots.device)
        for layer in range(len(slots.shapes)):
            for used in slots.batch_view(layer, 0, len(sources), start, length):
                used.index_copy_(0, places, used.index_select(0, origins))
    lineage.rearranged(sources, [length] * len(sources))


def rearrange_each(slots: Slots, sources: Sequence[int], size: int) -> None:
    """Rows become what ``sources`` among the first ``size`` rows were, of any length and number.

    New rows beside old ones that stay share the memory of what they become, as far as extents reach.
    """
    count, before = len(sources), list(slots.lengths[:size])
    lengths = [before[source] for source in sources]
    changed = [row for row, source in enumerate(sources) if row != source]
    if slots.ranks is None and all(row >= size and slots.resident(row) == 0 for row in changed):
        made = []
        try:
            for row in changed:
                slots.fork(row, sources[row], lengths[row])
                made.append(row)
        except BaseException:
            slots.crop(made, [0] * len(made))
            raise
        return
    slots.grow(range(count), lengths)  # all or none, before anything changes
    for row in changed:
        slots.make_writable(row, 0, lengths[row])
    for layer in range(len(slots.shapes)):
        kept = {row: [part.clone() for part in slots.view(layer, row, 0, before[row])] for row in set(sources)}
        for row in changed:
            for target, part in zip(slots.view(layer, row, 0, lengths[row]), kept[sources[row]]):
                target.copy_(part)
    rows = max(count, size)
    slots.set_lengths(range(rows), lengths + [0] * (rows - count))
    slots.crop(range(rows), list(slots.lengths[:rows]))
