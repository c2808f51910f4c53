#!/usr/bin/env python3
"""Decoding with ElasticCache against transformers' caches: milliseconds a token, in one run, as ratios. And forks.

    benchmarks/python/bench_decode.py [--quick] [--budget SECONDS] [--json FILE]    # on a GPU
    benchmarks/python/bench_decode.py --device cpu --tiny                           # the same code with toy models

Models have random weights, and caches are filled with random keys and values: what a step costs does not depend on
them. Each step is timed by itself, with the device waited for: p50 and p99 of them count. Ways that are held against
each other closely take their steps by turns. Ways:

    graph            elastikv's decoder: one CUDA graph for every length, memory mapped as it grows
    graph, resident  the same over rows that are wholly mapped from the start
    graph, joined    the same with the projections of one input joined
    graph, compiled  that with the rest of the model compiled (one point)
    eager            the model with an ElasticCache and attention 'elastikv', as generate() calls it
    eager, sdpa      the model with an ElasticCache and its own attention, SDPA's flash back end forced
    dynamic          DynamicCache, as it comes
    dynamic, flash   DynamicCache with SDPA's flash back end forced, its best
    static           StaticCache
    static, compiled StaticCache with the forward compiled, as generate() compiles it (one point)

What matters most runs first. --budget: once so many seconds have passed since the start, or a compilation would not fit
into what is left of them, nothing more is begun; the result says what was not run. It is written as it comes.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()

import torch  # noqa: E402 (importing takes its part of the budget)
from decode_fork import forks_of  # noqa: E402
from decode_ways import Model, config_of  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import decode_report  # noqa: E402
from report import show_bars  # noqa: E402

#: Ways that run together, and how many steps of each are timed, in a full and in a quick run.
RACES = {
    "graphs": (("graph", "graph, resident"), 128, 64),
    "eager": (("eager", "dynamic, flash", "eager, sdpa"), 100, 60),
    "dynamic": (("dynamic",), 10, 10),
    "static": (("static",), 16, 16),
    "joined": (("graph, joined",), 64, 64),
    "rest": (("graph, compiled",), 64, 64),
    "compiled": (("static, compiled",), 40, 40),
}
#: Seconds that a race takes at most: it is not begun with less of the budget left.
TAKES = {"rest": 70.0, "compiled": 100.0}
USUAL = 8.0
UNCOMPILED = ("graphs", "joined", "eager", "dynamic", "static")
Point = tuple[str, int, int]


@dataclass(frozen=True)
class Job:
    point: Point
    race: str


def jobs_of(*points: Point) -> list[Job]:
    return [Job(point, race) for point in points for race in UNCOMPILED]


QUICK = jobs_of(("gqa", 1024, 1), ("gqa", 8192, 4), ("mha", 8192, 1))
FULL = [
    *jobs_of(("gqa", 8192, 4)),
    Job(("gqa", 8192, 4), "rest"),
    *jobs_of(("gqa", 1024, 1), ("gqa", 32768, 1), ("mha", 8192, 1)),
    Job(("gqa", 8192, 4), "compiled"),
    *jobs_of(
        *(("gqa", 32768, 4), ("gqa", 8192, 16), ("gqa", 1024, 64), ("mha", 1024, 1), ("mha", 32768, 1)),
        *(("mha", 8192, 4), ("gqa", 8192, 1), ("gqa", 1024, 16), ("mha", 1024, 64), ("gqa", 1024, 4)),
        *(("mha", 8192, 16), ("mha", 32768, 4), ("gqa", 8192, 64), ("gqa", 32768, 16), ("mha", 1024, 16)),
        *(("mha", 1024, 4),),
    ),
]
TINY = [*jobs_of(("gqa", 64, 2)), Job(("gqa", 64, 2), "rest"), *jobs_of(("gqa", 48, 1), ("mha", 48, 1))]


class Run:
    """The jobs of one run, and what was found so far."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.gpu = asked.device != "cpu"
        self._models: dict[str, Model] = {}
        self.points: dict[Point, dict[str, Any]] = {}
        self.result: dict[str, Any] = {
            "benchmark": "decode", "device": asked.device, "torch": torch.__version__, "quick": asked.quick,
            "bandwidth": copy_bandwidth(asked.device), "forks": [], "points": [], "seconds": 0.0,
        }  # fmt: skip

    def model(self, kind: str) -> Model:
        if kind not in self._models:
            self._models[kind] = Model(kind, self.asked.device, self.asked.tiny)
        return self._models[kind]

    def point(self, point: Point) -> dict[str, Any]:
        if point not in self.points:
            kind, tokens, batch = point
            model = self.model(kind)
            kv_bytes = batch * tokens * model.token_bytes
            limit = (model.weight_bytes + kv_bytes) / self.result["bandwidth"] * 1e3
            found = {"model": kind, "context": tokens, "batch": batch, "ways": {}, "kv_bytes": kv_bytes, "limit": limit}
            self.points[point] = found
            self.result["points"].append(found)
        return self.points[point]

    def left(self) -> float:
        return float("inf") if self.asked.budget is None else self.asked.budget - (time.monotonic() - BEGAN)

    def fork(self, tokens: int) -> None:
        for chunk in (tokens, 1024):
            self.result["forks"].append(forks_of(config_of("gqa", self.asked.tiny), self.asked.device, tokens, chunk))
        decode_report.print_forks(self.result)

    def run(self, job: Job) -> None:
        names, full, quick = RACES[job.race]
        found = self.point(job.point)
        if self.left() < TAKES.get(job.race, USUAL):
            found["ways"].update({name: {"not_run": "the budget was spent"} for name in names})
            return
        begin = time.monotonic()
        steps = self.asked.steps or (quick if self.asked.quick else full)
        # Two caches at once where they fit, else one after the other.
        for group in [names] if self._fits(job, len(names)) else [(name,) for name in names]:
            found["ways"].update(self._race(job, group, steps))
        found["ways"][names[0]]["race_s"] = time.monotonic() - begin
        decode_report.print_point(found, names)

    def _fits(self, job: Job, caches: int) -> bool:
        if not self.gpu:
            return True
        weights = sum(model.weight_bytes for model in self._models.values())
        total = torch.cuda.get_device_properties(self.asked.device).total_memory
        # And a tenth of a cache for what DynamicCache copies and StaticCache's attention repeats.
        return weights + (caches + 0.1) * self.point(job.point)["kv_bytes"] < 0.92 * total

    def _race(self, job: Job, names: tuple[str, ...], steps: int) -> dict[str, Any]:
        kind, tokens, batch = job.point
        try:
            return self.model(kind).race(names, batch, tokens, steps)
        except Exception as error:  # what one way can't do is a line of the result, and the others go on
            return {name: {"error": (str(error).splitlines() or [type(error).__name__])[0]} for name in names}
        finally:
            gc.collect()
            if self.gpu:
                torch.cuda.empty_cache()

    def write(self) -> None:
        self.result["seconds"] = time.monotonic() - BEGAN
        if self.asked.json:
            Path(self.asked.json).write_text(json.dumps(self.result, indent=2) + "\n")


def copy_bandwidth(device: str) -> float:
    """Bytes a second that the device reads and writes in a plain copy: the yardstick for the limit."""
    source = torch.empty((1 << 30) if device != "cpu" else (1 << 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(6):
        if device != "cpu":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        target.copy_(source)
        if device != "cpu":
            torch.cuda.synchronize()
        best = max(best, 2 * source.nbytes / (time.perf_counter() - begin))
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="three points and few steps")
    parser.add_argument("--tiny", action="store_true", help="toy models and short contexts")
    parser.add_argument("--steps", type=int, help="timed steps a way, instead of as many as each deserves")
    parser.add_argument("--budget", type=float, help="seconds after which nothing more is begun")
    parser.add_argument("--json", help="write the result here, too")
    asked = parser.parse_args()
    with torch.inference_mode():
        run = Run(asked)
        run.fork(2048 if asked.tiny else 32768)
        for job in TINY if asked.tiny else QUICK if asked.quick else FULL:
            run.run(job)
            run.write()
    print(f"{run.result['seconds']:.0f} s")
    fine = show_bars(decode_report.bars(run.result))
    return 0 if fine or asked.device == "cpu" else 1


if __name__ == "__main__":
    sys.exit(main())
