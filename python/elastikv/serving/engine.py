"""Continuous batching over slots: requests join and leave between steps."""

from __future__ import annotations

import contextlib
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

import elastikv
from elastikv.errors import InvalidArgument, OutOfPhysicalMemory, PoolClosed
from elastikv.hf.forward import require_attention
from elastikv.hf.geometry import kv_geometry
from elastikv.hf.sampling import Sampling
from elastikv.hf.slots import LARGEST_EXTENT, Slots
from elastikv.orders import obey
from elastikv.serving.lanes import Lanes
from elastikv.serving.prefix import PrefixIndex
from elastikv.serving.prompts import Prompts
from elastikv.serving.request import Asked, Finish, Request, State
from elastikv.serving.scheduler import EngineCounts, Policy, Scheduler

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Engine:
    """Serves requests to one model, as many at a time as its share of the pool has memory for.

    Each `advance` starts waiting requests in the order of their arrival, takes a chunk of their prompts in, and decodes
    a token for all that are further. A request starts once the memory for its prompt and for the first ``promise``
    tokens of its answer is charged (None: for the whole answer, so that nothing that has started is ever interrupted).

    Where a row can't grow, first the prefix index gives up what it holds; then the youngest of those that decode make
    way with their pages kept, while the others move; and where nobody moves, the youngest gives its pages back, and
    computes them again later: no token that came is lost, or changes. With ``keep_pages=False`` it gives them back at
    once. Requests that made way go on before others start.

    One that is alone and can't go on, as others hold the memory, gives its pages back after ``patience`` seconds, so
    that engines that hold each other up go on, and tries again. After ``tries`` times in a row without a new token it
    ends with OutOfPhysicalMemory, which says who holds what.

    model: a causal LM with attention 'elastikv', used by this engine alone while it steps. handle: from
    `SharedMemoryPool.register_model`; it takes the addresses of `addresses()` bytes. max_batch: rows that decode
    together. chunk: prompt tokens that are taken in beside a decode step. prefix_entries: rows kept for those who share
    a prefix, 0 for none. clock: seconds; deadlines and patience are by it.

    Where the model is paused, by `pause_model` or while no step runs, steps do nothing until it has resumed, and
    requests wait.

    submit, cancel, pause_model, resume_model, close and wake may be called from any thread; one thread at a time takes
    the steps.
    """

    def __init__(
        self,
        model: PreTrainedModel | Any,
        handle: elastikv.Model,
        *,
        max_batch: int = 32,
        max_tokens: int,
        chunk: int = 1024,
        promise: int | None = 64,
        keep_pages: bool = True,
        prefix_entries: int = 32,
        shortest_prefix: int = 32,
        patience: float = 1.0,
        tries: int = 30,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if min(max_batch, max_tokens, chunk, tries, promise or 1) < 1 or promise == 0 or prefix_entries < 0:
            raise InvalidArgument(
                f"max_batch={max_batch}, max_tokens={max_tokens}, chunk={chunk}, tries={tries}, promise={promise} must "
                f"be at least 1, prefix_entries={prefix_entries} at least 0"
            )
        original = getattr(model, "_orig_mod", model)
        require_attention(original)
        geometry = kv_geometry(original.config)
        if not geometry.plain or geometry.shapes is None:
            raise InvalidArgument("this model's attention computes with more than its cache holds: use model.generate")
        self.name = handle.name
        self.handle = handle
        self.clock = clock
        self.threaded = False  # whether a Runner takes the steps
        self.slots = Slots(
            geometry, model=handle, rows=max_batch + prefix_entries, max_tokens=max_tokens, dtype=original.dtype,
            largest_extent=LARGEST_EXTENT if prefix_entries else 0,
        )  # fmt: skip
        self._vocabulary = vocabulary = int(original.config.get_text_config(decoder=True).vocab_size)
        self.prefixes = PrefixIndex(self.slots, entries=prefix_entries, shortest=shortest_prefix)
        self._lanes = Lanes(model, self.slots, vocabulary, lambda request, token: self._scheduler.took(request, token))
        self._prompts = Prompts(original, self.slots, vocabulary, chunk)
        self._scheduler = Scheduler(
            Policy(max_batch, promise, keep_pages, patience, tries, clock), self.prefixes, self._prompts, self._lanes
        )
        self._inbox: deque[Request] = deque()
        self._wanted_by_others = 0
        self._lock = threading.Lock()  # held for a step; guards all of the above but the inbox
        self._holder: int | None = None  # the thread that steps
        self._deliverer: int | None = None  # the thread that is handing news out
        self._woken = threading.Event()
        self._closed = False
        itself = weakref.ref(self)  # so that an engine that is dropped goes

        def give(wanted: int) -> int:
            engine = itself()
            return 0 if engine is None else engine._give_prefixes(wanted)

        self._reclaim = handle.on_reclaim(give)
        obey(handle, sleep=self.pause_model, wake=self.resume_model)  # `elastikv sleep`, and `elastikv wake`

    # ---- from outside

    @classmethod
    def addresses(
        cls,
        config: Any,
        dtype: torch.dtype,
        *,
        max_batch: int,
        max_tokens: int,
        prefix_entries: int,
        page: int = 2 << 20,
    ) -> int:
        """Bytes of addresses that an engine with these settings takes: a model's virtual_capacity at least.

        page: the pool's, or a multiple of it.
        """
        token = kv_geometry(config).token_bytes(dtype)
        period = math.lcm(token, page)  # rows begin on a page and on a token
        return (max_batch + prefix_entries + 1) * -(-(max_tokens + 1) * token // period) * period

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        seed: int | None = None,
        repetition_penalty: float = 1.0,
        stop: Sequence[int] = (),
        deadline: float | None = None,
        on_token: Callable[[Request, int], object] | None = None,
        on_end: Callable[[Request], object] | None = None,
    ) -> Request:
        """Puts a request in line. on_token(request, token), and on_end(request) when it is done, are called by the
        thread that steps or closes, with no lock held, one at a time and in order; if they raise, this request ends
        with that error, and what is no Exception goes on to who steps. They must not wait for other threads' requests.

        Raises InvalidArgument for what can never be served, OutOfPhysicalMemory where it is larger than the model's
        limit, PoolClosed after close.
        """
        self._require_open()
        if seed is None:
            seed = int(torch.randint(1 << 62, ()))  # from torch's generator, so that its seed decides
        asked = Asked(
            tuple(int(token) for token in prompt), max_new_tokens, sampling or Sampling(), seed, repetition_penalty,
            frozenset(stop), deadline,
        )  # fmt: skip
        foreign = next((token for token in asked.prompt if not 0 <= token < self._vocabulary), None)
        if foreign is not None:
            raise InvalidArgument(f"token {foreign} is not of the model's vocabulary of {self._vocabulary}")
        if asked.most_stored > self.slots.max_tokens:
            raise InvalidArgument(
                f"{len(asked.prompt)} + {max_new_tokens} tokens, prompt and answer, do not fit an engine of "
                f"max_tokens={self.slots.max_tokens}"
            )
        page, most = self.handle.page_size, self.handle.quota().limit
        # A page more for the places in a decoder that nobody takes.
        need = (-(-asked.most_stored * self.slots.token_bytes // page) + 1) * page
        if need > most:
            raise OutOfPhysicalMemory(
                f"a request of up to {asked.most_stored} tokens needs {need} bytes; model {self.name!r} may hold {most}"
            )
        request = Request(self, asked, self.clock(), on_token, on_end)
        self._scheduler.counts.submitted += 1
        self._inbox.append(request)
        if self._closed:  # meanwhile: then close has ended it, or nobody will
            with contextlib.suppress(ValueError):
                self._inbox.remove(request)
                self._require_open()
        self.wake()
        return request

    def wake(self) -> None:
        """There is something to look at: for a thread that sleeps in `sleep`."""
        self._woken.set()

    def sleep(self, seconds: float | None) -> None:
        """Until somebody calls `wake`, or so many seconds."""
        self._woken.wait(seconds)
        self._woken.clear()

    @property
    def counts(self) -> EngineCounts:
        """What it has done so far; `prefixes.counts` has the index's."""
        counts = self._scheduler.counts
        counts.prefilled_tokens = self._prompts.tokens
        return counts

    @property
    def graphs(self) -> int:
        """CUDA graphs captured so far."""
        return self._lanes.captures

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        scheduler = self._scheduler
        return not (self._inbox or scheduler.waiting or scheduler.active or scheduler.news or self._wanted_by_others)

    @property
    def waiting(self) -> int:
        """Requests without a row."""
        return len(self._inbox) + len(self._scheduler.waiting)

    @property
    def running(self) -> list[Request]:
        """Requests that hold rows."""
        return self._scheduler.active

    def advance(self) -> bool:
        """One step. Whether anything moved: if not, nobody asks, there is no memory, or the model is paused. Raises
        PoolClosed."""
        with self._lock:
            self._require_open()
            if self.handle.paused:
                return False
            self._holder = threading.get_ident()
            try:
                self.prefixes.evict(self._wanted_by_others)
                self._wanted_by_others = 0
                while self._inbox:
                    self._scheduler.add(self._inbox.popleft())
                with torch.inference_mode():
                    moved = self._scheduler.step()
            finally:
                self._holder = None
        self._deliver()
        return moved

    @property
    def closed(self) -> bool:
        return self._closed

    def look_again(self) -> None:
        """Those who iterate over requests see anew whether a thread steps, or they do."""
        with self._lock:
            for request in [*self._inbox, *self._scheduler.waiting, *self._scheduler.active]:
                request.look_again()

    def pause_model(self) -> int:
        """`Model.pause` between two steps: what is live goes to the host. Requests stay where they are, and wait.

        Returns the bytes given back. The errors are those of `Model.pause`, and PoolClosed.
        """
        with self._lock:
            self._require_open()
            if not self.handle.paused:
                with torch.inference_mode():
                    self._lanes.settle()
            given = self.handle.pause()
        self._deliver()
        return given

    def resume_model(self, *, timeout: float | None = None, cancel: elastikv.Cancellation | None = None) -> int:
        """`Model.resume`; the next step goes on from where it was. Returns the bytes taken. Errors are its own."""
        with self._lock:
            self._require_open()
            taken = self.handle.resume(timeout=timeout, cancel=cancel)
        self.wake()
        return taken

    def pause(self, request: Request) -> None:
        """One that decodes makes way with its pages kept, until the next step that has room for it."""
        with self._lock:
            if self.handle.paused:
                return
            if request.state is State.DECODE:
                self._scheduler.pause(request)
            self._scheduler.release_finished()
        self._deliver()

    def give_way(self, request: Request | None = None) -> bool:
        """A request, the youngest by default, gives its pages back, and waits for its turn to compute them again.
        False where there is none, or the model is paused."""
        with self._lock:
            if self.handle.paused:
                return False
            active = [one for one in self._scheduler.active if request in (None, one)]
            if active:
                self._scheduler.send_back(max(active, key=lambda one: one.number))
            self._scheduler.release_finished()
        self._deliver()
        return bool(active)

    def close(self) -> None:
        """Ends all requests as cancelled, and gives all memory back. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._reclaim.remove()
            self.handle.on_order(None)
            while self._inbox:
                self._scheduler.add(self._inbox.popleft())
            if self.handle.paused:
                self.slots.drop()  # with its backup: nothing can be given back row by row
            self._scheduler.end_all()
            self.prefixes.clear()
            self._wanted_by_others = 0
            self.slots.reset()
            self.slots.drop()
        self.handle.drain()
        self.handle.trim()  # what was mapped ahead
        self._deliver()
        self.wake()

    # ---- inside

    def _require_open(self) -> None:
        if self._closed:
            raise PoolClosed(f"engine {self.name!r} was closed")

    def _give_prefixes(self, wanted: int) -> int:
        """Others lack memory. Called on any thread, this engine's own among them, which helps itself."""
        if self._holder == threading.get_ident():
            return 0
        if not self._lock.acquire(blocking=False):
            # At the next step, which may be for this alone.
            self._wanted_by_others = max(self._wanted_by_others, wanted)
            self.wake()
            return 0
        try:
            return 0 if self.handle.paused else self.prefixes.evict(wanted)
        finally:
            self._lock.release()

    def _deliver(self) -> None:
        """Tokens to those who asked, with no lock held, by one thread at a time: nothing overtakes what came before.

        That one also hands out what others bring meanwhile. A listener that steps or closes the engine itself is served
        at once.
        """
        me = threading.get_ident()
        with self._lock:
            if self._deliverer not in (None, me):
                return
            outer, self._deliverer = self._deliverer, me
        try:
            while self._deliver_one(outer):
                pass
        except BaseException:
            with self._lock:
                self._deliverer = outer
            raise

    def _deliver_one(self, outer: int | None) -> bool:
        """Whether there was any; if not, others may deliver from now on."""
        with self._lock:
            if not self._scheduler.news:
                self._deliverer = outer
                return False
            request, token = self._scheduler.news.popleft()
        try:
            request.deliver(token)
        except BaseException as error:  # the listener's
            request.error = request.error or error
            with self._lock:
                self._scheduler.end(request, Finish.ERROR, error)
            if not isinstance(error, Exception):
                raise
        return True
