#!/usr/bin/env python3
"""Turns runs of the benches into results files, and those into the README's tables.

    benchmarks/report.py collect RAW.json    # what one of them wrote -> benchmarks/results/
    benchmarks/report.py show FILE.json      # the tables with ratios and bars, on the terminal
    benchmarks/report.py readme              # writes the tables of the newest results into README.md

Ratios compare rows of one run, so they mean the same on a slow machine and on a fast one. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import allocator_report
import attention_report
import decode_report
import ledger_report
import pause_report
import serving_report
import sharing_report
import two_gpus_report
import vllm_report

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# What the benches in Python find is shown by a module of its own each.
REPORTS: dict[str, Any] = {
    "allocator": allocator_report,
    "attention": attention_report,
    "decode": decode_report,
    "ledger": ledger_report,
    "pause": pause_report,
    "serving": serving_report,
    "sharing": sharing_report,
    "trace": serving_report,
    "two-gpus": two_gpus_report,
    "vllm": vllm_report,
}
HEADLINES = {
    "allocator": "Torch's allocations",
    "attention": "Attention of one query a row, a layer, our kernel and torch's flash op,",
    "decode": "Milliseconds a token, median,",
    "ledger": "Keeping account of memory across processes, with a file as kvcached keeps it beside,",
    "pause": "A model that sleeps and wakes,",
    "serving": "A trace's requests to one model, and three models that share memory,",
    "sharing": "Memory that model A leaves idle, asked for by B,",
    "trace": "Requests of {trace}, scaled, to one model, and to three that share memory,",
    "two-gpus": "A split Llama, and peers' memory,",
    "vllm": "vLLM {vllm} with Llamas of random weights,",
}
NAMES = {
    "floor": "driver's floor: one handle",
    "plain_mmap": "plain anonymous mmap",
    "page_by_page": "a handle a page",
    "known_size": "elastikv, known size",
    "open_ended": "elastikv, in steps of 2 MiB",
    "parked": "elastikv, from parked",
}


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine(context: dict[str, Any]) -> dict[str, str]:
    smi = output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines()
    gpu, driver = smi[0].split(", ") if smi else ("", "")
    cpuinfo = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    model = [line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")]
    version = str(context.get("cuda_driver", ""))
    return {
        "cpu": model[0] if model else platform.machine(),
        "cores": str(context.get("num_cpus", "")),
        "gpu": context.get("cuda_device", gpu) or gpu,
        "driver": driver,
        "cuda": f"{int(version) // 1000}.{int(version) % 1000 // 10}" if version else "",
        "kernel": platform.release(),
    }


def collect(raw: pathlib.Path, commit: str, folder: pathlib.Path) -> pathlib.Path:
    """Writes `raw` as a results file in `folder` and returns its path."""
    data = json.loads(raw.read_text())
    if data.get("benchmark") in REPORTS:
        where = machine({"num_cpus": os.cpu_count()})
        return write(folder, where["gpu"], {"benchmark": data["benchmark"], "commit": commit, **where, **data})
    # Google Benchmark's: its medians.
    times = ledger_report.nanoseconds(data)
    if "shared/alone" in times:
        where = {**machine(data["context"]), "gpu": ""}
        return write(folder, "host", {"benchmark": "ledger", "commit": commit, **where, "nanoseconds": times})
    rows: dict[str, dict[str, float]] = {}
    for run in data["benchmarks"]:
        if run.get("aggregate_name") != "median":
            continue
        name = run["run_name"].split("/iterations:")[0]
        counters = {key: run[key] for key in ("driver_calls", "extents", "overshoot") if key in run}
        rows[name] = {"microseconds": run["real_time"], **counters}
    where = machine(data["context"])
    chip = where["gpu"] if any(name.startswith("cuda") for name in rows) else "host"
    return write(folder, chip, {"benchmark": "growth", "commit": commit, **where, "bytes": 1 << 30, "rows": rows})


def write(folder: pathlib.Path, chip: str, result: dict[str, Any]) -> pathlib.Path:
    """Writes `result`, of today, under a name of its benchmark, chip and date."""
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['benchmark']}-{chip.lower().replace(' ', '-')}-{date}.json"
    path.write_text(json.dumps({"benchmark": result["benchmark"], "date": date, **result}, indent=2) + "\n")
    return path


def lines(result: dict[str, Any], device: str) -> list[tuple[str, str, str, str, str]]:
    """Rows of the table for one device: name, time, against the floor, driver calls, overshoot."""
    mine = [name for name in result["rows"] if name.startswith(f"{device}/")]
    rows = {name.removeprefix(f"{device}/"): result["rows"][name] for name in mine}
    floor = rows["floor"]["microseconds"]
    table = []
    for key, title in NAMES.items():
        if key not in rows:
            continue
        row = rows[key]
        time = f"{row['microseconds']:.1f} µs" if row["microseconds"] < 1000 else f"{row['microseconds'] / 1000:.2f} ms"
        overshoot = f"{row['overshoot'] * 100:.1f} %" if "overshoot" in row else ""
        calls = f"{row['driver_calls']:.0f}" if "driver_calls" in row else ""
        table.append((title, time, f"{row['microseconds'] / floor:.3g} x", calls, overshoot))
    return table


def bars(result: dict[str, Any], device: str) -> list[tuple[str, float, float, bool]]:
    """What must hold of one run on a GPU: what, value, bar, whether it does."""
    row = {key: result["rows"][f"{device}/{key}"] for key in NAMES if f"{device}/{key}" in result["rows"]}
    time = {key: each["microseconds"] for key, each in row.items()}
    known, faster = time["known_size"] / time["floor"], time["page_by_page"] / time["open_ended"]
    overshoot, calls = row["open_ended"]["overshoot"], row["parked"]["driver_calls"]
    return [
        ("known size against the floor, at most", known, 1.3, known <= 1.3),
        ("open-ended: times faster than a handle a page, at least", faster, 10, faster >= 10),
        ("open-ended overshoot, at most", overshoot, 0.125, overshoot <= 0.125),
        ("from parked: driver calls, at most", calls, 0, calls == 0),
        ("from parked: microseconds, at most", time["parked"], 5, time["parked"] <= 5),
    ]


def devices(result: dict[str, Any]) -> list[str]:
    return sorted({name.split("/")[0] for name in result["rows"]}, reverse=True)


def show(result: dict[str, Any]) -> bool:
    """Prints the tables and the bars; False if a bar of a GPU is missed."""
    report = REPORTS.get(result["benchmark"])
    if report is not None:
        versions = ", ".join(f"{name} {result[name]}" for name in ("torch", "vllm") if name in result)
        print(f"{result['gpu'] or result['cpu']}, {versions}, {result['date']}, commit {result['commit']}")
        report.print_tables(result)
        return show_bars(report.bars(result))
    fine = True
    for device in devices(result):
        chip = result["cpu" if device == "cpu" else "gpu"]
        print(f"{device}: {chip}, {result['date']}, commit {result['commit']}")
        for title, time, ratio, calls, overshoot in lines(result, device):
            print(f"  {title:34} {time:>12} {ratio:>10} {calls:>6} calls {overshoot:>8}")
        if device == "cpu":
            continue
        fine = show_bars(bars(result, device)) and fine
    return fine


def show_bars(found: list[tuple[str, float, float, bool]], digits: int = 3) -> bool:
    """Prints what must hold, with so many digits of what was found; whether all of it does. For the benches, too."""
    for what, value, bar, holds in found:
        print(f"  {'ok  ' if holds else 'MISS'} {what} {bar:g}: {value:.{digits}g}")
    return all(holds for *_, holds in found)


def markdown(result: dict[str, Any], device: str) -> str:
    gpu = f"{result['gpu']}, driver {result['driver']}, CUDA {result['cuda']}"
    where = "the host backend" if device == "cpu" else gpu
    text = [f"1 GiB made resident on {where} ({result['date']}, commit {result['commit']}):", ""]
    text += ["| | time | against the floor | driver calls | overshoot |", "|---|---:|---:|---:|---:|"]
    text += ["| " + " | ".join(row) + " |" for row in lines(result, device)]
    return "\n".join(text)


def newest(benchmark: str) -> dict[str, Any] | None:
    files = [(json.loads(path.read_text()), path.name) for path in RESULTS.glob(f"{benchmark}-*.json")]
    return max(files, key=lambda each: (each[0]["date"], each[1]))[0] if files else None


def growth_section(result: dict[str, Any]) -> str:
    return "\n\n".join(markdown(result, device) for device in devices(result))


def section(result: dict[str, Any]) -> str:
    if result["benchmark"] == "growth":
        return growth_section(result)
    gpu = f"two {result['gpu']} of one host" if result["benchmark"] == "two-gpus" else result["gpu"]
    where = (
        f"{gpu}, driver {result['driver']}, torch {result['torch']}"
        if gpu
        else f"{result['cpu']}, {result['cores']} cores"
    )
    what = HEADLINES[result["benchmark"]].format_map(result)
    head = f"{what} on {where} ({result['date']}, commit {result['commit']}):"
    return f"{head}\n\n{REPORTS[result['benchmark']].markdown(result)}"


def readme() -> None:
    """Replaces the README's tables by those of the newest results."""
    path = ROOT / "README.md"
    text = path.read_text()
    for benchmark in ("growth", *REPORTS):
        begin, end = f"<!-- {benchmark}: made by benchmarks/report.py readme -->", f"<!-- {benchmark}: end -->"
        result = newest(benchmark)
        if result is None or begin not in text:
            continue
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}\n{section(result)}\n{end}{after}"
    path.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect")
    collecting.add_argument("raw", type=pathlib.Path)
    collecting.add_argument("--out", type=pathlib.Path, default=RESULTS)
    known = os.environ.get("ELASTIKV_COMMIT") or output_of("git", "rev-parse", "--short", "HEAD")
    collecting.add_argument("--commit", default=known or "unknown", help="default: $ELASTIKV_COMMIT, or git's HEAD")
    showing = commands.add_parser("show")
    showing.add_argument("file", type=pathlib.Path)
    commands.add_parser("readme")
    arguments = parser.parse_args()
    if arguments.command == "collect":
        path = collect(arguments.raw, arguments.commit, arguments.out)
        print(path)
        return 0 if show(json.loads(path.read_text())) else 1
    if arguments.command == "show":
        return 0 if show(json.loads(arguments.file.read_text())) else 1
    readme()
    return 0


if __name__ == "__main__":
    sys.exit(main())
