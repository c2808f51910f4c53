"""Decoding a token a step: on CUDA one graph, captured once and replayed at every length."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from elastikv import _core
from elastikv.errors import InvalidArgument
from elastikv.hf import kernels
from elastikv.hf.forward import require_attention, run_step
from elastikv.hf.lean import Lean
from elastikv.hf.room import RankedRoom, Room
from elastikv.hf.sampling import Sampler, Sampling
from elastikv.hf.step import DecodeStep
from elastikv.hf.views import logger

if TYPE_CHECKING:
    from elastikv.hf.slots import Slots

#: Attention's cost follows from the longest row that it is told of (a half beyond the truth cost 9 % on an H100, an
#: eighth 1 to 2 %), so graphs are by classes of it: this, then powers of two and the middles between them, and from
#: FINE_FROM on eighths, as a capture costs a row of so many tokens nothing that one can see.
SMALLEST_CLASS = 1024
FINE_FROM = 8192
#: The host runs at most so many steps ahead of the device.
LEAD = 4


def size_class(tokens: int) -> int:
    """The bound that a graph for rows of up to so many tokens is captured with."""
    if tokens <= SMALLEST_CLASS:
        return SMALLEST_CLASS
    below = 1 << (tokens - 1).bit_length() - 1  # the power of two below
    step = below // (8 if below >= FINE_FROM else 2)
    return below + -(-(tokens - below) // step) * step


class Decoder:
    """Takes rows of slots forward, one token a step and row, all on the device: sampling and stops too.

    On CUDA a step is the replay of a graph, captured once for each size class; lengths are read from device memory, and
    memory is mapped between replays, ahead, by the pool's worker. On the CPU the same step runs eagerly, as it does for
    models whose attention runs over views.

    model: a causal LM with attention 'elastikv', or such a one compiled. rows: those that step together, always in
    this order; `Slots.idle_row` for places that `put` fills later. capacity: the most new tokens of a row. lean: fewer
    kernels within the model (`Lean`), by default on CUDA. The slots must have their addresses
    (`Slots.allocate`). choose: what picks the next tokens instead of the sampling, by row: called with logits
    ``[row, vocabulary]``, the tokens ``[row, 1]`` that went in and their positions ``[row]``, it returns tokens
    ``[row]``; it is captured with the step, so it works on the device alone, and a second time changes nothing.

    Not thread-safe. Everything runs on torch's current stream.
    """

    def __init__(
        self,
        model: Any,
        slots: Slots,
        rows: Sequence[int],
        *,
        sampling: Sampling | None = None,
        capacity: int,
        lean: bool | None = None,
        choose: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        compiled = hasattr(model, "_orig_mod")
        require_attention(model._orig_mod if compiled else model)
        if slots.tensor is None:
            raise InvalidArgument("these slots have no addresses yet: write to them first, or give a dtype")
        if not slots.geometry.plain:
            raise InvalidArgument("this model's attention computes with more than its cache holds: use model.generate")
        if capacity < 1:
            raise InvalidArgument(f"capacity must be at least 1 token, not {capacity}")
        self.model = model
        self.slots = slots
        self.rows = list(rows)
        self.sampling = sampling or Sampling()
        self.capacity = capacity
        self.generation = slots.generation
        count, device = len(self.rows), slots.device
        self._on_gpu = self._graphed = device.type == "cuda"
        self._sampler = Sampler(self.sampling, device)
        self._choose = choose
        lean = self._on_gpu if lean is None else lean
        self._lean: Any = Lean(model) if lean and not compiled else contextlib.nullcontext()  # a compiler fuses more
        self._step = DecodeStep(slots, self.rows, max_key=SMALLEST_CLASS)
        with torch.inference_mode(False):
            integers: dict[str, Any] = {"dtype": torch.int64, "device": device}
            self.tokens = torch.zeros(count, 1, **integers)  # what the next step takes in
            self.count = torch.zeros(count, **integers)  # new tokens so far
            self.history = torch.zeros(count, capacity, **integers)
            self.ended = torch.ones(count, dtype=torch.bool, device=device)
            self._limits = torch.zeros(count, **integers)
            self._stops = torch.full((16,), -1, **integers)
            self._pad = torch.zeros((), **integers)
            self._ended_here = torch.ones(count, dtype=torch.bool, pin_memory=self._on_gpu)
            # A copy by torch, so that it knows of the stream on which our kernel and graphs write to that memory later.
            self._ended_here.copy_(self.ended, non_blocking=True)
        self._room = self._new_room([1] * count)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._graph_memory: Any = None
        self._marks: list[tuple[torch.cuda.Event, torch.Tensor]] = []  # with the rows that had ended then
        self._heard = [True] * count  # rows that had ended at the last mark
        self._steps = 0
        self.captures = 0

    # ---- from outside

    @property
    def stale(self) -> bool:
        """Whether the slots have got other addresses since: then this decoder is of no use any more."""
        return self.generation != self.slots.generation

    def start(
        self,
        logits: torch.Tensor,
        *,
        limits: Sequence[int],
        stop: Sequence[int] = (),
        pad: int = 0,
        sampling: Sampling | None = None,
        seed: int | None = None,
    ) -> None:
        """Chooses each row's first token from the logits ``[row, vocabulary]`` of its last one.

        limits: the most new tokens by row. stop: tokens that end a row. pad: what comes after the end. Raises
        InvalidArgument for limits that the capacity or the slots can't hold.
        """
        if self.stale:
            raise InvalidArgument("the slots' addresses have changed: make a new decoder")
        room = [self.slots.max_tokens + 1 - self._length(row) for row in self.rows]
        for row, limit, most in zip(self.rows, limits, room):
            if not 1 <= limit <= min(self.capacity, most):
                raise InvalidArgument(
                    f"{limit} new tokens for slot {row}: it has room for {most}, and the decoder for {self.capacity}"
                )
        if len(limits) != len(self.rows) or len(stop) > len(self._stops):
            raise InvalidArgument(
                f"{len(limits)} limits for {len(self.rows)} rows, {len(stop)} stops of at most {len(self._stops)}"
            )
        if self.slots.ranks is not None and seed is None and (sampling or self.sampling).temperature:
            raise InvalidArgument("the ranks of a group must draw the same tokens: give all of them one seed")
        with torch.inference_mode():
            self.sampling = sampling or self.sampling
            self._sampler.set(self.sampling, seed)
            self.slots.sync_lengths()  # which a graph can't
            self._limits.copy_(torch.tensor(limits))
            self._stops.copy_(torch.tensor([*stop, *[-1] * (len(self._stops) - len(stop))]))
            self._pad.fill_(pad)
            self.history.fill_(pad)
            self.count.zero_()
            self.ended.zero_()
            self._take(self._sampler(logits))
            self._room = self._new_room(limits)
            self._steps = 0
            self._wait()
            self._forget_news()

    def put(self, index: int, row: int, token: int, limit: int) -> None:
        """A sequence joins between steps: place ``index`` goes on with this row, whose next token is known.

        limit: the most new tokens, that one among them. The graphs stay. Waits for the device.
        """
        if self.stale or not 0 <= index < len(self.rows) or self.rows[index] != self.slots.idle_row:
            raise InvalidArgument(f"place {index} of {len(self.rows)} is not free, or the slots have moved")
        if row in self.rows or not 0 <= row < self.slots.rows:
            raise InvalidArgument(f"slot {row} is not one of 0 to {self.slots.rows - 1} that this decoder lacks")
        used = self._length(row)
        if not 1 <= limit <= min(self.capacity, self.slots.max_tokens + 1 - used):
            raise InvalidArgument(
                f"{limit} new tokens for slot {row}: it holds {used} of {self.slots.max_tokens}, and the decoder has "
                f"room for {self.capacity}"
            )
        self._wait()
        with torch.inference_mode():
            self._step.set_row(index, row)
            self.tokens[index] = token
            self.history[index].fill_(self._pad)
            self.history[index, 0] = token
            self.count[index] = 1
            self._limits[index] = limit
            self.ended[index] = limit == 1
            self._ended_here[index] = limit == 1
        self._forget_news()
        self.rows[index] = row
        self._room.set_row(index, row, used, used + limit - 1)

    def drop(self, index: int) -> int:
        """A sequence leaves between steps; its place is free. Returns its new tokens. Waits for the device."""
        if not 0 <= index < len(self.rows) or self.rows[index] == self.slots.idle_row:
            raise InvalidArgument(f"place {index} of {len(self.rows)} is free")
        row = self.rows[index]
        self._wait()
        self.slots.lengths[row] = int(self.slots.device_lengths[row])
        with torch.inference_mode():
            self.ended[index] = True
            self._ended_here[index] = True
            self._step.set_row(index, self.slots.idle_row)
        self._forget_news()
        self.rows[index] = self.slots.idle_row
        self._room.set_row(index, self.slots.idle_row, 0, 0)
        return int(self.count[index])

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.current_stream(self.slots.device).synchronize()

    def _forget_news(self) -> None:
        """The host knows all, and what is on its way is older."""
        self._marks.clear()
        self._heard = self._ended_here.tolist()

    def _known_ended(self) -> list[bool]:
        """Rows that the host knows to have ended. Ranks that must go on and stop together learn it at the same steps,
        whichever device is ahead: from what was copied at a mark that all have waited for."""
        return self._heard if self._on_gpu and self.slots.ranks is not None else self._ended_here.tolist()

    def step(self) -> torch.Tensor:
        """One more token for each row that has not ended; returns `tokens`, ``[row, 1]``, which the next step changes.

        Raises OutOfPhysicalMemory before anything has happened: `step` may be called again.
        """
        self._room.make()
        self.slots.sync_lengths()  # others may have changed other rows
        ended = self._known_ended()
        graph = self._graph() if self._graphed else None
        if graph is not None:
            graph.replay()
        else:
            with torch.inference_mode():
                self._step.max_key = size_class(self._room.longest + 1)
                self._body()
        self._steps += 1
        if self._on_gpu:
            self._keep_up()
        self._room.took(ended)
        return self.tokens

    @property
    def all_ended(self) -> bool:
        """Whether every row is known to have ended; on CUDA the news come some steps late."""
        return all(self._known_ended())

    def finish(self) -> list[int]:
        """Waits for the device; the slots' lengths are right on the host again. Returns the new tokens by row."""
        lengths = self.slots.device_lengths.tolist()
        for row in self.rows:
            if row != self.slots.idle_row:
                self.slots.lengths[row] = lengths[row]
        self._room = self._new_room([1] * len(self.rows))
        return [int(count) for count in self.count.tolist()]

    def _new_room(self, limits: Sequence[int]) -> Room:
        # The last new token is not stored.
        used = [self._length(row) for row in self.rows]
        kind = Room if self.slots.ranks is None else RankedRoom
        return kind(self.slots, self.rows, used, [length + limit - 1 for length, limit in zip(used, limits)])

    def _length(self, row: int) -> int:
        return 0 if row == self.slots.idle_row else self.slots.lengths[row]

    # ---- one step

    def _body(self) -> None:
        """What a graph holds. Reads and writes nothing but device memory."""
        positions = self._step.begin()
        with self._lean:
            logits = run_step(self.model, self._step, self.tokens, positions)[:, -1]
        choose, lengths = self._choose, self._step.lengths
        self._take(self._sampler(logits) if choose is None else choose(logits, self.tokens, lengths), lengths)

    def _take(self, chosen: torch.Tensor, lengths: torch.Tensor | None = None) -> None:
        """The next tokens, ``[row]``: into the history, unless the row had ended.

        lengths: the rows' before the tokens that went in, which are stored now; None where none went in.
        """
        all_lengths, rows = self.slots.all_lengths, self._step.device_rows
        if kernels.steps(all_lengths):
            _core.fused_take(
                chosen, tokens=self.tokens, count=self.count, history=self.history, ended=self.ended,
                ended_here=self._ended_here, limits=self._limits, stops=self._stops, pad=self._pad,
                stored=None if lengths is None else (all_lengths, rows, lengths),
            )  # fmt: skip
            return
        alive = ~self.ended
        if lengths is not None:
            all_lengths.index_copy_(0, rows, lengths + alive)
        chosen = torch.where(alive, chosen, self._pad)
        place = self.count.clamp(max=self.capacity - 1).unsqueeze(1)
        kept = torch.where(alive.unsqueeze(1), chosen.unsqueeze(1), self.history.gather(1, place))
        self.history.scatter_(1, place, kept)
        self.count.add_(alive)
        self.ended.logical_or_((chosen.unsqueeze(1) == self._stops).any(1)).logical_or_(self.count >= self._limits)
        self.tokens.copy_(chosen.unsqueeze(1))
        self._ended_here.copy_(self.ended, non_blocking=True)

    # ---- graphs

    def _graph(self) -> torch.cuda.CUDAGraph | None:
        """The graph for the present lengths; None for models that need the lengths on the host."""
        bound = size_class(self._room.longest + 1)
        if bound not in self._graphs:
            graph = self._capture(bound)
            if graph is None:
                return None
            self._graphs[bound] = graph
        return self._graphs[bound]

    def _capture(self, bound: int) -> torch.cuda.CUDAGraph | None:
        """Runs the step once by itself, so that all it needs is loaded, undoes it, and captures it."""
        device, slots = self.slots.device, self.slots
        self._step.max_key = bound
        state = [self.tokens, self.count, self.ended, self.history, slots.device_lengths]  # the idle row keeps its 0
        with torch.inference_mode(), torch.cuda.device(device):
            before = [each.clone() for each in state]
            draws = self._sampler.generator.get_state()
            here, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(here)
            with torch.cuda.stream(side):
                self._body()
            here.wait_stream(side)
            for each, saved in zip(state, before):
                each.copy_(saved)
            self._sampler.generator.set_state(draws)
            self._ended_here.copy_(self.ended)  # waits
            if self._step.over_views:  # attention has said why
                self._graphed = False
                return None
            if self._graph_memory is None:
                self._graph_memory = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            if not self.sampling.kind[0]:
                graph.register_generator_state(self._sampler.generator)
            try:
                # The pool's worker goes on mapping memory meanwhile, which only this mode lets other threads do.
                with torch.cuda.graph(graph, pool=self._graph_memory, capture_error_mode="thread_local"):
                    self._body()
            except RuntimeError as refused:  # say, experts that are chosen on the host
                torch.cuda.set_stream(here)
                logger.warning("this model can't be captured in a graph, so it decodes eagerly: %s", refused)
                self._graphed = False
                return None
        self.captures += 1
        return graph

    def _keep_up(self) -> None:
        """Waits where the host is too far ahead, or rows that ended would go on for long."""
        if self._steps % LEAD == 0:
            if self._marks:
                mark, ended = self._marks.pop(0)
                mark.synchronize()
                self._heard = ended.tolist()
            mark, ended = torch.cuda.Event(), self._ended_here  # type: ignore[no-untyped-call]
            if self.slots.ranks is not None:
                ended = torch.empty(self.ended.shape, dtype=torch.bool, pin_memory=True)
                ended.copy_(self.ended, non_blocking=True)
            mark.record()
            self._marks.append((mark, ended))
