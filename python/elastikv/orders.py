"""Obeying what a person orders from outside: `elastikv sleep MODEL` and `elastikv wake MODEL`."""

from __future__ import annotations

import threading
import types
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elastikv._core import Model, Order


def obey(model: Model, *, sleep: Callable[[], object], wake: Callable[[], object]) -> None:
    """`elastikv sleep` and `elastikv wake` call these from now on, in the order in which they come.

    One at a time, on a thread of their own. What one raises is what the person is told. They replace what the model had
    for that before; `model.on_order(None)` takes them away. Methods are held weakly, so that nothing is kept alive.
    """
    model.on_order(_Obedience(_weakly(sleep), _weakly(wake)))


def _weakly(function: Callable[[], object]) -> Callable[[], object]:
    if not isinstance(function, types.MethodType):
        return function
    reference = weakref.WeakMethod(function)

    def call() -> object:
        method = reference()
        if method is None:
            raise RuntimeError("what would have obeyed is gone")
        return method()

    return call


class _Obedience:
    """A queue of orders, and a thread while there are any."""

    def __init__(self, sleep: Callable[[], object], wake: Callable[[], object]) -> None:
        self._actions = {"sleep": sleep, "wake": wake}
        self._lock = threading.Lock()
        self._orders: deque[Order] = deque()
        self._running = False

    def __call__(self, order: Order) -> None:
        with self._lock:
            self._orders.append(order)
            if self._running:
                return
            try:
                threading.Thread(target=self._run, name="elastikv-orders", daemon=True).start()
            except BaseException:
                self._orders.clear()
                raise
            self._running = True

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._orders:
                    self._running = False
                    return
                order = self._orders.popleft()
            try:
                self._actions[order.kind]()
            except BaseException as error:  # SystemExit, too, or later orders would wait for a thread that is gone
                order.refuse(str(error) or type(error).__name__)
            else:
                order.done()
