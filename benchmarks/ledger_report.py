"""Tables and bars of bench_ledger's results: a charge and its release, by one thread. Needs nothing but Python."""

from __future__ import annotations

from typing import Any

Bar = tuple[str, float, float, bool]
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


def nanoseconds(raw: dict[str, Any]) -> dict[str, float]:
    """Of what Google Benchmark wrote, by row; the median where there are repetitions."""
    found: dict[str, float] = {}
    for run in raw["benchmarks"]:
        if run.get("aggregate_name", "median") != "median":
            continue
        unit = {"ns": 1.0, "us": 1e3, "ms": 1e6}[run["time_unit"]]
        # It divides the wall clock by the number of threads.
        found[run["run_name"].replace("/real_time", "")] = run["real_time"] * unit * run.get("threads", 1)
    return found


def bars(result: dict[str, Any]) -> list[Bar]:
    time = result["nanoseconds"]
    base, faster = time["shared/alone"], time["file/alone"] / time["shared/alone"]
    return [
        ("charge and release across processes, at most, ns", base, 200, base <= 200),
        ("times faster than the file, at least", faster, 10, faster >= 10),
    ]


def _rows(result: dict[str, Any]) -> list[tuple[str, float, float]]:
    time = result["nanoseconds"]
    return [(title, time[row], time[row] / time["shared/alone"]) for row, title in NAMES.items() if row in time]


def print_tables(result: dict[str, Any]) -> None:
    for title, time, ratio in _rows(result):
        print(f"  {title:38} {time:10.1f} ns {ratio:9.3g} x")


def markdown(result: dict[str, Any]) -> str:
    text = ["| | a charge and its release | |", "|---|---:|---:|"]
    text += [f"| {title} | {time:,.0f} ns | {ratio:.3g} x |" for title, time, ratio in _rows(result)]
    return "\n".join(text)
