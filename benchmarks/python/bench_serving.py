#!/usr/bin/env python3
"""Serving a trace: the slots engine against transformers' ways, and one pool against static shares, in one run.

    benchmarks/python/bench_serving.py [--budget SECONDS] [--json FILE] [--picture FILE] [--trace AZURE.csv]  # on a GPU
    benchmarks/python/bench_serving.py --device cpu --tiny          # the same code with a toy model, to see it run
    benchmarks/python/bench_serving.py --from RESULT.json --picture FILE                 # draws a result again

A Llama of 16 layers with random weights (hidden 4096, 32/8 heads of 128) answers a trace in real time: requests come
when the trace says, whether or not the earlier ones are done. Time to the first token counts from then. Ways:

    engine          elastikv.serving.Engine
    continuous      transformers' own continuous batching, as it comes
    static batches  model.generate with a DynamicCache on batches of those who have come

Then three models (three engines; the weights are shared, the caches are not) answer the trace out of one pool, and out
of static thirds of the same memory, point by point: busy in turn at several loads, which is what a pool is for; at the
same time, which is what thirds are for; and with long answers.

It ends within the budget, whatever happens: each part has a process of its own, and a share of what time is left. The
budget decides how many requests the one model gets (in all ways the same) and how many points there are. What is late
is cut, and said to be; what was found is written after each part and point.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import serving_report
from report import show_bars

BEGAN = time.monotonic()
#: Seconds that are left for writing; and how much longer than its time a part may take to say what it has.
MARGIN, GRACE = 6.0, 4.0
#: Parts in their order, and how they share the time. The last takes what the others leave.
PARTS = {"engine": 1.5, "continuous": 2.5, "static batches": 2.0, "three": 4.0}


# ---- a part, in a process of its own


def say(text: str) -> None:
    print(f"  [{time.monotonic() - BEGAN:6.1f} s] {text}", file=sys.stderr, flush=True)


def child(name: str, arguments: argparse.Namespace) -> int:
    """Imports, says that it is ready, and runs its part when told until when (by time.monotonic)."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no finding

    def found(key: str, value: Any, name: str | None = "") -> None:
        lines.write(json.dumps([key, value, name]) + "\n")

    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from serving_parts import Part

    part = Part(arguments, found, say)
    found("ready", True)
    order = sys.stdin.readline()
    if order:
        global BEGAN
        BEGAN, until = map(float, order.split())
        part.run(name, until - time.monotonic() + time.perf_counter())
    return 0


# ---- the run


class Child:
    """A part's process. What it finds comes as [key, value, name]; None once it has ended."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--part", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        self._found: queue.SimpleQueue[list[Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._found.put(json.loads(line))
        self._found.put(None)

    def go(self, until: float) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which `next` tells
            self._process.stdin.write(f"{BEGAN} {until}\n")
            self._process.stdin.flush()

    def next(self, until: float) -> list[Any] | None:
        """Raises queue.Empty where nothing comes by then."""
        finding = self._found.get(timeout=max(until - time.monotonic(), 0.01))
        if finding is None:
            self._found.put(None)  # for who asks again
        return finding

    def end(self, patience: float = 0.0) -> int:
        """Its exit status; what still runs after so many seconds is killed."""
        try:
            return self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def put(result: dict[str, Any], key: str, value: Any, name: str | None) -> None:
    """A finding into the result: as it is, under a name of its own, or, without one, behind others."""
    if name == "":
        result[key] = value
    elif name is None:
        result[key].append(value)
    else:
        result[key][name] = value


def follow(one: Child, result: dict[str, Any], until: float) -> Iterator[None]:
    """Runs a part; yields after each finding. Notes what became of it."""
    one.go(until)
    try:
        while (finding := one.next(until + GRACE)) is not None:
            put(result, *finding)
            yield
        status = one.end(GRACE)
        if status:
            result["not_run"][one.name] = f"it ended with status {status}; what it said stands above"
    except queue.Empty:
        one.end()
        result["not_run"][one.name] = "it did not come to its end in its time, and was ended"
    if one.name in result["not_run"]:
        say(f"{one.name}: {result['not_run'][one.name]}")
    yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="a toy model")
    parser.add_argument("--budget", type=float, default=200.0, help="seconds, from the start to the end")
    parser.add_argument("--parts", default=",".join(PARTS), help="only these, by commas")
    parser.add_argument("--trace", type=Path, help="in the format of the Azure dataset; default: the package's own")
    parser.add_argument("--skip", type=float, default=0.0, help="seconds of the trace, as it is, to leave out first")
    parser.add_argument("--time-scale", type=float, default=1.0, help="multiplies the trace's times once more")
    parser.add_argument("--token-scale", type=float, default=1.0, help="multiplies the trace's token counts once more")
    parser.add_argument("--answer-scale", type=float, default=1.0, help="multiplies the answers' once more")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--from", dest="of", type=Path, help="runs nothing: tables and picture of this result")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = [name for name in PARTS if name in arguments.parts.split(",")]
    if not names or arguments.budget <= MARGIN:
        parser.error(f"--parts of {', '.join(PARTS)}, and a budget above {MARGIN:g} seconds")
    if arguments.part:
        return child(arguments.part, arguments)
    result = json.loads(arguments.of.read_text()) if arguments.of else run(names, arguments)
    if arguments.picture:
        try:
            serving_report.picture(result, arguments.picture)
        except ImportError as lacking:
            say(f"no picture: {lacking}; --from draws it elsewhere")
    serving_report.print_tables(result)
    fine = show_bars(serving_report.bars(result))
    return 0 if arguments.tiny or fine else 1


def run(names: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Part after part; the JSON file, where there is one, is whole after each finding."""
    result: dict[str, Any] = {
        "benchmark": "trace" if arguments.trace else "serving",
        "torch": "",
        "device": arguments.device,
        "model": "",
        "trace": "",
        "scales": {},
        "budget_seconds": arguments.budget,
        "one": {"requests": 0},
        "three": {"requests": 0},
        "ways": {},
        "points": [],
        "points_not_run": [],
        "not_run": dict.fromkeys(names, "it did not begin"),
    }

    def write() -> None:
        if arguments.json:
            half = arguments.json.with_suffix(".half")
            half.write_text(json.dumps(result, indent=2) + "\n")
            half.replace(arguments.json)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    end = BEGAN + arguments.budget - MARGIN
    write()
    # All import at the same time, before anything is measured; none touches the device before it is told to.
    children = {name: Child(name) for name in names}
    try:
        for one in children.values():
            with contextlib.suppress(queue.Empty):
                while (finding := one.next(end)) is not None and finding[0] != "ready":
                    put(result, *finding)
        say("all parts are ready")
        for name, one in children.items():
            now, shares = time.monotonic(), [PARTS[other] for other in names[names.index(name) :]]
            given = max(end - now, 0.0) * PARTS[name] / sum(shares)
            say(f"{name}: {given:.0f} s at most")
            del result["not_run"][name]
            for _ in follow(one, result, now + given - (GRACE if given > 3 * GRACE else 0.0)):
                write()
            if name in result["ways"]:
                say(f"{name}: {serving_report.line(result['ways'][name])}")
    finally:
        for one in children.values():
            one.end()
        result["seconds"] = time.monotonic() - BEGAN
        write()
    return result


if __name__ == "__main__":
    sys.exit(main())
