"""Tables and bars of bench_decode's results. Needs nothing but Python."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

BASELINES = ("dynamic", "dynamic, flash", "static", "static, compiled")
#: Columns of the table, as far as they were run. Ways of one point only stand in a sentence below it.
COLUMNS = ("graph", "graph, joined", "graph, resident", "eager", "eager, sdpa", "dynamic", "dynamic, flash", "static")
Bar = tuple[str, float, float, bool]


def p50(point: dict[str, Any], way: str) -> float | None:
    """Milliseconds a token; None where the way was not run, or did not fit."""
    found: float | None = point["ways"].get(way, {}).get("p50")
    return found


def fastest_baseline(point: dict[str, Any]) -> float | None:
    """None unless all that compete everywhere were run or did not fit: a missing one might have been the fastest."""
    if any("not_run" in point["ways"].get(way, {"not_run": ""}) for way in BASELINES[:3]):
        return None
    return min((time for way in BASELINES if (time := p50(point, way)) is not None), default=None)


def title(point: dict[str, Any]) -> str:
    return f"{point['model']} {point['context']} x {point['batch']}"


def print_point(point: dict[str, Any], ways: Iterable[str] | None = None) -> None:
    """All ways of a point, or some."""
    graph = p50(point, "graph")
    print(f"{title(point)}: the limit is {point['limit']:.2f} ms", flush=True)
    for way in point["ways"] if ways is None else ways:
        row = point["ways"][way]
        if "p50" not in row:
            print(f"  {way:18} {row.get('error') or row.get('not_run')}", flush=True)
            continue
        more = [f"first token {row['first_token_s']:.2f} s"] if "first_token_s" in row else []
        if "needed" in row:
            more.append(f"{row['bytes'] / 2**20:.0f} MiB for {row['needed'] / 2**20:.0f}")
        elif "bytes" in row:
            more.append(f"{row['bytes'] / 2**20:.0f} MiB")
        ratio = f"{row['p50'] / graph:6.2f} x" if graph else ""
        print(f"  {way:18} {row['p50']:9.3f} ms  p99 {row['p99']:9.3f} {ratio}  {', '.join(more)}", flush=True)


def print_forks(result: dict[str, Any]) -> None:
    for found in result.get("forks", []):
        print(f"{found['forks']} forks of {found['tokens']} tokens that came in chunks of {found['chunk']}", flush=True)
        for name in ("whole", "ragged"):
            row = found[name]
            print(
                f"  {name:8} {row['p50_ms']:7.3f} ms each, at worst {row['worst_ms']:.3f}; {row['driver_calls']:.0f} "
                f"driver calls, {row['extents']} extents; all together {row['bytes_forked'] / row['bytes']:.3f} x",
                flush=True,
            )


def print_tables(result: dict[str, Any]) -> None:
    print_forks(result)
    for point in result["points"]:
        print_point(point)


def _over(what: str, value: float | None, bar: float, found: list[Bar]) -> None:
    if value is not None:
        found.append((f"{what}, at least", value, bar, value >= bar))


def _under(what: str, value: float | None, bar: float, found: list[Bar]) -> None:
    if value is not None:
        found.append((f"{what}, at most", value, bar, value <= bar))


def fork_bars(result: dict[str, Any]) -> list[Bar]:
    """Of prompts whose length was known: as chunks of unknown number come in more pieces."""
    found: list[Bar] = []
    for forks in result.get("forks", []):
        if forks["chunk"] < forks["tokens"]:
            continue
        for name in ("whole", "ragged"):
            row, what = forks[name], f"fork of {forks['tokens']} tokens, {name}"
            _under(f"{what}: milliseconds", row["p50_ms"], 1, found)
            _under(f"{what}: eight against one, bytes", row["bytes_forked"] / row["bytes"], 1.15, found)
    return found


def bars(result: dict[str, Any]) -> list[Bar]:
    """What must hold of one run on a GPU: what, value, bar, whether it does."""
    found = fork_bars(result)
    for point in result["points"]:
        name, graph, dynamic = title(point), p50(point, "graph"), p50(point, "dynamic")
        if graph is None:
            continue
        fastest = fastest_baseline(point)
        if point["model"] == "gqa":
            _over(f"{name}: faster than DynamicCache", dynamic and dynamic / graph, 8, found)
            _over(f"{name}: faster than the fastest baseline", fastest and fastest / graph, 1.7, found)
            _under(f"{name}: against the limit", graph / point["limit"], 1.8, found)
            if (point["context"], point["batch"]) == (8192, 4):
                compiled, best = p50(point, "static, compiled"), p50(point, "graph, joined") or graph
                _over(f"{name}: joined, faster than StaticCache compiled", compiled and compiled / best, 3, found)
            rest = p50(point, "graph, compiled")
            _under(f"{name}: the rest compiled, against the limit", rest and rest / point["limit"], 1.4, found)
        else:
            _over(f"{name}: faster than the fastest baseline", fastest and fastest / graph, 1, found)
        row = point["ways"]["graph"]
        _under(f"{name}: p99 against p50", row["p99"] / row["p50"], 1.2, found)
        _under(f"{name}: first graphed token, seconds", row["first_token_s"], 1, found)
        if "needed" in row:
            _under(
                f"{name}: peak bytes against the tokens'", (row["bytes"] - row["slack"]) / row["needed"], 1.13, found
            )
        resident = p50(point, "graph, resident")
        _under(f"{name}: against memory wholly resident", resident and graph / resident, 1.02, found)
        eager, flash = p50(point, "eager"), p50(point, "dynamic, flash")
        _under(f"{name}: eager against DynamicCache with flash", eager and flash and eager / flash, 1, found)
    return found


# ---- for the README


def _ordered(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The points that were run, by model and size: they ran by importance."""
    run = [point for point in result["points"] if any("p50" in row for row in point["ways"].values())]
    return sorted(run, key=lambda point: (point["model"], point["context"], point["batch"]))


def _times(points: list[dict[str, Any]]) -> list[str]:
    """Milliseconds a token by point and way."""
    ways = [way for way in COLUMNS if any(p50(point, way) for point in points)]
    text = ["| model, context x batch | limit | " + " | ".join(ways) + " |", "|---|" + "---:|" * (len(ways) + 1)]
    for point in points:
        times = [p50(point, way) for way in ways]
        cells = ["" if time is None else f"{time:.2f}" for time in times]
        text.append(f"| {title(point)} | {point['limit']:.2f} | " + " | ".join(cells) + " |")
    return text


def _sentences(points: list[dict[str, Any]]) -> list[str]:
    """Ways that ran at one point only, and the first token."""
    text = []
    for point in points:
        rest, static = p50(point, "graph, compiled"), p50(point, "static, compiled")
        if rest:
            text.append(f"Joined, and with the rest of the model compiled, {title(point)} takes {rest:.2f} ms.")
        if static:
            wait = point["ways"]["static, compiled"]["first_token_s"]
            text.append(
                f"StaticCache compiled takes {static:.2f} ms at {title(point)}, after {wait:.0f} s of compiling."
            )
    firsts = [point["ways"]["graph"]["first_token_s"] for point in points if p50(point, "graph")]
    if firsts:
        text.append(f"The first graphed token comes after {max(firsts):.2f} s at most.")
    return text


def _memory(points: list[dict[str, Any]]) -> list[str]:
    """Peak bytes against those of the tokens."""
    ways = (("graph", "elastikv"), ("dynamic, flash", "DynamicCache"), ("static", "StaticCache"))
    rows = []
    for point in points:
        needed = point["ways"].get("graph", {}).get("needed")
        sizes = [point["ways"].get(way, {}).get("bytes") for way, _ in ways]
        if needed and all(sizes):
            cells = [f"{size / needed:.2f} x" for size in sizes]
            rows.append(f"| {title(point)} | {needed / 2**30:.2f} GiB | " + " | ".join(cells) + " |")
    if not rows:
        return []
    head = "| peak memory, with what a step copies | tokens | " + " | ".join(name for _, name in ways) + " |"
    return ["", head, "|---|---:|" + "---:|" * len(ways), *rows]


def _forks(result: dict[str, Any]) -> list[str]:
    found = result.get("forks", [])
    if not found:
        return []
    text = ["", f"| {found[0]['forks']} forks of {found[0]['tokens']} tokens | ms each | driver calls each | bytes |"]
    text.append("|---|---:|---:|---:|")
    for forks in found:
        came = "known length" if forks["chunk"] >= forks["tokens"] else f"chunks of {forks['chunk']}"
        for name, end in (("whole", "at a page's end"), ("ragged", "within a page")):
            row = forks[name]
            ratio = row["bytes_forked"] / row["bytes"]
            text.append(f"| {came}, {end} | {row['p50_ms']:.3f} | {row['driver_calls']:.0f} | {ratio:.3f} x one |")
    return text


def markdown(result: dict[str, Any]) -> str:
    points = _ordered(result)
    sentences = _sentences(points)
    return "\n".join(
        [*_times(points), *(["", " ".join(sentences)] if sentences else []), *_memory(points), *_forks(result)]
    )
