"""Who takes an engine's steps: a thread of its own, or the caller, for several engines in turn."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from types import TracebackType

from elastikv.errors import InvalidArgument, OutOfPhysicalMemory, PoolClosed
from elastikv.serving.engine import Engine

logger = logging.getLogger("elastikv.serving")

#: Seconds until an engine that could not move for want of memory tries again, if nobody wakes it.
RETRY = 0.005

_starting = threading.Lock()


class Runner:
    """A thread that steps an engine while there is something to do, and sleeps else. Thread safe.

    Use as a context manager, or call stop. The engine stays open; what it has not finished waits for another Runner, or
    for those who iterate over their requests. Raises InvalidArgument for an engine that has one already, PoolClosed for
    one that is closed; ends by itself when the engine is closed.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: BaseException | None = None  # what ended the thread, if neither stop nor the engine's end
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"elastikv-engine-{engine.name}", daemon=True)
        with _starting:
            if engine.threaded:
                raise InvalidArgument(f"engine {engine.name!r} has a thread that steps it already: stop that one first")
            if engine.closed:
                raise PoolClosed(f"engine {engine.name!r} was closed")
            engine.threaded = True
        self._thread.start()

    def stop(self) -> None:
        """After the step that is under way, which it waits for unless it is called by that step's listeners. May be
        called twice."""
        self._stopping = True
        self.engine.wake()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        engine = self.engine
        try:
            while not (self._stopping or engine.closed):
                if engine.idle:
                    engine.sleep(None)
                elif not engine.advance():
                    engine.sleep(RETRY)
        except PoolClosed as error:  # in the middle of it, if the engine is
            if not engine.closed:
                self._fail(error)
        except BaseException as error:
            self._fail(error)
        finally:
            engine.threaded = False
            engine.look_again()

    def _fail(self, error: BaseException) -> None:
        """Nobody would step for those who wait."""
        self.error = error
        logger.error("the thread of engine %r ends", self.engine.name, exc_info=error)
        self.engine.close()


class Round:
    """Engines that take their steps in turn, on the caller's thread. Where none can move, the youngest makes way."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = list(engines)
        self._dry = 0  # rounds without a move

    @property
    def idle(self) -> bool:
        return all(engine.idle for engine in self.engines)

    def advance(self) -> None:
        """A step of each. Raises OutOfPhysicalMemory where nothing helps any more, as others hold the memory."""
        moved = [engine.advance() for engine in self.engines if not engine.idle]
        if any(moved) or self.idle:
            self._dry = 0
            return
        self._dry += 1
        for engine in self.engines:
            engine.handle.drain()
        running = [request for engine in self.engines for request in engine.running]
        if self._dry > 3 + len(running):
            waiting = sum(engine.waiting for engine in self.engines)
            raise OutOfPhysicalMemory(
                f"{waiting} requests wait and {len(running)} hold rows, but none can move: others hold the memory, or "
                "one needs more than there is"
            )
        if len(running) > 1:
            youngest = max(running, key=lambda request: request.number)
            next(engine for engine in self.engines if youngest in engine.running).give_way(youngest)


def run_until_idle(*engines: Engine) -> None:
    """Takes the engines' steps in turn until none has anything to do. Errors are those of `Round.advance`."""
    together = Round(engines)
    while not together.idle:
        together.advance()
