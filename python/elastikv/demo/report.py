"""The files that a run leaves behind: the timeline as CSV, the summary as JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastikv.demo.accounting import Service, Timeline

FIELDS = ("physical", "dynamic_cache", "static_cache", "running")


def write_timeline(path: Path, timeline: Timeline, names: Sequence[str]) -> None:
    """One line a round: seconds of the trace, then bytes and running jobs of each model, of all, and waiting jobs."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = [f"{name}_{field}" for name in names for field in FIELDS]
        writer.writerow(["seconds", *columns, "total_physical", "waiting"])
        for sample in timeline.samples:
            values = [getattr(model, field) for model in sample.models for field in FIELDS]
            writer.writerow([sample.seconds, *values, sample.physical, sample.waiting])


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def model_summary(service: Service, timeline: Timeline, index: int, half: int) -> dict[str, Any]:
    stats = service.handle.stats()
    return {
        "name": service.role.name,
        "about": service.role.about,
        "requests": service.done,
        "tokens": service.tokens,
        "bytes_per_token": service.role.token_bytes,
        "physical_peak": stats.peak_physical,
        "over_static_half": max(stats.peak_physical - half, 0),
        "static_cache_peak": timeline.peak("static_cache", index),
        "dynamic_cache_peak": timeline.peak("dynamic_cache", index),
        "address_space": stats.virtual_capacity,
        "driver_calls": stats.total_driver_calls,
        "physical_now": stats.physical_usage,
    }
