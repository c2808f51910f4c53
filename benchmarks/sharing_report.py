"""Tables and bars of bench_sharing's results. Needs nothing but Python."""

from __future__ import annotations

from typing import Any

Bar = tuple[str, float, float, bool]
SHOWN_ONLY = ("a handle a page",)  # nothing makes such extents by itself


def bars(result: dict[str, Any]) -> list[Bar]:
    """What must hold of one run on a GPU: what, value, bar, whether it does."""
    return [
        (f"{way}: milliseconds from asking to having it, at most", row["ms"], 10, row["ms"] <= 10)
        for way, row in result["ways"].items()
        if way not in SHOWN_ONLY
    ]


def print_tables(result: dict[str, Any]) -> None:
    print(f"{result['bytes'] / 2**30:.3g} GiB idle in A, asked for by B:")
    for way, row in result["ways"].items():
        calls = {**row.get("calls_ms", {}), "scrub": row["usable_ms"] - row["ms"]}
        if "outside_ms" in row:
            calls["outside"] = row["outside_ms"]
        parts = ", ".join(f"{call} {time:.2f}" for call, time in calls.items())
        if "received" in row:
            parts += f"; {100 * row['received']:.0f} % handed over"
        print(
            f"  {way:37} {row['extents']:5} extents  {row['ms']:8.3f} ms, usable after {row['usable_ms']:8.3f} ms"
            f"  ({parts})"
        )


def markdown(result: dict[str, Any]) -> str:
    text = [f"| {result['bytes'] / 2**30:.3g} GiB idle in A | extents | B has it after | usable after |"]
    text.append("|---|---:|---:|---:|")
    for way, row in result["ways"].items():
        text.append(f"| {way} | {row['extents']} | {row['ms']:.2f} ms | {row['usable_ms']:.2f} ms |")
    return "\n".join(text)
