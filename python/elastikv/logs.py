"""What pools do, through Python's logging: growth, reclaim, running out of memory, pauses.

>>> import logging, elastikv.logs
>>> logging.basicConfig(level=logging.INFO)
>>> elastikv.logs.start()

| logger | level | when |
|---|---|---|
| elastikv.growth | DEBUG | an extent was made |
| elastikv.reclaim | DEBUG | an extent went back to the device |
| elastikv.out_of_memory | WARNING | a request was refused for want of physical memory |
| elastikv.pause, elastikv.resume | INFO | a model gave its memory up for a while, and has it again |

Each record carries `pool` (the model's name), `size`, `physical` (what the model holds afterwards), both in bytes, and
`seconds` (how long it took), for handlers that write structured logs. Records are made on a thread of ours, a moment
later, as the memory is made under locks that must not wait for Python; `created` is when it happened.

Until start() nothing is recorded. Then only what a logger is enabled for is: levels are looked at by start(), so call
it again after changing them.
"""

from __future__ import annotations

import atexit
import logging
import threading

from elastikv import _core

LEVELS = {
    "growth": logging.DEBUG,
    "reclaim": logging.DEBUG,
    "out_of_memory": logging.WARNING,
    "pause": logging.INFO,
    "resume": logging.INFO,
}
_TEXTS = {
    "growth": "%s grew by %s to %s",
    "reclaim": "%s gave %s back and holds %s",
    "out_of_memory": "%s lacked %s, and holds %s",
    "pause": "%s paused: gave %s up and holds %s",
    "resume": "%s resumed: took %s and holds %s",
}

_lock = threading.Lock()
_thread: threading.Thread | None = None
_stopping = threading.Event()


def start() -> None:
    """Events go to the loggers from now on, those that are enabled for their level. Thread safe."""
    global _thread
    with _lock:
        wanted = [kind for kind, level in LEVELS.items() if _logger(kind).isEnabledFor(level)]
        _core.want_events(wanted)
        if _thread is None or not _thread.is_alive():
            _stopping.clear()
            _thread = threading.Thread(target=_run, name="elastikv-logs", daemon=True)
            _thread.start()


@atexit.register
def stop() -> None:
    """What happened so far is logged; nothing more is recorded. Calling it again does nothing."""
    global _thread
    with _lock:
        _core.want_events([])
        if _thread is not None:
            _stopping.set()
            _core.wake_events()
            _thread.join()
        _thread = None


def _logger(kind: str) -> logging.Logger:
    return logging.getLogger(f"elastikv.{kind}")


def _run() -> None:
    while True:
        last = _stopping.is_set()
        events, dropped = _core.take_events(0 if last else 60)
        for event in events:
            _log(*event)
        if dropped:
            logging.getLogger("elastikv").warning(
                "%d events came faster than they could be logged and were dropped", dropped, extra={"dropped": dropped}
            )
        if last:
            return


def _log(kind: str, pool: str, size: int, physical: int, seconds: float, created: float) -> None:
    logger, level = _logger(kind), LEVELS[kind]
    if not logger.isEnabledFor(level):
        return
    record = logger.makeRecord(
        logger.name, level, __file__, 0, _TEXTS[kind], (pool or "a pool", _text(size), _text(physical)), None,
        extra={"pool": pool, "size": size, "physical": physical, "seconds": seconds},
    )  # fmt: skip
    record.created = created
    record.msecs = created % 1 * 1000
    logger.handle(record)


def _text(size: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size} bytes"
