#!/usr/bin/env python3
"""elastikv's two ways in for a whole process against torch's own allocator, in one run on a GPU:

    native      torch's caching allocator             installed   elastikv.torch.install(pool)
    expandable  the same with expandable segments     pluggable   elastikv.torch.pluggable_allocator(pool)
                                                      cut         installed, growth cut into extents of 32 MiB

    benchmarks/python/bench_allocator.py [--json FILE] [--traces FOLDER] [--record FOLDER]

An allocator has a process of its own. Processes stay alive and measure in turn, in rounds, in an order drawn anew each
time, as the machine's clocks drift; ratios are medians of the ratios within a round. Rows:

- `torch.empty` and `del` from Python, of one size, over and over
- a trace replayed in a process that has allocated nothing yet (cold, a fresh process each round), and again once the
  allocator has its memory (steady). Traces are the *.csv.gz of a folder (default: benchmarks/traces); where it has
  none, or with --record, they are recorded first, by record_traces.py
- the same traces under a memory fraction, lowered until the allocator runs out of memory

Peak reserved is what the allocator held of the device; for elastikv, what the pool held, parked memory included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TRACES = HERE.parent / "traces"
ALLOCATORS = ("native", "expandable", "installed", "pluggable", "cut")
SIZES = {"1 KiB": 1 << 10, "2 MiB": 2 << 20, "64 MiB": 64 << 20, "1 GiB": 1 << 30}
CUT = 32 << 20
TIGHT = ("native", "expandable", "installed")
SHARES = (1.4, 1.3, 1.2, 1.15, 1.12, 1.1, 1.08, 1.06, 1.05, 1.04, 1.03, 1.02, 1.01)  # of what is allocated at the peak
SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING")


# --- a worker: one allocator, told what to measure on stdin ---


class Worker:
    def __init__(self, allocator: str) -> None:
        import torch

        import elastikv
        import elastikv.torch

        self.torch = torch
        self.allocator = allocator
        self.shared = None
        self.traces: dict[str, Any] = {}
        if allocator in ("installed", "pluggable", "cut"):
            # Not from torch, which would set its own allocator up.
            total = next(row["total"] for row in elastikv.devices() if row["device"] == "cuda:0")
            self.shared = elastikv.SharedMemoryPool(physical_limit=total, device="cuda:0")
        if allocator in ("installed", "cut"):
            elastikv.torch.install(self.shared, largest_extent=CUT if allocator == "cut" else None)
        if allocator == "pluggable":
            torch.cuda.memory.change_current_allocator(elastikv.torch.pluggable_allocator(self.shared))
        torch.cuda.init()
        torch.cuda.synchronize()  # the context is there, and nothing is allocated
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # all on one core, as cores differ in their clocks

    def load(self, trace: str) -> dict[str, int]:
        from elastikv.torch.allocation_log import read_log
        from elastikv.torch.replay import operations_of

        operations = operations_of(read_log(trace))
        self.traces[trace] = operations.replay()
        return {"operations": len(operations), "peak_allocated": operations.peak_allocated()}

    def empty(self, size: int, count: int) -> float:
        """Microseconds of one allocation and its free: the median of batches."""
        empty, dtype = self.torch.empty, self.torch.uint8
        batches = []
        for _ in range(6):
            start = time.perf_counter()
            for _ in range(count):
                tensor = empty(size, dtype=dtype, device="cuda")
                del tensor
            batches.append((time.perf_counter() - start) / count * 1e6)
        return statistics.median(batches[1:])

    def cold(self, trace: str) -> dict[str, float]:
        took = self.traces[trace].run_on_cuda(0)
        return {"milliseconds": took / 1e6, **self.peaks(), **self.driver_calls()}

    def steady(self, trace: str, passes: int) -> dict[str, float]:
        """The median of a few passes after one that draws the memory, which goes back afterwards."""
        replay = self.traces[trace]
        replay.run_on_cuda(0)
        times = [replay.run_on_cuda(0) / 1e6 for _ in range(passes)]
        result = {"milliseconds": statistics.median(times), **self.peaks()}
        self.torch.cuda.synchronize()
        self.torch.cuda.empty_cache()
        return result

    def tight(self, trace: str, allowed: int) -> dict[str, float] | None:
        """None if the allocator ran out of what it was allowed. All memory goes back afterwards."""
        total = self.torch.cuda.get_device_properties(0).total_memory
        self.torch.cuda.set_per_process_memory_fraction(allowed / total)
        try:
            return {"milliseconds": self.traces[trace].run_on_cuda(0) / 1e6}
        except self.torch.OutOfMemoryError:
            return None
        finally:
            self.torch.cuda.synchronize()
            self.torch.cuda.empty_cache()

    def peaks(self) -> dict[str, int]:
        from elastikv import _core

        stats = _core.entry_points_stats(0) if self.allocator == "pluggable" else self.torch.cuda.memory_stats(0)
        kept = {name: int(stats[f"{name}_bytes.all.peak"]) for name in ("allocated", "requested", "reserved")}
        held = self.shared.global_stats().peak_physical if self.shared is not None else kept["reserved"]
        return {**{f"stats_{name}": value for name, value in kept.items()}, "peak_reserved": held}

    def driver_calls(self) -> dict[str, float]:
        """Of elastikv, by call: how many there were and the milliseconds they took, on all threads."""
        calls: dict[str, float] = {}
        for name in self.shared.models() if self.shared is not None else ():
            for call, made in self.shared.model(name).stats().driver_calls.items():
                if made.count:
                    calls[f"driver_{call}"] = calls.get(f"driver_{call}", 0) + made.count
                    calls[f"driver_{call}_ms"] = calls.get(f"driver_{call}_ms", 0) + made.nanoseconds / 1e6
        return calls


def serve(allocator: str) -> None:
    """One line of JSON in, one out: the name of a method of Worker and its arguments."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between
    worker = Worker(allocator)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        method, arguments = json.loads(line)
        print(json.dumps(getattr(worker, method)(**arguments)), file=answers, flush=True)
    os._exit(0)  # memory need not be given back piece by piece


# --- the run ---


class Process:
    """A worker's process; starts at once, and is waited for at the first call."""

    def __init__(self, allocator: str) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in SETTINGS}
        if allocator == "expandable":
            environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        self.allocator = allocator
        self.ready = False
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", allocator],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self.allocator} worker ended with exit code {self.process.wait()}")
        return json.loads(line)

    def send(self, method: str, **arguments: Any) -> None:
        if not self.ready:
            self.answer()
            self.ready = True
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([method, arguments]) + "\n")
        self.process.stdin.flush()

    def call(self, method: str, **arguments: Any) -> Any:
        self.send(method, **arguments)
        return self.answer()


class Rows:
    """Measurements by row and allocator, one a round."""

    def __init__(self) -> None:
        self.of: dict[str, dict[str, list[dict[str, float]]]] = {}

    def add(self, row: str, allocator: str, measured: dict[str, float]) -> None:
        self.of.setdefault(row, {}).setdefault(allocator, []).append(measured)

    def summary(self, row: str, time_key: str) -> dict[str, dict[str, float]]:
        """The medians of each allocator, and of its time's ratio to the two of torch's."""
        measured = self.of[row]
        table: dict[str, dict[str, float]] = {}
        for allocator, rounds in measured.items():
            # A call of the driver that was not needed in some round was made 0 times in it.
            keys = dict.fromkeys(key for each in rounds for key in each)
            table[allocator] = {key: statistics.median(each.get(key, 0) for each in rounds) for key in keys}
            for other in ("native", "expandable"):
                ratios = [mine[time_key] / its[time_key] for mine, its in zip(rounds, measured[other])]
                table[allocator][f"to_{other}"] = statistics.median(ratios)
        return table


def shuffled(rng: random.Random, items: Any) -> list[Any]:
    return rng.sample(list(items), len(items))


def measure_sizes(workers: dict[str, Process], rounds: int, rng: random.Random) -> dict[str, Any]:
    rows = Rows()
    for index in range(rounds + 1):
        for size in shuffled(rng, SIZES):
            for allocator in shuffled(rng, ALLOCATORS):
                taken = workers[allocator].call("empty", size=SIZES[size], count=200)
                if index:  # the first round draws the memory
                    rows.add(size, allocator, {"microseconds": taken})
    return {size: rows.summary(size, "microseconds") for size in SIZES}


def measure_steady(workers: dict[str, Process], traces: dict[str, Path], rounds: int, rng: random.Random) -> Rows:
    rows = Rows()
    for worker in workers.values():
        for path in traces.values():
            worker.call("load", trace=str(path))
    for _ in range(rounds):
        for name, path in shuffled(rng, traces.items()):
            for allocator in shuffled(rng, ALLOCATORS):
                rows.add(name, allocator, workers[allocator].call("steady", trace=str(path), passes=3))
    return rows


def measure_cold(traces: dict[str, Path], rounds: int, rng: random.Random) -> tuple[Rows, dict[str, Any]]:
    """A process for each measurement: those of a round start together, and measure one after the other."""
    rows, about = Rows(), {}
    for _ in range(rounds):
        fresh = {(name, allocator): Process(allocator) for name in traces for allocator in ALLOCATORS}
        try:
            for (name, _), process in fresh.items():
                process.send("load", trace=str(traces[name]))
            for (name, _), process in fresh.items():
                about[name] = process.answer()
            for name in shuffled(rng, traces):
                for allocator in shuffled(rng, ALLOCATORS):
                    with fresh.pop((name, allocator)) as process:
                        rows.add(name, allocator, process.call("cold", trace=str(traces[name])))
        finally:
            for process in fresh.values():
                process.__exit__()
    return rows, about


def measure_tight(traces: dict[str, Path], peaks: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Of each trace and allocator: the least share of the peak that it ran in, and the time that it took there."""
    found: dict[str, dict[str, Any]] = {name: {} for name in traces}
    for allocator in TIGHT:
        with Process(allocator) as process:
            for name, path in traces.items():
                process.call("load", trace=str(path))
                for share in SHARES:
                    ran = process.call("tight", trace=str(path), allowed=int(share * peaks[name]))
                    if ran is None:
                        break
                    found[name][allocator] = {"share": share, **ran}
    return found


def record(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    recorders = []
    for run in ("training", "serving"):
        command = [sys.executable, str(HERE / "record_traces.py"), run, str(folder / f"{run}.csv.gz")]
        environment = {key: value for key, value in os.environ.items() if key not in SETTINGS}
        recorders.append(subprocess.Popen(command, env=environment))
    codes = [recorder.wait() for recorder in recorders]
    if any(codes):
        raise SystemExit("recording the traces failed")


def measure(traces: dict[str, Path], quick: bool) -> dict[str, Any]:
    rng = random.Random(0)
    started = time.monotonic()

    def say(done: str) -> None:
        print(f"  {time.monotonic() - started:5.0f} s: {done}", file=sys.stderr, flush=True)

    # In this order, so that what is cold finds the device empty.
    cold, about = measure_cold(traces, 1 if quick else 5, rng)
    say("traces, cold")
    workers = {allocator: Process(allocator) for allocator in ALLOCATORS}
    try:
        sizes = measure_sizes(workers, 3 if quick else 25, rng)
        say("sizes")
        steady = measure_steady(workers, traces, 1 if quick else 5, rng)
        say("traces, steady")
    finally:
        for worker in workers.values():
            worker.__exit__()
    tight = measure_tight(traces, {name: about[name]["peak_allocated"] for name in traces})
    say("traces, with little memory")
    rows = {}
    for name in traces:
        rows[name] = {
            **about[name],
            "tight": tight[name],
            "cold": cold.summary(name, "milliseconds"),
            "steady": steady.summary(name, "milliseconds"),
        }
    return {"benchmark": "allocator", "sizes": sizes, "traces": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", choices=ALLOCATORS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write what was measured here, for benchmarks/report.py collect")
    parser.add_argument("--traces", type=Path, default=TRACES, help="a folder of logs, *.csv.gz")
    parser.add_argument("--record", type=Path, help="record traces into this folder first, and replay these")
    parser.add_argument("--quick", action="store_true", help="a round or three of everything, to see that it runs")
    asked = parser.parse_args()
    if asked.worker:
        serve(asked.worker)
    import torch

    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device, and this bench measures allocators of GPU memory")
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.record or asked.traces
        if asked.record is None and not list(folder.glob("*.csv.gz")):
            folder = Path(temporary)
        if folder != asked.traces or asked.record:
            record(folder)
        traces = {path.name.removesuffix(".csv.gz"): path for path in sorted(folder.glob("*.csv.gz"))}
        result = measure(traces, asked.quick)
    result["torch"] = torch.__version__
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n")

    sys.path.insert(0, str(HERE.parent))
    import allocator_report

    allocator_report.print_tables(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
