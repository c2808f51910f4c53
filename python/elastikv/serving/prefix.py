"""The prompts and answers that rows still hold: who shares a prefix with one of them does not compute it again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from elastikv.hf.slots import Slots

Tokens = npt.NDArray[np.int64]


@dataclass
class PrefixCounts:
    """What the index was good for. tokens_saved: of prompts, not computed again."""

    lookups: int = 0
    hits: int = 0
    tokens_saved: int = 0
    kept: int = 0
    evicted: int = 0


def common_prefix(first: Tokens, second: Tokens) -> int:
    """How many tokens the two have in common from their beginning on."""
    count = min(len(first), len(second))
    differ = first[:count] != second[:count]
    return int(differ.argmax()) if differ.any() else count


class PrefixIndex:
    """Rows that nobody writes to any more, by the tokens that they hold; the least recently used goes first.

    Their memory is the model's like any other, and goes back when the row is evicted, as far as no fork shares it. Not
    thread-safe.
    """

    def __init__(self, slots: Slots, *, entries: int, shortest: int = 32) -> None:
        self.entries = entries
        self.shortest = shortest  # tokens in common that are worth a fork
        self.counts = PrefixCounts()
        self._slots = slots
        self._rows: OrderedDict[int, Tokens] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def bytes(self) -> int:
        """Of the tokens that it holds, each entry for itself. May be read by any thread."""
        return sum(len(tokens) for tokens in list(self._rows.values())) * self._slots.token_bytes

    def longest(self, prompt: Sequence[int], running: Iterable[tuple[int, Tokens]] = ()) -> tuple[int, int]:
        """(row, tokens) of the longest prefix that some row has; (-1, 0) for none that is worth it.

        running: (row, its tokens) of rows that others still append to. The prompt's last token does not count, as
        somebody must ask the model what follows it.
        """
        if self.entries == 0:
            return -1, 0
        wanted = np.asarray(prompt[:-1], dtype=np.int64)
        found = [(common_prefix(wanted, tokens), row) for row, tokens in self._rows.items()]
        found += [(common_prefix(wanted, tokens), row) for row, tokens in running]
        count, row = max(found, default=(0, -1))
        self.counts.lookups += 1
        return (row, count) if count >= self.shortest else (-1, 0)

    def used(self, row: int, count: int) -> None:
        """Somebody took so many tokens of this row."""
        self.counts.hits += 1
        self.counts.tokens_saved += count
        if row in self._rows:
            self._rows.move_to_end(row)

    def keep(self, row: int, tokens: Sequence[int]) -> None:
        """Takes over a row, which holds these tokens and is nobody else's. One that is in another is let go."""
        held = np.asarray(tokens, dtype=np.int64)
        if len(held) < self.shortest or self.entries == 0:
            self._slots.release(row)
            return
        for other, its in list(self._rows.items()):
            shared = common_prefix(held, its)
            if shared == len(held):
                self._rows.move_to_end(other)
                self._slots.release(row)
                return
            if shared == len(its):
                self._release(other)
        while len(self._rows) >= self.entries:
            self.evict_one()
        self._slots.crop([row], [len(held)])
        self._rows[row] = held
        self.counts.kept += 1

    def evict_one(self) -> int:
        """Lets the least recently used one go; the bytes that it held, 0 if there is none."""
        if not self._rows:
            return 0
        row = next(iter(self._rows))
        held = len(self._rows[row]) * self._slots.token_bytes
        self._release(row)
        self.counts.evicted += 1
        return held

    def evict(self, wanted: int) -> int:
        """As many as hold so many bytes together; returns what they held."""
        freed = 0
        while freed < wanted and self._rows:
            freed += self.evict_one()
        return freed

    def clear(self) -> None:
        while self._rows:
            self.evict_one()

    def _release(self, row: int) -> None:
        del self._rows[row]
        self._slots.release(row)
