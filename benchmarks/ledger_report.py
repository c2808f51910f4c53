#!/usr/bin/env python3
"""The ratios of a run of bench_ledger, and whether its bars hold.

    benchmarks/ledger_report.py build/bench/bench_ledger.json

Times are of a charge and its release, in one thread. Ratios compare rows of one run. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

NAMES = {
    "private/alone": "ledger of this process",
    "shared/alone": "ledger in shared memory",
    "shared/processes/2": "... and one other process",
    "shared/processes/8": "... and seven other processes",
    "shared/threads:2": "... two threads",
    "shared/threads:8": "... eight threads",
    "file/alone": "a file, locked and mapped an update",
    "file/threads:2": "... two threads",
    "file/threads:8": "... eight threads",
}


def times(path: pathlib.Path) -> dict[str, float]:
    """Nanoseconds by row; the median where there are repetitions."""
    found: dict[str, float] = {}
    for run in json.loads(path.read_text())["benchmarks"]:
        if run.get("aggregate_name", "median") != "median":
            continue
        unit = {"ns": 1.0, "us": 1e3, "ms": 1e6}[run["time_unit"]]
        # Google Benchmark divides the wall clock by the number of threads.
        found[run["run_name"].replace("/real_time", "")] = run["real_time"] * unit * run.get("threads", 1)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path)
    time = times(parser.parse_args().file)
    base = time["shared/alone"]
    for row, title in NAMES.items():
        if row in time:
            print(f"  {title:38} {time[row]:10.1f} ns {time[row] / base:9.3g} x")
    fine = True
    for what, value, bar, holds in (
        ("charge and release across processes, at most, ns", base, 200, base <= 200),
        ("times faster than the file, at least", time["file/alone"] / base, 10, time["file/alone"] >= 10 * base),
    ):
        print(f"  {'ok  ' if holds else 'MISS'} {what} {bar:g}: {value:.3g}")
        fine = fine and holds
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
