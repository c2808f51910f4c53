"""Tables and bars of bench_attention's results. Needs nothing but Python."""

from __future__ import annotations

from typing import Any

Bar = tuple[str, float, float, bool]


def title(shape: dict[str, Any]) -> str:
    return f"{shape['tokens']} x {shape['rows']}, {shape['heads']}/{shape['kv_heads']} heads of {shape['dim']}"


def ratio(shape: dict[str, Any]) -> float:
    """Times faster than the flash op."""
    times = shape["microseconds"]
    return float(times["flash"] / times["elastikv"])


def bars(result: dict[str, Any]) -> list[Bar]:
    return [
        (f"{title(shape)}: times faster than the flash op, at least", ratio(shape), 1, ratio(shape) >= 1)
        for shape in result["shapes"]
    ]


def _cells(shape: dict[str, Any]) -> list[str]:
    times = shape["microseconds"]
    rates = [f"{shape['bytes'] / time / 1e3:.0f}" for time in (times["elastikv"], times["flash"])]
    return [f"{times['elastikv']:.1f}", f"{times['flash']:.1f}", f"{ratio(shape):.2f}", *rates]


def print_tables(result: dict[str, Any]) -> None:
    for shape in result["shapes"]:
        ours, theirs, times, rate, their_rate = _cells(shape)
        print(
            f"  {title(shape):34} elastikv {ours:>7} us  flash {theirs:>7} us  {times} x  "
            f"({rate} and {their_rate} GB/s)"
        )


def markdown(result: dict[str, Any]) -> str:
    text = ["| tokens x rows | elastikv, µs | flash op, µs | times faster | GB/s | flash, GB/s |"]
    text.append("|---|---:|---:|---:|---:|---:|")
    text += [f"| {title(shape)} | " + " | ".join(_cells(shape)) + " |" for shape in result["shapes"]]
    return "\n".join(text)
