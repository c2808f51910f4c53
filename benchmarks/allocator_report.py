"""Tables and bars of bench_allocator.py's results: on the terminal (with rich, where it is there) and as Markdown."""

from __future__ import annotations

from typing import Any

TITLES = {
    "native": "torch's own",
    "expandable": "torch's, expandable segments",
    "installed": "elastikv, installed",
    "pluggable": "elastikv, pluggable",
    "cut": "installed, extents of 32 MiB at most",
}
OURS = ("installed", "pluggable")
GIB = 1 << 30


def fragmentation(trace: dict[str, Any], row: dict[str, float]) -> float:
    """1 - peak allocated / peak reserved; what is allocated is the same for all: each block rounded up to 512 bytes."""
    return float(1 - trace["peak_allocated"] / row["peak_reserved"])


def size_table(result: dict[str, Any]) -> list[list[str]]:
    """The header, and a row an allocator: microseconds of an allocation and its free, and against torch's own."""
    table = [["allocate + free, from Python", *result["sizes"]]]
    for allocator, title in TITLES.items():
        if allocator == "cut":
            continue  # as "installed": no memory is drawn
        cells = []
        for rows in result["sizes"].values():
            row = rows[allocator]
            ratio = "" if allocator == "native" else f" ({row['to_native']:.2f} x)"
            cells.append(f"{row['microseconds']:.2f} µs{ratio}")
        table.append([title, *cells])
    return table


def trace_table(trace: dict[str, Any]) -> list[list[str]]:
    """The header, and a row an allocator."""
    table = [["", "cold", "steady", "peak reserved", "fragmentation", "runs in"]]
    for allocator, title in TITLES.items():
        if allocator not in trace["cold"]:
            continue
        cold, steady = trace["cold"][allocator], trace["steady"][allocator]
        times = [
            f"{row['milliseconds']:.1f} ms" + ("" if allocator == "native" else f" ({row['to_native']:.2f} x)")
            for row in (cold, steady)
        ]
        reserved = f"{cold['peak_reserved'] / GIB:.2f} GiB"
        table.append([title, *times, reserved, f"{fragmentation(trace, cold) * 100:.1f} %", least(trace, allocator)])
    return table


def least(trace: dict[str, Any], allocator: str) -> str:
    """The least memory that the trace ran in, as a share of what is allocated at its peak."""
    found = trace.get("tight", {}).get(allocator)
    return f"{found['share']:.2f} x, {found['milliseconds']:.0f} ms" if found else ""


def trace_title(name: str, trace: dict[str, Any]) -> str:
    return f"{name}: {trace['operations']} operations, {trace['peak_allocated'] / GIB:.2f} GiB allocated at the peak"


def bars(result: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """What must hold of a run: what, value, bar, whether it does."""
    found = []

    def at_most(what: str, value: float, bar: float) -> None:
        found.append((what + ", at most", value, bar, value <= bar))

    for allocator, bar in zip(OURS, (1.0, 1.2)):
        for size, rows in result["sizes"].items():
            at_most(f"{allocator}: allocate and free {size} against torch's own", rows[allocator]["to_native"], bar)
    for name, trace in result["traces"].items():
        for allocator in OURS:
            for kind in ("cold", "steady"):
                ratio = trace[kind][allocator]["to_native"]
                at_most(f"{allocator}: {name}, {kind}, time against torch's own", ratio, 1.05)
            mine = trace["cold"][allocator]["peak_reserved"]
            best = min(trace["cold"][other]["peak_reserved"] for other in ("native", "expandable"))
            at_most(f"{allocator}: {name}, peak reserved against the better of torch's", mine / best, 1.0)
            at_most(f"{allocator}: {name}, fragmentation", fragmentation(trace, trace["cold"][allocator]), 0.02)
    return found


def tables(result: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Titles and tables, the first without a title."""
    traces = [(trace_title(name, trace), trace_table(trace)) for name, trace in result["traces"].items()]
    return [("", size_table(result)), *traces]


def print_tables(result: dict[str, Any]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for title, rows in tables(result):
            print(title)
            for name, *cells in rows:
                print(f"  {name:30}" + "".join(f"{cell:>22}" for cell in cells))
        return
    console = Console(width=120)
    for title, (header, *rows) in tables(result):
        table = Table(title=title or None, title_justify="left")
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def markdown(result: dict[str, Any]) -> str:
    text = []
    for title, (header, *rows) in tables(result):
        if title:
            text += ["", title[0].upper() + title[1:] + ":", ""]
        text += ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
        text += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(text)
