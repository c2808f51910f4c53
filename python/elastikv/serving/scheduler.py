"""Who waits, who computes, who makes way: the requests of one engine, and the policy where memory is short."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from elastikv.errors import OutOfPhysicalMemory
from elastikv.serving.lanes import Lanes
from elastikv.serving.prefix import PrefixIndex
from elastikv.serving.prompts import Prompts
from elastikv.serving.request import Finish, Request, State

#: The most steps between two tries to get memory that there was not.
LONGEST_PASS = 16


@dataclass
class EngineCounts:
    """What an engine has done since it was made."""

    submitted: int = 0
    finished: dict[str, int] = field(default_factory=dict)  # by Finish
    admitted: int = 0  # starts and restarts
    pauses: int = 0
    restarts: int = 0
    steps: int = 0  # decode steps
    decoded_tokens: int = 0
    prefilled_tokens: int = 0
    stalled_steps: int = 0  # with requests, none of which could move for want of memory


@dataclass(frozen=True)
class Policy:
    """As in Engine."""

    max_batch: int
    promise: int | None
    keep_pages: bool
    patience: float
    tries: int
    clock: Callable[[], float]


class Scheduler:
    """Groups of requests, and what moves them from one to the next. Not thread-safe: the engine's lock guards it.

    news collects (request, token) for the engine to deliver, None for a request's end.
    """

    def __init__(self, policy: Policy, prefixes: PrefixIndex, prompts: Prompts, lanes: Lanes) -> None:
        self.counts = EngineCounts()
        self.news: deque[tuple[Request, int | None]] = deque()
        self._policy = policy
        self._prefixes = prefixes
        self._prompts = prompts
        self._slots = prompts.slots
        self._lanes = lanes
        self._waiting: list[tuple[int, Request]] = []  # a heap: who came first goes first, also after a restart
        self._prefilling: list[Request] = []
        self._paused: list[Request] = []
        self._finished: list[Request] = []  # have their last token, and still their row
        self._stalled_since: float | None = None
        self._refusals = 0  # claims of new memory that failed in a row
        self._pass = 0  # steps until the next try
        self._shortage = ""  # what the last one said

    # ---- for the engine

    def add(self, request: Request) -> None:
        heapq.heappush(self._waiting, (request.number, request))

    @property
    def waiting(self) -> list[Request]:
        return [request for _, request in self._waiting]

    @property
    def active(self) -> list[Request]:
        """Those that hold rows, whatever they do."""
        return [*self._prefilling, *self._lanes.members, *self._paused]

    def step(self) -> bool:
        """One step of everyone, as Engine says. Whether anything moved."""
        self._end_those_who_must()
        moved = self._claim_for_those_without()
        moved = self._prefill() or moved
        moved = self._decode() or moved
        self.release_finished()
        if not self.active:
            self._slots.trim_idle_row()
        if moved or not (self._waiting or self.active):
            self._stalled_since = None
        else:
            self.counts.stalled_steps += 1
            self._stall()
        return moved or bool(self.news)

    def pause(self, request: Request) -> None:
        """One that decodes makes way, its pages kept."""
        self._lanes.leave(request)
        if request.finish is None:  # else its last token was under way
            request.state = State.PAUSED
            request.pauses += 1
            self.counts.pauses += 1
            self._paused.append(request)

    def send_back(self, request: Request) -> None:
        """One that holds a row gives it back, and waits to compute it again."""
        self._leave(request)
        if request.finish is not None:
            return
        self._slots.release(request.row)
        request.row, request.stored = -1, 0
        request.state = State.WAITING
        request.restarts += 1
        self.counts.restarts += 1
        self.add(request)

    def end(self, request: Request, finish: Finish, error: BaseException | None = None) -> None:
        """It gets no more tokens. Its row goes with `release_finished`, as this may be amid others' tokens."""
        if request.finish is None:
            request.finish, request.error, request.ended = finish, error, self._policy.clock()
            self.counts.finished[finish.value] = self.counts.finished.get(finish.value, 0) + 1
            self._finished.append(request)

    def release_finished(self) -> None:
        """Rows of those that have ended go to the prefix index, or back."""
        while self._finished:
            request = self._finished.pop(0)
            self._leave(request)
            if request.row >= 0:
                row, request.row = request.row, -1
                self._pass = self._refusals = 0
                if request.finish is Finish.ERROR:
                    self._slots.release(row)
                else:
                    self._prefixes.keep(row, request.tokens[: request.stored])
            request.state = State.DONE
            self.news.append((request, None))
        self._waiting = [(number, one) for number, one in self._waiting if not one.done]
        heapq.heapify(self._waiting)

    def end_all(self) -> None:
        """Everyone ends as cancelled."""
        for request in [*self.waiting, *self.active]:
            self.end(request, Finish.CANCELLED)
        self._lanes.clear()
        self.release_finished()

    # ---- starts

    def _end_those_who_must(self) -> None:
        now = self._policy.clock()
        for request in [*self.active, *self.waiting]:
            if request.cancelled:
                self.end(request, Finish.CANCELLED)
            elif request.asked.deadline is not None and now >= request.asked.deadline:
                self.end(request, Finish.DEADLINE)
        self.release_finished()

    def _claim_for_those_without(self) -> bool:
        """Who made way goes on, then others start. Where there was no memory, it is asked for less and less often while
        others move, as asking may mean to ask other processes."""
        if self._pass > 0 and (self._lanes.members or self._prefilling):
            self._pass -= 1
            return False
        moved = self._resume()
        return self._admit() or moved

    def _resume(self) -> bool:
        """Those who made way, the oldest first, as far as they can grow by some tokens."""
        moved = False
        for request in sorted(self._paused, key=_age):
            if not self._claim(request.row, request.stored + self._ahead(request)):
                break
            self._paused.remove(request)
            request.state = State.DECODE
            self._lanes.join(request)
            moved = True
        return moved

    def _admit(self) -> bool:
        """In the order of arrival, and nobody while others that had started wait for memory."""
        moved = False
        while self._waiting and not self._paused and len(self.active) < self._policy.max_batch:
            if not self._start(self._waiting[0][1]):
                break
            heapq.heappop(self._waiting)
            self.counts.admitted += 1
            moved = True
        return moved

    def _start(self, request: Request) -> bool:
        """A row, with memory for all that is known of the request and for what it is promised."""
        if not self.active and self._policy.max_batch > 1 and not self._claim(self._slots.idle_row, 1):
            return False  # places in a decoder that nobody takes write there, so it must not be what lacks memory later
        running = ((one.row, one.asked.array[: one.stored]) for one in self.active)
        source, shared = self._prefixes.longest(request.tokens, running)  # after the claim, which may take prefixes
        row = self._slots.acquire()
        if shared:
            try:
                self._slots.fork(row, source, shared)
            except OutOfPhysicalMemory:
                shared = 0
        if not self._claim(row, len(request.tokens) + self._ahead(request)):
            self._slots.release(row)
            return False
        if shared:
            self._prefixes.used(source, shared)
        request.row, request.stored, request.prefix_tokens = row, shared, shared
        request.state = State.PREFILL
        self._prefilling.append(request)
        return True

    def _ahead(self, request: Request) -> int:
        """Tokens of the answer beyond the known that memory is claimed for; the last one is never stored."""
        left = request.asked.max_new_tokens - len(request.answer) - 1
        return left if self._policy.promise is None else min(left, self._policy.promise)

    def _claim(self, row: int, tokens: int) -> bool:
        """Memory for so many tokens, exactly: of the pool, or of prefixes that nobody uses just now."""
        while True:
            try:
                self._slots.claim(row, tokens)
            except OutOfPhysicalMemory as shortage:
                self._shortage = str(shortage)
                if not self._prefixes.evict_one():
                    self._pass = min(1 << self._refusals, LONGEST_PASS)
                    self._refusals += 1
                    return False
                continue
            self._refusals = 0
            return True

    # ---- work

    def _prefill(self) -> bool:
        if not self._prefilling:
            return False
        rows = self._prompts.choose(self._prefilling)
        try:
            logits = self._prompts.run(rows)
        except OutOfPhysicalMemory as shortage:
            self._shortage = str(shortage)
            return False
        except Exception as error:  # the model's: these requests end, the others go on
            for request in rows:
                self.end(request, Finish.ERROR, error)
            return True
        for request, last in zip(rows, logits):
            if request.stored == request.known:
                try:
                    token = self._prompts.first(request, last)
                except Exception as error:
                    self.end(request, Finish.ERROR, error)
                    continue
                self._prefilling.remove(request)
                request.state = State.DECODE
                self.emit(request, token)
                if request.finish is None:
                    self._lanes.join(request)
        return True

    def _decode(self) -> bool:
        moved = False
        while self._lanes.members:
            try:
                self._lanes.step()
            except OutOfPhysicalMemory as shortage:
                self._shortage = str(shortage)
                if self._lanes.settle():  # some may have their last token by now, and need no more memory
                    self.release_finished()
                    moved = True
                elif not self._make_way():
                    return moved
                continue
            except Exception as error:  # the model's
                members = list(self._lanes.members)
                self._lanes.clear()
                for request in members:
                    self.end(request, Finish.ERROR, error)
                return True
            self.counts.steps += 1
            return True
        return moved

    def took(self, request: Request, token: int) -> None:
        """A decode step has stored its last token, and brought this one."""
        request.stored += 1
        self.counts.decoded_tokens += 1
        self.emit(request, token)

    def emit(self, request: Request, token: int) -> None:
        if request.first_token is None:
            request.first_token = self._policy.clock()
        request.answer.append(token)
        request.tries = 0
        self.news.append((request, token))
        if token in request.asked.stop:
            self.end(request, Finish.STOP)
        elif len(request.answer) == request.asked.max_new_tokens:
            self.end(request, Finish.LENGTH)

    # ---- where memory is short

    def _make_way(self) -> bool:
        """So that those who decode can grow: prefixes go, then the youngest. False where only one is left."""
        if self._prefixes.evict_one():
            return True
        if len(self._lanes.members) > 1:
            youngest = max(self._lanes.members, key=_age)
            if self._policy.keep_pages:
                self.pause(youngest)
            else:
                self.send_back(youngest)
            return True
        others = [*self._paused, *self._prefilling]
        if others:
            self.send_back(max(others, key=_age))
        return bool(others)

    def _stall(self) -> None:
        """Nobody moved. The youngest gives its pages back where others could use them; the last one after a while, and
        after so many of those in vain it ends, whether it holds a row or waits for it again."""
        active, now = self.active, self._policy.clock()
        if self._stalled_since is None:
            self._stalled_since = now
        if len(active) > 1:
            self.send_back(max(active, key=_age))
        elif now - self._stalled_since < self._policy.patience:
            return
        else:
            last = active[0] if active else self._waiting[0][1]
            if active or last.restarts:
                last.tries += 1
            if last.tries >= self._policy.tries:
                self._give_up(last)
            elif active:
                self.send_back(last)
        self._stalled_since = now

    def _give_up(self, request: Request) -> None:
        error = OutOfPhysicalMemory(
            f"a request of {request.known} tokens so far was alone and got no memory for more in {request.tries} "
            f"tries, {self._policy.patience} s each: {self._shortage}"
        )
        self.end(request, Finish.ERROR, error)
        self.release_finished()

    def _leave(self, request: Request) -> None:
        if request in self._lanes.members:
            self._lanes.leave(request)
        for group in (self._prefilling, self._paused):
            if request in group:
                group.remove(request)


def _age(request: Request) -> int:
    return request.number
