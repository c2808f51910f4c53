"""Tables of bench_serving's results. Ratios compare ways of one run."""

from __future__ import annotations

from typing import Any

HEAD = ("", "served", "waited > 1 s", "tokens/s", "first token p50", "p99")
OTHERS = ("continuous", "static batches")


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['served']}/{row['requests']} served, {row['waited']} waited, {row['tokens_per_second']:.0f} tokens/s, "
        f"first token p50 {row['first_token_p50']:.3f} s, p99 {row['first_token_p99']:.3f} s"
    )


def cells(name: str, row: dict[str, Any], base: dict[str, Any] | None = None) -> tuple[str, ...]:
    """A row of the table; where there is a base, its ratio to that stands behind each number."""

    def against(field: str, text: str) -> str:
        if base is None or not base[field]:
            return text
        return f"{text} ({row[field] / base[field]:.3g} x)"

    return (
        name,
        f"{row['served']} of {row['requests']}",
        str(row["waited"]),
        against("tokens_per_second", f"{row['tokens_per_second']:.0f}"),
        against("first_token_p50", f"{row['first_token_p50'] * 1000:.0f} ms"),
        against("first_token_p99", f"{row['first_token_p99'] * 1000:.0f} ms"),
    )


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    engine = result["ways"]["engine"]
    table = [cells("engine", engine)]
    table += [cells(name, result["ways"][name], engine) for name in OTHERS if name in result["ways"]]
    for point in result["shares"]:
        size = f"{point['limit_bytes'] / (1 << 20):.4g} MiB"
        table.append(cells(f"three models, one pool of {size}", point["pool"]))
        table.append(cells("the same in static thirds", point["static thirds"], point["pool"]))
    return table


def bars(result: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """What must hold of one run on a GPU: what, value, bar, whether it does."""
    engine, found = result["ways"]["engine"], []
    for name in OTHERS:
        if name in result["ways"]:
            ratio = engine["tokens_per_second"] / result["ways"][name]["tokens_per_second"]
            # Where all keep up with the trace, it is the trace that says how many tokens a second.
            found.append((f"engine: times the tokens/s of {name}, at least", ratio, 0.95, ratio >= 0.95))
            late = engine["first_token_p99"] / max(result["ways"][name]["first_token_p99"], 1e-9)
            found.append((f"engine: p99 of the first token against {name}, at most", late, 1.0, late <= 1.0))
    for point in result["shares"]:
        pool, static = point["pool"], point["static thirds"]
        ratio = pool["served"] / max(static["served"], 1)
        where = f"pool of {point['limit_bytes'] / (1 << 20):.4g} MiB against thirds"
        found.append((f"{where}: requests served, at least", ratio, 1.0, ratio >= 1.0))
    return found


def print_tables(result: dict[str, Any]) -> None:
    for row in (HEAD, *rows(result)):
        print(f"  {row[0]:34} {row[1]:>10} {row[2]:>13} {row[3]:>18} {row[4]:>20} {row[5]:>20}")


def markdown(result: dict[str, Any]) -> str:
    text = ["| " + " | ".join(HEAD) + " |", "|---|---:|---:|---:|---:|---:|"]
    text += ["| " + " | ".join(row) + " |" for row in rows(result)]
    return "\n".join(text)
