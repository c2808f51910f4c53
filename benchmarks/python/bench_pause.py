#!/usr/bin/env python3
"""Pausing a model and resuming it, against copies of the same bytes between the device and pinned memory.

    benchmarks/python/bench_pause.py [--device cuda:0] [--gib 8] [--json FILE]

The model holds half of the bytes as one tensor, as weights are, and half as a cache that grew in steps of 64 MiB. Rows:
GB/s of plain copies out and back in the same run, of pause() and of resume() with a backup, and their ratios;
milliseconds a GiB of both without a backup; seconds a GiB that pinning takes the first time. Of each the median of a
few rounds counts. For some 15 ms after 8 GiB have gone back the device clears them, and copies take longer meanwhile.
So a resume comes 0.3 s after its pause, and one at once is beside it, with a plain copy back at once. On a GPU it fails
where a bar is missed: 90 % of the plain copy's rate each way, and 1 ms a GiB for a resume without a backup.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import elastikv

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import pause_report

GIB = 1 << 30
STEP = 64 << 20
AWAY = 0.3  # seconds


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def seconds(device: str, run: Callable[[], object]) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def plain_copies(device: str, size: int, rounds: int) -> tuple[float, float]:
    """Bytes a second out of and into the device's memory, through a pinned buffer of 1 GiB at most."""
    piece = min(size, GIB)
    there = torch.ones(piece, dtype=torch.uint8, device=device)
    here = torch.ones(piece, dtype=torch.uint8, pin_memory=device != "cpu")
    repeats = size // piece

    def copy(to: torch.Tensor, source: torch.Tensor) -> None:
        for _ in range(repeats):
            to.copy_(source, non_blocking=True)

    out = [seconds(device, lambda: copy(here, there)) for _ in range(rounds + 1)][1:]
    back = [seconds(device, lambda: copy(there, here)) for _ in range(rounds + 1)][1:]
    return repeats * piece / statistics.median(out), repeats * piece / statistics.median(back)


def fill(model: elastikv.Model, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights = elastikv.zeros((size // 2,), torch.uint8, model, tag="weights").fill_(3)
    cache = elastikv.empty((0, STEP), (size // STEP, STEP), torch.uint8, model, tag="kv", scrub=False)
    for length in range(1, size // 2 // STEP + 1):
        elastikv.grow_(cache, length, exact=True)
        cache[length - 1].fill_(length % 200)
    return weights, cache


def check(weights: torch.Tensor, cache: torch.Tensor) -> None:
    assert bool((weights == 3).all()), "weights differ after a resume"
    for length in range(1, cache.shape[0] + 1):
        assert bool((cache[length - 1] == length % 200).all()), f"step {length} differs after a resume"


def measure(device: str, size: int, rounds: int) -> dict[str, float]:
    copy_out, copy_back = plain_copies(device, size, rounds)
    with elastikv.SharedMemoryPool(2 * size, device) as shared:
        model = shared.register_model("bench", 4 * size)
        weights, cache = fill(model, size)
        pinning = seconds(device, lambda: shared.keep_pinned(size + (1 << 20)))
        names = ("pause", "resume", "at_once", "forget", "remake", "copy_at_once")
        times: dict[str, list[float]] = {name: [] for name in names}
        for resume, away in (("resume", AWAY), ("at_once", 0.0)):
            for _ in range(rounds + 1):
                times["pause"].append(seconds(device, model.pause))
                assert model.stats().physical_usage == 0
                time.sleep(away)
                times[resume].append(seconds(device, model.resume))
        check(weights, cache)
        here = torch.ones(size // 2, dtype=torch.uint8, pin_memory=device != "cpu")

        def fill_again() -> None:
            weights.copy_(here, non_blocking=True)
            for length, piece in enumerate(here.split(STEP)):
                cache[length].copy_(piece, non_blocking=True)

        for _ in range(rounds + 1):
            times["forget"].append(seconds(device, lambda: model.pause("none")))
            times["remake"].append(seconds(device, model.resume))
            times["copy_at_once"].append(seconds(device, fill_again))
        median = {name: statistics.median(each[1:]) for name, each in times.items()}  # the first round warms up
        return {
            "bytes": size,
            "copy_out": copy_out,
            "copy_back": copy_back,
            "pause": size / median["pause"],
            "resume": size / median["resume"],
            "pause_ratio": size / median["pause"] / copy_out,
            "resume_ratio": size / median["resume"] / copy_back,
            "at_once": size / median["at_once"],
            "at_once_ratio": median["copy_at_once"] / median["at_once"],
            "copy_at_once": size / median["copy_at_once"],
            "forget_ms_per_gib": median["forget"] * 1e3 * GIB / size,
            "remake_ms_per_gib": median["remake"] * 1e3 * GIB / size,
            "pinning_s_per_gib": pinning * GIB / size,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gib", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the row here, too")
    asked = parser.parse_args()
    size = max(2 * STEP, int(asked.gib * GIB) // (2 * STEP) * (2 * STEP))
    row = measure(asked.device, size, asked.rounds)
    result = {"benchmark": "pause", "torch": torch.__version__, "device": asked.device, **row}
    if asked.json:
        with open(asked.json, "w") as file:
            json.dump(result, file, indent=1)
    pause_report.print_tables(result)
    if asked.device != "cpu" and not all(holds for *_, holds in pause_report.bars(result)):
        sys.exit("a bar is missed")


if __name__ == "__main__":
    main()
