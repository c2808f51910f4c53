"""Tables and bars of bench_pause's results. Needs nothing but Python."""

from __future__ import annotations

from typing import Any

Bar = tuple[str, float, float, bool]
LABELS = {"at_once": "resume and copy at once"}
WAYS = (("pause", "pause_ratio", "copy_out"), ("resume", "resume_ratio", "copy_back"))


def all_ways(result: dict[str, Any]) -> tuple[tuple[str, str, str], ...]:
    at_once = (("at_once", "at_once_ratio", "copy_at_once"),) if "at_once" in result else ()
    return (*WAYS, *at_once)


def bars(result: dict[str, Any]) -> list[Bar]:
    """What must hold of one run on a GPU: what, value, bar, whether it does."""
    found: list[Bar] = [
        (f"{name} against a pinned copy, at least", result[ratio], 0.9, result[ratio] >= 0.9) for name, ratio, _ in WAYS
    ]
    taken = result["remake_ms_per_gib"]
    return [*found, ("resume without a backup, ms a GiB, at most", taken, 1, taken <= 1)]


def print_tables(result: dict[str, Any]) -> None:
    print(f"{result['bytes'] / 2**30:.3g} GiB on {result['device']}")
    for name, ratio, plain in all_ways(result):
        rates = f"{result[name] / 1e9:8.1f} GB/s   plain copy {result[plain] / 1e9:8.1f} GB/s"
        print(f"{LABELS.get(name, name):>24} {rates}   ratio {result[ratio]:.3f}")
    print(f"{'pause without a backup':>24} {result['forget_ms_per_gib']:8.3f} ms/GiB")
    print(f"{'resume without a backup':>24} {result['remake_ms_per_gib']:8.3f} ms/GiB")
    print(f"{'pinning, the first time':>24} {result['pinning_s_per_gib']:8.3f} s/GiB")


def markdown(result: dict[str, Any]) -> str:
    text = [f"| {result['bytes'] / 2**30:.3g} GiB | with a backup | pinned copy | without |", "|---|---:|---:|---:|"]
    without = {"pause": "forget_ms_per_gib", "resume": "remake_ms_per_gib"}
    for name, ratio, plain in all_ways(result):
        rest = f"{result[without[name]]:.2f} ms a GiB" if name in without else ""
        text.append(
            f"| {LABELS.get(name, name)} | {result[name] / 1e9:.1f} GB/s ({result[ratio]:.3f} x) | "
            f"{result[plain] / 1e9:.1f} GB/s | {rest} |"
        )
    return "\n".join(text)
