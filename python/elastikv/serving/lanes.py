"""The rows that decode together: who joins and leaves between steps, and the tokens that come of each step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from elastikv.hf.decoder import Decoder
from elastikv.hf.slots import Slots
from elastikv.serving.choice import Choice, Kind
from elastikv.serving.request import Request

#: Batch sizes that decoders are made for, by kind of device: on CUDA each has graphs, and a place that nobody takes
#: costs next to nothing; on the CPU it costs as much as any other.
SIZES = {"cuda": tuple(1 << power for power in range(11)), "cpu": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)}


class _Launched:
    """A step whose tokens are on their way to the host."""

    def __init__(self, tokens: torch.Tensor, requests: Sequence[Request | None]) -> None:
        self.requests = list(requests)
        self._event: torch.cuda.Event | None = None
        self._tokens = tokens if tokens.is_cuda else tokens.clone()  # the next step changes them
        if tokens.device.type == "cuda":
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def tokens(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        numbers: list[int] = self._tokens.flatten().tolist()
        return numbers


class Lanes:
    """Requests that take their steps in one decoder, of the smallest size that holds them.

    On CUDA the host reads a step's tokens while the next one runs; what joins or leaves waits for both. take(request,
    token) is called with each token of a member, in order. Not thread-safe.
    """

    def __init__(self, model: Any, slots: Slots, vocabulary: int, take: Callable[[Request, int], None]) -> None:
        self.members: list[Request] = []
        self._model = model
        self._slots = slots
        self._vocabulary = vocabulary
        self._take = take
        self._lag = 1 if slots.device.type == "cuda" else 0
        self._made: dict[tuple[int, Kind], tuple[Decoder, Choice]] = {}
        self._key: tuple[int, Kind] = (0, Kind())
        self._places: list[Request | None] = []
        self._launched: deque[_Launched] = deque()

    def join(self, request: Request) -> None:
        """From the next step on. Its row holds all of its tokens but the last."""
        self.members.append(request)

    def leave(self, request: Request) -> None:
        """Now; its row's length is right then. The tokens of the others that are under way are taken first."""
        self.members.remove(request)
        if request in self._places:
            self.settle()
            self._drop(self._places.index(request))

    def step(self) -> None:
        """One more token for each. Raises OutOfPhysicalMemory before anything has happened."""
        self._arrange()
        if not self.members:
            return
        tokens = self._made[self._key][0].step()
        self._launched.append(_Launched(tokens, self._places))
        while len(self._launched) > self._lag:
            self._collect()

    def settle(self) -> bool:
        """Takes all tokens that are under way; whether there were any."""
        any_came = bool(self._launched)
        while self._launched:
            self._collect()
        return any_came

    def clear(self) -> None:
        """Everyone leaves, whatever state a failed step left; lengths are as the host knows them."""
        self._launched.clear()
        self._places = []
        self._made.clear()  # their graphs, too: nothing of a failed step is used again
        self._key = (0, Kind())
        for request in self.members:
            self._slots.set_lengths([request.row], [request.stored])
        self.members = []

    @property
    def captures(self) -> int:
        """Graphs captured so far."""
        return sum(decoder.captures for decoder, _ in self._made.values())

    def _collect(self) -> None:
        launched = self._launched.popleft()
        for request, token in zip(launched.requests, launched.tokens()):
            if request is not None and request.finish is None:
                self._take(request, token)

    def _arrange(self) -> None:
        """Seats the members, in the decoder that fits them."""
        count = len(self.members)
        if count == 0 or (self._fits(count) and all(request in self._places for request in self.members)):
            return
        self.settle()
        if not self._fits(count) or (self._wanted_kind() | self._key[1]) != self._key[1]:
            for place, request in enumerate(self._places):
                if request is not None:
                    self._drop(place)
            size = next((size for size in SIZES[self._slots.device.type] if size >= count), count)
            self._key = (size, self._wanted_kind())
            if self._key not in self._made:
                self._made[self._key] = self._make(*self._key)
            self._places = [None] * size
        for request in self.members:
            if request not in self._places:
                self._put(self._places.index(None), request)

    def _fits(self, count: int) -> bool:
        size = self._key[0]
        return count <= size < 4 * count or count == size

    def _wanted_kind(self) -> Kind:
        kind = Kind()
        for request in self.members:
            kind = kind | Kind.of(request.asked)
        return kind

    def _make(self, size: int, kind: Kind) -> tuple[Decoder, Choice]:
        choice = Choice(kind, size, self._vocabulary, self._slots.device)
        rows = [self._slots.idle_row] * size
        capacity = self._slots.max_tokens + 1
        decoder = Decoder(self._model, self._slots, rows, capacity=capacity, choose=partial(_choose, choice))
        return decoder, choice

    def _put(self, place: int, request: Request) -> None:
        decoder, choice = self._made[self._key]
        left = request.asked.max_new_tokens - len(request.answer)
        with torch.inference_mode():
            choice.set(place, request.asked, request.answer)
        decoder.put(place, request.row, request.answer[-1], left + 1)
        self._places[place] = request

    def _drop(self, place: int) -> None:
        self._made[self._key][0].drop(place)
        self._places[place] = None


def _choose(choice: Choice, logits: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    choice.mark(tokens)
    return choice(logits, positions)
