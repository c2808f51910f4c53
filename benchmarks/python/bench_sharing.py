#!/usr/bin/env python3
"""Idle memory that changes hands: A is idle at its peak, B starts and asks for all that A was not promised.

    benchmarks/python/bench_sharing.py [--json FILE]                 # on a GPU, 8 GiB
    benchmarks/python/bench_sharing.py --device cpu --size 268435456

Times are from B's asking to having the memory, and to its being zeroed and usable on the device; medians. A parks
all that it had, and its memory lies in extents as it would come: of open-ended growth, as a heap cuts them in a pool of
that size, of 32 MiB, as one, and with a handle a page, which nothing in elastikv makes by itself and which shows what a
handle costs. `other process`: A is in one. `parked as by default`: A keeps what models keep unless told otherwise.

Of extents that A hands over as they are (`received`, a share of what B gets) nothing is released or created: within a
process it is map and set_access, and unmap once B has the memory; from another process all five. `scrub` is what is
left once B has the memory; `outside`, for another process, is what B waited beyond all calls of both.
bench_hand_over has what these calls cost by the size of a handle.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import elastikv

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sharing_report
from report import show_bars

LARGEST = {"32 MiB extents": lambda size: 32 << 20, "a heap's extents": lambda size: max(size // 100, 8 << 20)}
CALLS = ("unmap", "release", "create", "map", "set_access")


class Peak:
    """Model A: memory that it takes in extents of some kind, and then leaves idle."""

    def __init__(self, pool: elastikv.SharedMemoryPool, kind: str, size: int) -> None:
        self.model = pool.register_model("A", 1 << 42)
        self.kind, self.size, self.page = kind, size, self.model.page_size
        self.rows = elastikv.SlotTensor(
            self.model, 1, size // self.page, self.page, torch.uint8,
            largest_extent=LARGEST[kind](size) if kind in LARGEST else 0,
        )  # fmt: skip

    def rise_and_fall(self) -> int:
        """Returns the number of extents that lie idle then."""
        pages = self.size // self.page
        if self.kind in ("open-ended", "a handle a page"):
            for length in range(1, pages + 1):
                self.rows.grow([0], [length], exact=self.kind == "a handle a page")
        else:
            self.rows.grow([0], [pages], exact=True)
        extents = self.model.stats().extents
        self.rows.shrink([0], [0])
        self.model.drain()
        return int(extents)


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


class Spent:
    """Milliseconds in each kind of driver call, over some rounds and models."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, float]] = []

    def add(self, before: dict[str, int], after: dict[str, int]) -> None:
        self.rounds.append({call: (after[call] - before[call]) / 1e6 for call in CALLS})

    def medians(self) -> dict[str, float]:
        return {call: statistics.median(each[call] for each in self.rounds) for call in CALLS}


def nanoseconds(*models: elastikv.Model) -> dict[str, int]:
    stats = [model.stats().driver_calls for model in models]
    return {call: sum(each[call].nanoseconds for each in stats) for call in CALLS}


def found(extents: int, asked: list[float], usable: list[float], calls: Spent, received: float) -> dict[str, Any]:
    ms = {"ms": statistics.median(asked) * 1e3, "usable_ms": statistics.median(usable) * 1e3}
    return {"extents": extents, **ms, "calls_ms": calls.medians(), "received": received}


def hand_over(
    device: str, size: int, kind: str, reserve: int = 0, rounds: int = 5, park_all: bool = True
) -> dict[str, Any]:
    """A in this process."""
    asked, usable, calls = [], [], Spent()
    with elastikv.SharedMemoryPool(size, device, park_limit=size if park_all else None) as pool:
        a, b = Peak(pool, kind, size), pool.register_model("B", 1 << 42)
        for number in range(rounds + 1):
            extents = a.rise_and_fall()
            assert not park_all or a.model.stats().parked == size, a.model.stats()
            a.model.set_quota(reserve=reserve)
            wait(device)
            before, received = nanoseconds(a.model, b), b.stats().received
            begin = time.perf_counter()
            theirs = elastikv.empty((size - reserve,), (size,), torch.uint8, b)
            had = time.perf_counter() - begin
            wait(device)
            if number:
                asked.append(had)
                usable.append(time.perf_counter() - begin)
                calls.add(before, nanoseconds(a.model, b))
                received = b.stats().received - received
            assert a.model.stats().physical_usage <= reserve and b.quota().grants == 0
            a.model.set_quota(reserve=0)
            del theirs
            wait(device)
            b.drain()
            pool.trim()
        del a
    return found(extents, asked, usable, calls, received / (size - reserve))


OTHER = """
import json, sys
import torch, elastikv
sys.path.insert(0, {folder!r})
from bench_sharing import Peak, nanoseconds
with elastikv.SharedMemoryPool({size}, {device!r}, park_limit={size}, name={name!r}) as pool:
    peak = Peak(pool, "open-ended", {size})
    for line in sys.stdin:
        told = peak.rise_and_fall() if line == "up\\n" else nanoseconds(peak.model)
        assert line != "up\\n" or peak.model.stats().parked == peak.size, peak.model.stats()
        print(json.dumps(told), flush=True)
"""


def from_other_process(device: str, size: int, rounds: int = 5) -> dict[str, Any]:
    name = f"bench-{os.getpid()}"
    script = OTHER.format(folder=str(Path(__file__).resolve().parent), size=size, device=device, name=name)
    asked, usable, calls = [], [], Spent()
    with elastikv.SharedMemoryPool(size, device, park_limit=size, name=name) as pool:
        b = pool.register_model("B", 1 << 42)
        other = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

        def ask(what: str) -> Any:
            assert other.stdin is not None and other.stdout is not None
            other.stdin.write(what + "\n")
            other.stdin.flush()
            return json.loads(other.stdout.readline())

        def spent() -> dict[str, int]:
            theirs, ours = ask("calls"), nanoseconds(b)
            return {call: theirs[call] + ours[call] for call in CALLS}

        try:
            for number in range(rounds + 1):
                extents = ask("up")
                before = spent()
                begin = time.perf_counter()
                theirs = elastikv.empty((size,), (size,), torch.uint8, b)
                had = time.perf_counter() - begin
                wait(device)
                if number:
                    asked.append(had)
                    usable.append(time.perf_counter() - begin)
                    calls.add(before, spent())
                del theirs
                wait(device)
                b.drain()
                pool.trim()
        finally:
            other.communicate(timeout=30)
    outside = [had * 1e3 - sum(each.values()) for had, each in zip(asked, calls.rounds)]
    return {**found(extents, asked, usable, calls, 0.0), "outside_ms": statistics.median(outside)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=8 << 30, help="bytes of A's peak")
    parser.add_argument("--json", help="write the result here, too")
    asked = parser.parse_args()
    device, size = asked.device, asked.size
    ways = {
        "open-ended": hand_over(device, size, "open-ended"),
        "open-ended, a quarter reserved": hand_over(device, size, "open-ended", reserve=size // 4),
        "a heap's extents": hand_over(device, size, "a heap's extents"),
        "32 MiB extents": hand_over(device, size, "32 MiB extents"),
        "32 MiB extents, parked as by default": hand_over(device, size, "32 MiB extents", park_all=False),
        "one extent": hand_over(device, size, "one extent"),
        "other process": from_other_process(device, size),
        "a handle a page": hand_over(device, size, "a handle a page", rounds=2),
    }
    result = {"benchmark": "sharing", "device": device, "torch": torch.__version__, "bytes": size, "ways": ways}
    if asked.json:
        Path(asked.json).write_text(json.dumps(result, indent=2) + "\n")
    sharing_report.print_tables(result)
    fine = show_bars(sharing_report.bars(result))
    return 0 if fine or device == "cpu" else 1


if __name__ == "__main__":
    sys.exit(main())
