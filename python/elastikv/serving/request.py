"""A request on its way through an engine: what was asked, what has come of it."""

from __future__ import annotations

import enum
import itertools
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from elastikv.errors import InvalidArgument
from elastikv.hf.sampling import Sampling

if TYPE_CHECKING:
    from elastikv.serving.engine import Engine

#: Settings of requests are float32 on the device.
LARGEST = float(np.finfo(np.float32).max)

#: Requests of all engines are numbered as they come: the lower number is the older one.
_numbers = itertools.count()


class _LookAgain:
    """No news; who steps the engine has changed."""


class State(enum.Enum):
    """Where a request is. Rows and memory belong to those in PREFILL, DECODE and PAUSED."""

    WAITING = "waiting"  # for its first row, or for another one after it made way
    PREFILL = "prefill"
    DECODE = "decode"
    PAUSED = "paused"  # made way, with its pages kept
    DONE = "done"


class Finish(enum.Enum):
    """Why a request has ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True)
class Asked:
    """What the caller wants. deadline: by the engine's clock. stop: tokens that end the answer, and are part of it."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    repetition_penalty: float = 1.0  # on what the answer has already: above 1 less likely
    stop: frozenset[int] = frozenset()
    deadline: float | None = None

    def __post_init__(self) -> None:
        if not self.prompt or self.max_new_tokens < 1:
            raise InvalidArgument(
                f"a prompt of {len(self.prompt)} tokens and {self.max_new_tokens} new ones: both must be at least 1"
            )
        if not self.repetition_penalty > 0:
            raise InvalidArgument(f"repetition_penalty must be above 0, not {self.repetition_penalty}")
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise InvalidArgument(f"seed={self.seed} must be an integer of 64 bits with a sign")
        for name, value in (
            ("temperature", self.sampling.temperature),
            ("repetition_penalty", self.repetition_penalty),
        ):
            if not value <= LARGEST:
                raise InvalidArgument(f"{name}={value} must be at most {LARGEST}, float32's largest")

    @cached_property
    def array(self) -> npt.NDArray[np.int64]:
        """The prompt, to be compared with others."""
        return np.asarray(self.prompt, dtype=np.int64)

    @property
    def most_stored(self) -> int:
        """Tokens that its row holds in the end: all but the last new one."""
        return len(self.prompt) + self.max_new_tokens - 1


class Request:
    """What `Engine.submit` returns. Iterate over it for the tokens as they come.

    Changed by the engine's thread alone; others may read, iterate (one at a time), `cancel` and `result`.
    """

    def __init__(
        self,
        engine: Engine,
        asked: Asked,
        submitted: float,
        on_token: Callable[[Request, int], object] | None = None,
        on_end: Callable[[Request], object] | None = None,
    ) -> None:
        self.number = next(_numbers)
        self.asked = asked
        self.answer: list[int] = []
        self.state = State.WAITING
        self.finish: Finish | None = None
        self.error: BaseException | None = None
        self.submitted = submitted  # these three by the engine's clock
        self.first_token: float | None = None
        self.ended: float | None = None
        self.prefix_tokens = 0  # of the prompt, taken from what others had stored, at its last start
        self.pauses = 0  # times that it made way with its pages kept,
        self.restarts = 0  # and with its pages given back
        self.tries = 0  # in a row without a new token, where it was alone and others held the memory
        self.cancelled = False
        self.row = -1
        self.stored = 0  # tokens in its row
        self._engine = engine
        self._on_token = on_token
        self._on_end = on_end
        self._news: queue.SimpleQueue[int | _LookAgain | None] = queue.SimpleQueue()

    def __repr__(self) -> str:
        return f"Request({self.number}, {self.state.value}, {len(self.answer)}/{self.asked.max_new_tokens} tokens)"

    @property
    def done(self) -> bool:
        return self.state is State.DONE

    @property
    def tokens(self) -> Sequence[int]:
        """Prompt and answer so far."""
        return [*self.asked.prompt, *self.answer]

    @property
    def known(self) -> int:
        """How many those are."""
        return len(self.asked.prompt) + len(self.answer)

    def cancel(self) -> None:
        """Ends it at the engine's next step; what it has so far stays. May be called from any thread, and twice."""
        self.cancelled = True
        self._engine.wake()

    def __iter__(self) -> Iterator[int]:
        """The tokens as they come. Where no thread runs the engine, this takes its steps. Raises what failed."""
        while True:
            while self._news.empty() and not self._engine.threaded and not self.done:
                if not self._engine.advance():
                    self._engine.sleep(0.001)
            token = self._news.get()
            if isinstance(token, _LookAgain):
                continue
            if token is None:
                break
            yield token
        self._news.put(None)  # for the next who looks
        if self.error is not None:
            raise self.error

    def result(self) -> list[int]:
        """Waits for the end; the whole answer. Raises what failed; a cancelled one is as long as it got."""
        for _ in self:
            pass
        return list(self.answer)

    # ---- the engine's

    def look_again(self) -> None:
        """Who iterates sees anew whether a thread steps."""
        self._news.put(_LookAgain())

    def deliver(self, token: int | None) -> None:
        """Passes a token on, or that there are no more. Called by the engine with no lock held."""
        self._news.put(token)
        if token is None:
            if self._on_end is not None:
                self._on_end(self)
        elif self._on_token is not None:
            self._on_token(self, token)
