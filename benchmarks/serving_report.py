"""Tables and picture of bench_serving's results, whole or not. Ratios compare ways of one run.

Needs nothing but Python, and matplotlib for the picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

HEAD = ("", "served", "waited > 1 s", "tokens/s", "first token p50", "p99")
WAYS = ("engine", "continuous", "static batches")
SHARES = ("pool", "static thirds")
COLORS = {"engine": "#3b73b9", "continuous": "#e8913a", "static batches": "#5a9e6f",
          "pool": "#3b73b9", "static thirds": "#e8913a"}  # fmt: skip


def line(row: dict[str, Any]) -> str:
    cut = f", cut after {row['cut_after']:.3g} s" if "cut_after" in row else ""
    return (
        f"{row['served']}/{row['requests']} served, {row['waited']} waited, {row['tokens_per_second']:.0f} tokens/s, "
        f"first token p50 {row['first_token_p50']:.3f} s, p99 {row['first_token_p99']:.3f} s{cut}"
    )


def cells(name: str, row: dict[str, Any], base: dict[str, Any] | None = None) -> tuple[str, ...]:
    """A row of the table; where there is a base, its ratio to that stands behind each number."""

    def against(field: str, text: str) -> str:
        if base is None or not base[field]:
            return text
        return f"{text} ({row[field] / base[field]:.3g} x)"

    cut = f", cut after {row['cut_after']:.3g} s" if "cut_after" in row else ""
    return (
        name + cut,
        f"{row['served']} of {row['requests']}",
        str(row["waited"]),
        against("tokens_per_second", f"{row['tokens_per_second']:.0f}"),
        against("first_token_p50", f"{row['first_token_p50'] * 1000:.0f} ms"),
        against("first_token_p99", f"{row['first_token_p99'] * 1000:.0f} ms"),
    )


def points(result: dict[str, Any]) -> list[dict[str, Any]]:
    """By series, then by load."""
    order = list(dict.fromkeys(point["series"] for point in result["points"]))
    return sorted(result["points"], key=lambda point: (order.index(point["series"]), point["burst"]))


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    ways = result["ways"]
    table = [cells(name, ways[name], ways.get("engine") if name != "engine" else None) for name in WAYS if name in ways]
    for point in points(result):
        table.append(cells(f"three models {point['series']}, {point['burst']:.2g} x a third: one pool", point["pool"]))
        table.append(cells("the same in static thirds", point["static thirds"], point["pool"]))
    return table


def missing(result: dict[str, Any]) -> list[str]:
    """What the run did not bring, in words."""
    notes = [f"{name}: {why}" for name, why in result["not_run"].items()]
    if result["points_not_run"]:
        notes.append("no time for three models " + "; ".join(result["points_not_run"]))
    return notes


def bars(result: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """What must hold of one run on a GPU: what, value, bar, whether it does."""
    lacking = [name for name in WAYS if name not in result["ways"]] + ["three"] * (not result["points"])
    which = f" ({', '.join(lacking)})" if lacking else ""
    found = [(f"parts that are missing{which}, at most", float(len(lacking)), 0.0, not lacking)]
    engine = result["ways"].get("engine")
    for name in WAYS[1:]:
        if engine and name in result["ways"]:
            ratio = engine["tokens_per_second"] / max(result["ways"][name]["tokens_per_second"], 1e-9)
            # Where all keep up with the trace, it is the trace that says how many tokens a second.
            found.append((f"engine: times the tokens/s of {name}, at least", ratio, 0.95, ratio >= 0.95))
            late = engine["first_token_p99"] / max(result["ways"][name]["first_token_p99"], 1e-9)
            found.append((f"engine: p99 of the first token against {name}, at most", late, 1.0, late <= 1.0))
    for point in points(result):
        pool, static = point["pool"], point["static thirds"]
        ratio = pool["served"] / max(static["served"], 1)
        where = f"{point['series']}, {point['burst']:.2g} x a third: pool against thirds"
        found.append((f"{where}: requests served, at least", ratio, 1.0, ratio >= 1.0))
    in_turn = [point for point in points(result) if point["series"].startswith("busy in turn")]
    if in_turn:
        best = max(p["static thirds"]["first_token_p99"] / max(p["pool"]["first_token_p99"], 1e-9) for p in in_turn)
        found.append(
            (
                "busy in turn: p99 of the first token in thirds against the pool, its best, at least",
                best,
                1.2,
                best >= 1.2,
            )
        )
    return found


def print_tables(result: dict[str, Any]) -> None:
    for row in (HEAD, *rows(result)):
        print(f"  {row[0]:62} {row[1]:>10} {row[2]:>13} {row[3]:>18} {row[4]:>20} {row[5]:>20}")
    for note in missing(result):
        print(f"  not here: {note}")


def markdown(result: dict[str, Any]) -> str:
    text = ["| " + " | ".join(HEAD) + " |", "|---|---:|---:|---:|---:|---:|"]
    text += ["| " + " | ".join(row) + " |" for row in rows(result)]
    if missing(result):
        text += ["", f"Not in this run of {result['budget_seconds']:g} s: {'. '.join(missing(result))}."]
    if "note" in result:
        text += ["", f"Measured so: {result['note']}."]
    return "\n".join(text)


def picture(result: dict[str, Any], path: Path) -> None:
    """On the left how many of one model's requests had their first token within so many seconds, by way; then for each
    series of three models, of two loads or more, p50 and p99 over the load, and between them how many times later the
    thirds' p99 is."""
    from matplotlib.figure import Figure

    series: dict[str, list[dict[str, Any]]] = {}
    for point in points(result):
        series.setdefault(point["series"], []).append(point)
    series = {name: those for name, those in series.items() if len(those) > 1}
    down = -(-(1 + len(series)) // 4)
    across = -(-(1 + len(series)) // down)
    figure = Figure(figsize=(4.8 * across, 4.4 * down), dpi=150, layout="constrained")
    left, *others = figure.subplots(down, across, squeeze=False).flatten()
    for unused in others[len(series) :]:
        unused.set_visible(False)
    for name, way in result["ways"].items():
        firsts = way["first_tokens"]
        shares = [100 * (index + 1) / max(way["requests"], 1) for index in range(len(firsts))]
        label = f"{name}, {way['tokens_per_second']:.0f} tokens/s"
        left.step(firsts, shares, where="post", color=COLORS[name], linewidth=1.8, label=label)
    left.set(xscale="log", ylim=(0, 102), xlabel="seconds to the first token", ylabel="% of all requests")
    left.set_title("One model", loc="left", fontsize=11)
    for axes, (name, those) in zip(others, series.items()):
        loads = [point["burst"] for point in those]
        for share in SHARES:
            for field, style in (("first_token_p50", "o--"), ("first_token_p99", "o-")):
                label = f"{share}, {field[-3:]}"
                axes.plot(
                    loads, [p[share][field] for p in those], style, color=COLORS[share], label=label, markersize=4
                )
        for load, point in zip(loads, those):
            pool, thirds = (point[share]["first_token_p99"] for share in SHARES)
            if pool > 0:
                axes.annotate(f"{thirds / pool:.2g} x", (load, max(thirds, pool)), (0, 5), textcoords="offset points",
                              ha="center", fontsize=8)  # fmt: skip
        axes.set(yscale="log", xlabel="requests of a model in its time / those that a third holds")
        axes.set_ylabel("seconds to the first token")
        axes.set_title(f"Three models {name}", loc="left", fontsize=11)
        axes.margins(y=0.12)
    for axes in (left, *others):
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
