"""One pass of a model over some slots: where each token goes, and what it sees."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from elastikv import _core
from elastikv.errors import InvalidArgument
from elastikv.hf import flash, kernels, views
from elastikv.hf.geometry import require_fit
from elastikv.hf.slots import upload

if TYPE_CHECKING:
    from elastikv.hf.slots import Slots
    from elastikv.hf.views import Extras

_handles = itertools.count(1)
_steps: weakref.WeakValueDictionary[int, Step] = weakref.WeakValueDictionary()


def step_of(handle: int) -> Step:
    """The living step with this handle."""
    step = _steps.get(handle)
    if step is None:
        raise InvalidArgument(f"there is no step {handle} any more: keep it until the model has returned")
    return step


class Step:
    """What all steps share. ``handle`` names it where only a number can travel, as through a compiled model."""

    may_idle = False  # whether the idle row may take part, and more than once

    def __init__(self, slots: Slots, rows: Sequence[int]) -> None:
        taken = [row for row in rows if row != slots.idle_row or not self.may_idle]
        if not rows or len(set(taken)) != len(taken) or not all(0 <= row < slots.rows for row in taken):
            raise InvalidArgument(f"a step needs different slots between 0 and {slots.rows - 1}, not {list(rows)}")
        self.slots = slots
        self.rows = list(rows)
        self.handle = next(_handles)
        _steps[self.handle] = self

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
        extras: Extras | None = None,
    ) -> torch.Tensor:
        """Writes the layer's new keys and values, ``[row, head, query, dim]`` like the query, then attends.

        Returns ``[row, query, head, value dim]``; padding gets zeros. Raises InvalidArgument for what does not fit.
        """
        slots = self.slots
        require_fit(layer, key, value, shapes=slots.shapes, dtype=slots.dtype, device=slots.device)
        return self.compute(layer, query, key, value, scaling, window, extras)

    def compute(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
        extras: Extras | None = None,
    ) -> torch.Tensor:
        """`attend` for states that are known to be of the slots' shapes and dtype, on their device."""
        raise NotImplementedError

    def commit(self) -> None:
        """The new tokens count from now on."""
        raise NotImplementedError

    def _takes_flash(self, layer: int, extras: Extras | None) -> bool:
        """Whether the op serves this layer; if not on a GPU, says so once."""
        reason = extras.names() if extras else self.slots.over_views[layer]
        if reason and self.slots.device.type == "cuda":
            views.note_fallback(reason)
        return not reason

    def _store(self, layer: int, places: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Tokens ``[token, head, dim]`` to these places of the layer's windows."""
        self.slots.keys[layer].index_copy_(0, places, key)
        self.slots.values[layer].index_copy_(0, places, value)

    def _window(self, layer: int, window: int | None) -> int | None:
        """What a token sees at most: some models leave it to their mask."""
        return window or self.slots.geometry.windows[layer]

    def _attend_rows(
        self,
        layer: int,
        query: torch.Tensor,
        ends: Sequence[int],
        scaling: float | None,
        window: int | None,
        extras: Extras | None,
    ) -> torch.Tensor:
        """Over exact views: all rows in one call where they are alike, else one by one."""
        slots, rows = self.slots, self.rows
        if len(set(ends)) == 1 and rows == list(range(rows[0], rows[0] + len(rows))):
            keys, values = slots.batch_view(layer, rows[0], len(rows), 0, ends[0])
            return views.attend(query, keys, values, scaling=scaling, window=window, extras=extras)
        outputs = []
        for index, (row, end) in enumerate(zip(rows, ends)):
            keys, values = slots.view(layer, row, 0, end)
            outputs.append(
                views.attend(query[index : index + 1], keys[None], values[None], scaling=scaling, window=window,
                             extras=extras)
            )  # fmt: skip
        return torch.cat(outputs)


class RaggedStep(Step):
    """counts[i] new tokens for rows[i], in a batch that is padded to ``width`` tokens. Prefill, mostly.

    A row's tokens lie at the end of its part of the batch (left padding), or at its front with ``left=False``, or where
    ``real``, a boolean mask ``[row, width]`` on the CPU, says so; counts then follow from it. Padding is not stored.
    Making the step reserves the memory, for all rows or for none; `commit` makes the tokens count. Raises
    InvalidArgument, OutOfPhysicalMemory.
    """

    def __init__(
        self,
        slots: Slots,
        rows: Sequence[int],
        counts: Sequence[int] = (),
        *,
        width: int | None = None,
        left: bool = True,
        real: torch.Tensor | None = None,
    ) -> None:
        super().__init__(slots, rows)
        if real is None:
            width = max(counts, default=0) if width is None else width
            if len(counts) != len(rows) or min(counts) < 0 or max(counts) > width:
                raise InvalidArgument(f"{list(counts)} are no numbers of tokens for {len(rows)} rows of {width}")
            place = torch.arange(width).expand(len(rows), width)
            number = torch.tensor(counts).unsqueeze(1)
            real = place >= width - number if left else place < number
        self.width = int(real.shape[1])
        self.counts: list[int] = real.sum(1).tolist()
        if max(self.counts) == 0:
            raise InvalidArgument("a step needs at least one token that is not padding")
        slots.reserve(self.rows, self.counts)
        self.before = [slots.lengths[row] for row in self.rows]
        self.after = [length + count for length, count in zip(self.before, self.counts)]
        self._real = real
        device = slots.device
        starts = torch.tensor([row * slots.pitch for row in self.rows], dtype=torch.int64)
        self._positions = torch.tensor(self.before).unsqueeze(1) + real.cumsum(1) - 1
        index = (starts.unsqueeze(1) + self._positions).flatten()
        self._select: torch.Tensor | None = None  # places of real tokens in the batch; None: all are real
        if min(self.counts) < self.width:
            chosen = real.flatten().nonzero().squeeze(1)
            index = index[chosen]
            self._select = upload(chosen, device)
        self._index = upload(index, device)
        self._starts = starts
        self._lengths: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def commit(self) -> None:
        self.slots.set_lengths(self.rows, self.after)

    def positions(self) -> torch.Tensor:
        """Position ids ``[row, width]`` of the batch; for padding, some position that exists."""
        return upload(self._positions.clamp(min=0), self.slots.device)

    def compute(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
        extras: Extras | None = None,
    ) -> torch.Tensor:
        window = self._window(layer, window)
        if key.shape[0] != len(self.rows) or key.shape[2] != self.width:
            raise InvalidArgument(
                f"the step is for {len(self.rows)} rows of {self.width} tokens, but layer {layer} brought "
                f"{key.shape[0]} of {key.shape[2]}"
            )
        self._store(layer, self._index, self._tokens(key), self._tokens(value))
        if not self._takes_flash(layer, extras):
            return self._over_views(layer, query, scaling, window, extras)
        query_starts, key_starts, ends = self._plan()
        output = flash.attend(
            self._tokens(query), self.slots.keys[layer], self.slots.values[layer],
            query_starts=query_starts, key_starts=key_starts, lengths=ends,
            max_query=max(self.counts), max_key=max(self.after), scaling=scaling, window=window,
        )  # fmt: skip
        if self._select is not None:
            padded = output.new_zeros(len(self.rows) * self.width, *output.shape[1:])
            output = padded.index_copy_(0, self._select, output)
        return output.reshape(len(self.rows), self.width, *output.shape[1:])

    def _plan(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where each row's queries and keys begin, and how many keys it has then; sent to the device once."""
        if self._lengths is None:
            ends = torch.tensor([0, *itertools.accumulate(self.counts)])
            numbers = torch.cat([ends, self._starts, self._starts[-1:], torch.tensor(self.after)])
            plan, count = upload(numbers, self.slots.device).to(torch.int32), len(self.rows)
            self._lengths = (plan[: count + 1], plan[count + 1 : 2 * count + 2], plan[2 * count + 2 :])
        return self._lengths

    def _tokens(self, states: torch.Tensor) -> torch.Tensor:
        """The real tokens of ``[row, head, token, dim]``, one after another: ``[token, head, dim]``."""
        flat = states.transpose(1, 2).flatten(0, 1)
        return flat if self._select is None else flat.index_select(0, self._select)

    def _over_views(
        self, layer: int, query: torch.Tensor, scaling: float | None, window: int | None, extras: Extras | None
    ) -> torch.Tensor:
        if self._select is None:
            return self._attend_rows(layer, query, self.after, scaling, window, extras)
        shape = self.slots.shapes[layer]
        output = query.new_zeros(len(self.rows), self.width, query.shape[1], shape.value_dim)
        for index, (row, count, end) in enumerate(zip(self.rows, self.counts, self.after)):
            if count == 0:
                continue
            part = self._real[index].nonzero().squeeze(1).to(query.device)
            keys, values = self.slots.view(layer, row, 0, end)
            own = query[index : index + 1].index_select(2, part)
            output[index, part] = views.attend(
                own, keys[None], values[None], scaling=scaling, window=window, extras=extras
            ).squeeze(0)
        return output


class EvenStep(Step):
    """One new token for each of the first rows, all of which hold as many, over exact views.

    The fastest step without a graph, as it makes the fewest calls: `compute` checks what it stores, too. Making it
    reserves the memory; `commit` makes the tokens count. Raises InvalidArgument, OutOfPhysicalMemory.
    """

    def __init__(self, slots: Slots, rows: int) -> None:
        super().__init__(slots, range(rows))
        self.before = slots.lengths[0]
        if slots.lengths[:rows] != [self.before] * rows:
            raise InvalidArgument(f"rows of {slots.lengths[:rows]} tokens do not hold as many each")
        slots.reserve(self.rows, [1] * rows)
        self._count, self._pitch, self._windows = rows, slots.pitch, slots.geometry.windows
        self._on_cpu = slots.device.type == "cpu"

    def compute(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
        extras: Extras | None = None,
    ) -> torch.Tensor:
        slots = self.slots
        windows, held = (slots.keys[layer], slots.values[layer]), (self._count, self._pitch, self.before)
        window = window or self._windows[layer]
        if extras is None and (self._on_cpu or self._takes_flash(layer, extras)):
            return _core.attend_even(*windows, query, key, value, *held, window, scaling)
        keys, values = _core.store_rows(*windows, key, value, *held)
        return views.attend(query, keys, values, scaling=scaling, window=window, extras=extras)

    def commit(self) -> None:
        self.slots.set_lengths(self.rows, [self.before + 1] * len(self.rows))


class DecodeStep(Step):
    """One new token for each row, with lengths that only the device need know: a CUDA graph replays it at any length.

    Before each pass the owner reserves memory for one more token in each row, and `begin` reads the lengths on the
    device. max_key is an upper bound of what a row holds with the new token: part of what attention costs. The lengths
    do not advance by themselves. Rows may be exchanged between passes, also below a graph.
    """

    may_idle = True

    def __init__(self, slots: Slots, rows: Sequence[int], *, max_key: int) -> None:
        super().__init__(slots, rows)
        self.max_key = max_key
        device = slots.device
        with torch.inference_mode(False):
            self.device_rows = upload(self.rows, device)
            self._starts = upload([row * slots.pitch for row in self.rows], device)
            self._query_starts = torch.arange(len(self.rows) + 1, dtype=torch.int32, device=device)
        self.over_views = False  # whether some layer needed the lengths on the host, which no graph can hold
        self._ends: list[int] = []  # on the host, for views
        self._seen: dict[int | None, tuple[torch.Tensor, torch.Tensor]] = {}

    def set_row(self, index: int, row: int) -> None:
        """The place in the step belongs to another row from now on, in stream order."""
        if row != self.slots.idle_row and (row in self.rows or not 0 <= row < self.slots.rows):
            raise InvalidArgument(f"slot {row} is not one of 0 to {self.slots.rows - 1} that this step lacks")
        self.rows[index] = row
        self.device_rows[index] = row
        self._starts[index] = row * self.slots.pitch

    def begin(self) -> torch.Tensor:
        """Reads the lengths; returns the new tokens' positions, ``[row, 1]``. To be called before each pass."""
        self.slots.sync_lengths()
        all_lengths = self.slots.all_lengths
        self._ends, self._seen = [], {}
        if kernels.steps(all_lengths):
            self.lengths, positions, self._index, *seen = _core.fused_plan(all_lengths, self.device_rows, self._starts)
            self._seen[None] = (seen[0], seen[1])
            return positions
        self.lengths = all_lengths.index_select(0, self.device_rows)
        positions = self.lengths.to(torch.int64)
        self._index = self._starts + positions
        return positions.unsqueeze(1)

    def compute(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
        extras: Extras | None = None,
    ) -> torch.Tensor:
        window = self._window(layer, window)
        if key.shape[0] != len(self.rows) or key.shape[2] != 1:
            raise InvalidArgument(
                f"the step is for one token in each of {len(self.rows)} rows, but layer {layer} brought "
                f"{key.shape[2]} in {key.shape[0]}"
            )
        if kernels.serve(key):
            _core.fused_store(self.slots.keys[layer], self.slots.values[layer], self._index, key.squeeze(2),
                              value.squeeze(2))  # fmt: skip
        else:
            self._store(layer, self._index, key.squeeze(2), value.squeeze(2))
        if not self._takes_flash(layer, extras):
            self.over_views = True
            if not self._ends:
                self._ends = [int(length) + 1 for length in self.lengths.tolist()]
            return self._attend_rows(layer, query, self._ends, scaling, window, extras)
        starts, lengths = self._visible(window)
        keys, values, max_key = (
            self.slots.keys[layer],
            self.slots.values[layer],
            min(self.max_key, window or self.max_key),
        )
        if kernels.attend(keys, values, query.shape[1] // keys.shape[1]):
            return _core.fused_attend(query.squeeze(2), keys, values, starts, lengths, max_key, scaling).unsqueeze(1)
        output = flash.attend(
            query.squeeze(2), keys, values, query_starts=self._query_starts, key_starts=starts, lengths=lengths,
            max_query=1, max_key=max_key, scaling=scaling,
        )  # fmt: skip
        return output.unsqueeze(1)

    def commit(self) -> None:
        """The new tokens count from now on, on the device and on the host."""
        grown = self.lengths + (self.device_rows != self.slots.idle_row)
        self.slots.all_lengths.index_copy_(0, self.device_rows, grown)
        for row in self.rows:
            if row != self.slots.idle_row:
                self.slots.lengths[row] += 1

    def _visible(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each row's visible keys begin, and how many there are. One token sees its window by a later start."""
        if window not in self._seen:
            lengths, starts = self.lengths + 1, self._starts.to(torch.int32)
            if window is not None:
                starts = starts + (lengths - window).clamp_(min=0)
                lengths = lengths.clamp(max=window)
            # One more start than rows; the op reads no further than the lengths, so that its value does not matter.
            self._seen[window] = (torch.cat([starts, starts[-1:]]), lengths.contiguous())
        return self._seen[window]
