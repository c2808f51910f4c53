"""Slots: rows of a SlotTensor that hold the keys and values of one sequence each."""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

import elastikv
from elastikv.distributed.slots import RankedSlots
from elastikv.errors import InvalidArgument
from elastikv.hf import flash

#: Bytes of memory that come in one piece at most, so that rows can be forked: a fork shares whole pieces.
LARGEST_EXTENT = 128 << 20

if TYPE_CHECKING:
    from elastikv.distributed import Ranks
    from elastikv.hf.geometry import KVGeometry, LayerShape


def upload(numbers: Sequence[int] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Integers as an int64 tensor on the device, without waiting for the device."""
    host = torch.as_tensor(numbers, dtype=torch.int64)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


class Slots:
    """Sequences of different lengths, one a row of ``max_tokens`` addresses, of which the used front has memory.

    Layout: ``[row, token, layer, key or value, head, dim]``. One token's layers lie side by side, so a page serves all
    layers of its tokens. ``lengths`` says how many tokens of each row count; ``device_lengths`` (int32) says the same
    on the device, of which `sync_lengths` brings ``all_lengths`` up to date, with the idle row's behind. Who changes
    them there follows on the host. ``no_mask``, ``[1, 1, 1, 1]``, is for models that want a mask where there is none.

    keys[layer] and values[layer] are windows ``[row * pitch + token, head, dim]`` over all addresses, of which only the
    front of each row may be touched: they are for kernels that are told the lengths. `view` gives exact views.

    Rows have addresses for one token more than max_tokens: a place to write to for rows that take part in a step and
    have ended. And there is one row more, `idle_row`, for places in a step that no sequence takes; it stays empty.

    ranks: of a parallel group, which all make the same calls on slots like these: their rows have the same memory.
    largest_extent: bytes of memory that come in one piece at most, as rows that are forked share whole pieces; 0: any,
    for rows that never are.

    Memory errors leave everything as it was. Not thread-safe.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        *,
        model: elastikv.Model,
        rows: int,
        max_tokens: int,
        dtype: torch.dtype | None = None,
        ranks: Ranks | None = None,
        largest_extent: int = LARGEST_EXTENT,
    ) -> None:
        if rows < 1 or max_tokens < 1:
            raise InvalidArgument(f"slots need at least one row and one token, not {rows} and {max_tokens}")
        self.geometry = geometry
        self.model = model
        self.device = torch.device(model.device)
        self.rows = rows
        self.max_tokens = max_tokens
        self.dtype = dtype
        self.ranks = ranks
        self.tensor: elastikv.SlotTensor | RankedSlots | None = None
        self.largest_extent = largest_extent
        self.shapes: tuple[LayerShape, ...] = ()
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.lengths = [0] * rows
        self.over_views: list[str] = []  # by layer, why the flash op does not serve it; empty if it does
        self.generation = 0  # changes when the addresses do
        self._stale: set[int] = set()  # rows whose length the device does not know yet
        self._cropped: set[int] = set()  # rows that may go on below a fork
        self._free = list(range(rows))
        if dtype is not None and geometry.shapes is not None:
            self.allocate(geometry.shapes, dtype)

    def allocate(self, shapes: Sequence[LayerShape], dtype: torch.dtype) -> None:
        """Reserves the addresses, once shapes and dtype are known. Nothing is resident yet."""
        # Not inference tensors, so that both worlds may write to them.
        with torch.inference_mode(False):
            elements = sum(shape.elements for shape in shapes)
            tensor = elastikv.SlotTensor(
                self.model,
                self.rows + 1,
                self.max_tokens + 1,
                elements,
                dtype,
                largest_extent=self.largest_extent,
                tag="kv",
            )
            offset = 0
            keys, values = [], []
            for shape in shapes:
                keys.append(tensor.window(offset, (shape.key_heads, shape.key_dim)))
                values.append(tensor.window(offset + shape.key_elements, (shape.value_heads, shape.value_dim)))
                offset += shape.elements
            self.all_lengths = torch.zeros(self.rows + 1, dtype=torch.int32, device=self.device)
            self.no_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        self.tensor = tensor if self.ranks is None else RankedSlots(tensor, self.ranks)
        self.keys, self.values = keys, values
        self.shapes, self.dtype = tuple(shapes), dtype
        self.over_views = [self._why_not_flash(shape, dtype) for shape in shapes]
        self.lengths = [0] * self.rows
        self._stale.clear()
        self._cropped.clear()
        self.generation += 1

    def _why_not_flash(self, shape: LayerShape, dtype: torch.dtype) -> str:
        if self.rows * self.pitch > flash.MOST_TOKENS:
            return f"{self.rows} rows of {self.pitch} tokens are more than it can number"
        return flash.why_not(self.device, dtype, shape.key_dim, shape.value_dim)

    @property
    def pitch(self) -> int:
        """Tokens from row to row."""
        return self._memory.pitch

    @property
    def idle_row(self) -> int:
        return self.rows

    @property
    def token_bytes(self) -> int:
        return 0 if self.tensor is None else self.tensor.token_bytes

    @property
    def _memory(self) -> elastikv.SlotTensor | RankedSlots:
        if self.tensor is None:
            raise InvalidArgument("these slots have no memory yet: nothing was written to them")
        return self.tensor

    # ---- rows

    def acquire(self) -> int:
        """The lowest free row, empty. Raises InvalidArgument when all are taken."""
        if not self._free:
            raise InvalidArgument(f"all {self.rows} slots are taken")
        return heapq.heappop(self._free)

    def release(self, row: int) -> None:
        """Forgets the row's tokens, gives its memory back, and frees the row."""
        if row in self._free or not 0 <= row < self.rows:
            raise InvalidArgument(f"slot {row} is not taken")
        self.crop([row], [0])
        heapq.heappush(self._free, row)

    def fork(self, row: int, source: int, tokens: int) -> None:
        """The row, which is empty, begins with the first tokens of another, whose memory it shares as far as it can.

        Raises OutOfPhysicalMemory.
        """
        self._memory.fork(row, source, tokens)
        self.set_lengths([row], [tokens])

    # ---- lengths and memory

    def claim(self, row: int, tokens: int) -> None:
        """Memory for so many tokens in all, and no more than pages need. Raises OutOfPhysicalMemory."""
        self._memory.grow([row], [tokens], exact=True)

    def trim_idle_row(self) -> None:
        """Gives back what the idle row got from steps that it took part in. It has no tokens."""
        self._memory.shrink([self.idle_row], [0])

    def reserve(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Memory for tokens[i] more tokens in rows[i]; all rows or none.

        Raises InvalidArgument beyond max_tokens, OutOfPhysicalMemory.
        """
        wanted = [self.lengths[row] + more for row, more in zip(rows, tokens)]
        if max(wanted, default=0) > self.max_tokens:
            row, more = next((r, t) for r, t in zip(rows, tokens) if self.lengths[r] + t > self.max_tokens)
            raise InvalidArgument(
                f"{self.lengths[row]} + {more} tokens do not fit a cache of max_tokens={self.max_tokens}"
            )
        self._memory.grow(list(rows), wanted)
        if self._cropped:
            for row in self._cropped.intersection(rows):
                self._memory.make_writable(row, self.lengths[row], self._memory.max_tokens)
            self._cropped.difference_update(rows)

    def grow(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Memory for tokens[i] tokens in all in rows[i]; all rows or none. Raises OutOfPhysicalMemory."""
        self._memory.grow(list(rows), list(tokens))

    def make_writable(self, row: int, begin: int, end: int) -> None:
        """The row's own copy of what it shares between these tokens. Raises OutOfPhysicalMemory."""
        self._memory.make_writable(row, begin, end)

    def resident(self, row: int) -> int:
        """Tokens that the row has memory for."""
        return self._memory.resident(row)

    def prefetch(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Maps memory for tokens[i] more tokens in rows[i] in the background; a hint, cut off at max_tokens."""
        wanted = [min(self.lengths[row] + more, self.max_tokens) for row, more in zip(rows, tokens)]
        self._memory.prefetch(list(rows), wanted)

    def set_lengths(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """The first lengths[i] tokens of rows[i] count. They must have memory."""
        for row, length in zip(rows, lengths):
            self.lengths[row] = length
        self._stale.update(rows)

    @property
    def device_lengths(self) -> torch.Tensor:
        """The lengths as int32 ``[row]`` on the device, right for work that is enqueued now. Nothing waits for it."""
        self.sync_lengths()
        return self.all_lengths[: self.rows]

    def sync_lengths(self) -> None:
        """Brings the device's lengths up to date."""
        if self._stale:
            rows = sorted(self._stale)
            values = upload([self.lengths[row] for row in rows], self.device).to(torch.int32)
            self.all_lengths.index_copy_(0, upload(rows, self.device), values)
            self._stale.clear()

    def crop(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Forgets what lies behind lengths[i] in rows[i] and gives its memory back.

        While somebody holds a view of the slots all memory stays, until the next crop.
        """
        if self.tensor is None:
            return
        kept = [min(self.lengths[row], length) for row, length in zip(rows, lengths)]
        self._cropped.update(row for row, length in zip(rows, kept) if length < self.lengths[row])
        self.set_lengths(rows, kept)
        with contextlib.suppress(InvalidArgument):
            self.tensor.shrink(list(rows), kept)

    def reset(self) -> None:
        """Forgets everything. Addresses stay unless views are held, which then keep their memory."""
        if self.tensor is None:
            return
        if self.tensor.views == 0:
            self.crop(range(self.rows), [0] * self.rows)
            self.tensor.shrink([self.idle_row], [0])
        else:
            self.drop()

    def drop(self) -> None:
        """Lets the memory go, addresses included; views that are held stay readable."""
        self.tensor, self.keys, self.values, self.lengths = None, [], [], [0] * self.rows

    # ---- views

    def view(self, layer: int, row: int, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a row's tokens [begin, end) as views ``[head, token, dim]``; no copy."""
        first = row * self.pitch
        keys, values = (side[layer][first + begin : first + end] for side in (self.keys, self.values))
        return keys.transpose(0, 1), values.transpose(0, 1)

    def batch_view(self, layer: int, first: int, rows: int, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of ``rows`` rows from ``first`` on, ``[row, head, token, dim]``; all must have memory up to end."""
        parts = []
        for side in (self.keys, self.values):
            window = side[layer].view(self.rows + 1, self.pitch, *side[layer].shape[1:])
            parts.append(window[first : first + rows, begin:end].transpose(1, 2))
        return parts[0], parts[1]
