"""Logs of allocations: any run can write one, `elastikv.torch.replay` runs it again on any allocator.

A log is a CSV file (read also if its name ends in .gz), one event a line, in the order in which they happened:

    time_ns,action,id,size,stream,pool,device
    10250,alloc,0,4194304,0,0,0

time_ns     nanoseconds since the log was started
action      alloc, free_requested, free_completed, segment_alloc, segment_free, segment_map, segment_unmap, oom, as
            torch names them
id          the block, numbered in order of allocation from 0; empty for segments and oom
size        bytes, as asked for; of segments, bytes drawn from the device or given back
stream      0 is the default stream; others are numbered in the order of their first use
pool        0 is the common memory; private pools (of graphs, of torch.cuda.MemPool) are numbered likewise
device      CUDA ordinal; -1 is the host

free_completed comes later than free_requested where other streams used the block. Blocks that were allocated before the
log began are left out.
"""

from __future__ import annotations

import atexit
import csv
import gzip
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from elastikv import _core
from elastikv.errors import InvalidArgument

COLUMNS = ("time_ns", "action", "id", "size", "stream", "pool", "device")
BLOCK_ACTIONS = ("alloc", "free_requested", "free_completed")
ACTIONS = (*BLOCK_ACTIONS, "segment_alloc", "segment_free", "segment_map", "segment_unmap", "oom")


@dataclass(frozen=True, slots=True)
class AllocationEvent:
    """One line of a log; `id` is None for segments and oom."""

    time_ns: int
    action: str
    id: int | None
    size: int
    stream: int = 0
    pool: int = 0
    device: int = 0


def start_allocation_log(path: str | Path) -> None:
    """Logs what torch's current CUDA allocator does from now on to `path`, which is replaced.

    Works on torch's own allocator and with elastikv installed, and costs some 50 ns an event. torch can't be told to
    forget a listener, so afterwards its allocator goes on making a note of each event, which costs a little, too.
    A log that is not stopped ends with the process.

    Raises InvalidArgument while another log runs, and for torch's pluggable allocator, which tells nothing; OSError
    where the file can't be written.
    """
    torch.cuda.init()  # type: ignore[no-untyped-call]
    _try_to_open(path)
    _core.start_allocation_log(str(path))
    atexit.register(_stop_at_exit)


def stop_allocation_log() -> None:
    """Writes what is left and closes the log. Raises VmmError where the file is not whole: the disk is full, say."""
    atexit.unregister(_stop_at_exit)
    _core.stop_allocation_log()


@contextmanager
def log_allocations(path: str | Path, model: _core.Model | None = None) -> Iterator[None]:
    """Logs what torch's current CUDA allocator does within the block; see `start_allocation_log`.

    With a model on the CPU: what is allocated in that model's own blocks, `model.use()`. Raises InvalidArgument while
    another log of the model runs.
    """
    if model is not None:
        _try_to_open(path)
        log = _core.CpuBlockLog(model, str(path))
        try:
            yield
        finally:
            log.stop()
        return
    start_allocation_log(path)
    try:
        yield
    finally:
        stop_allocation_log()


def read_log(path: str | Path) -> list[AllocationEvent]:
    """The events of a log. Columns may stand in any order, others are ignored.

    Raises InvalidArgument with file and line for what can't be read, OSError for a file that can't be opened.
    """
    with _open(path, "r") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            missing = [name for name in COLUMNS if name not in header]
            if missing:
                raise InvalidArgument(f"{path}: no column {', '.join(missing)}; a log has {', '.join(COLUMNS)}")
            places = [header.index(name) for name in COLUMNS]
            events = []
            for row in reader:
                events.append(_event([row[place] for place in places] if len(row) == len(header) else row))
        except (ValueError, EOFError, csv.Error, gzip.BadGzipFile) as wrong:
            if isinstance(wrong, InvalidArgument):
                raise
            raise InvalidArgument(f"{path}, line {reader.line_num}: {wrong}") from wrong
    return events


def write_log(path: str | Path, events: Iterable[AllocationEvent]) -> None:
    """Writes a log, packed if the name ends in .gz. The same events make the same bytes."""
    with _open(path, "w") as file:
        file.write(",".join(COLUMNS) + "\n")
        for event in events:
            block = "" if event.id is None else event.id
            file.write(
                f"{event.time_ns},{event.action},{block},{event.size},{event.stream},{event.pool},{event.device}\n"
            )


def compact(events: Iterable[AllocationEvent]) -> list[AllocationEvent]:
    """What a replay needs: no times, no segments, and no completion that comes right behind its request."""
    kept: list[AllocationEvent] = []
    for event in events:
        if event.action not in BLOCK_ACTIONS:
            continue
        at_once = event.action == "free_completed" and kept and kept[-1].id == event.id
        if not at_once:
            kept.append(AllocationEvent(0, event.action, event.id, event.size, event.stream, event.pool, event.device))
    return kept


def _try_to_open(path: str | Path) -> None:
    """Complains as Python does; opened for more, so that a log that is being written stays whole."""
    with open(path, "a"):
        pass


def _stop_at_exit() -> None:
    with suppress(InvalidArgument):
        _core.stop_allocation_log()


def _event(row: list[str]) -> AllocationEvent:
    if len(row) != len(COLUMNS):
        raise ValueError(f"{len(row)} values, and the header names another number of columns")
    time_ns, action, block, size, stream, pool, device = row
    if action not in ACTIONS:
        raise ValueError(f"action {action!r} is none of {', '.join(ACTIONS)}")
    if (block == "") == (action in BLOCK_ACTIONS):
        raise ValueError(f"{action} with {'no' if block == '' else 'an'} id")
    event = AllocationEvent(
        int(time_ns), action, int(block) if block else None, int(size), int(stream), int(pool), int(device)
    )
    if min(event.size, event.stream, event.pool, event.id or 0) < 0:
        raise ValueError("a negative id, size, stream or pool")
    return event


def _open(path: str | Path, mode: str) -> IO[str]:
    if not str(path).endswith(".gz"):
        return open(path, mode, newline="", encoding="utf-8")
    if mode == "r":
        return gzip.open(path, "rt", newline="", encoding="utf-8")
    return io.TextIOWrapper(_Packed(path), encoding="utf-8", newline="")


class _Packed(gzip.GzipFile):
    """Written without name and time, so that the same lines make the same bytes."""

    def __init__(self, path: str | Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115
        super().__init__(filename="", mode="wb", fileobj=self._file, mtime=0)

    def close(self) -> None:
        super().close()
        self._file.close()
