"""Tables and bars of bench_decode's results. Needs nothing but Python."""

from __future__ import annotations

from typing import Any

BASELINES = ("dynamic", "dynamic, flash", "static", "static, compiled")
Bar = tuple[str, float, float, bool]


def p50(point: dict[str, Any], way: str) -> float | None:
    """Milliseconds a token; None where the way was not run, or did not fit."""
    found: float | None = point["ways"].get(way, {}).get("p50")
    return found


def fastest_baseline(point: dict[str, Any]) -> float:
    return min(time for way in BASELINES if (time := p50(point, way)) is not None)


def title(point: dict[str, Any]) -> str:
    return f"{point['model']} {point['context']} x {point['batch']}"


def print_point(point: dict[str, Any]) -> None:
    graph = p50(point, "graph")
    print(f"{title(point)}: the limit is {point['limit']:.2f} ms")
    for way, row in point["ways"].items():
        if "error" in row:
            print(f"  {way:18} {row['error']}")
            continue
        more = [f"first token {row['first_token_s']:.2f} s"] if "first_token_s" in row else []
        if "needed" in row:
            more.append(f"{row['bytes'] / 2**20:.0f} MiB for {row['needed'] / 2**20:.0f}")
        ratio = f"{row['p50'] / graph:6.2f} x" if graph else ""
        print(f"  {way:18} {row['p50']:9.3f} ms  p99 {row['p99']:9.3f} {ratio}  {', '.join(more)}")


def print_tables(result: dict[str, Any]) -> None:
    for point in result["points"]:
        print_point(point)


def _over(what: str, value: float | None, bar: float, found: list[Bar]) -> None:
    if value is not None:
        found.append((f"{what}, at least", value, bar, value >= bar))


def _under(what: str, value: float | None, bar: float, found: list[Bar]) -> None:
    if value is not None:
        found.append((f"{what}, at most", value, bar, value <= bar))


def bars(result: dict[str, Any]) -> list[Bar]:
    """What must hold of one run on a GPU: what, value, bar, whether it does."""
    found: list[Bar] = []
    for point in result["points"]:
        name, graph, dynamic = title(point), p50(point, "graph"), p50(point, "dynamic")
        if graph is None:
            continue
        if point["model"] == "gqa":
            _over(f"{name}: faster than DynamicCache", dynamic and dynamic / graph, 8, found)
            _over(f"{name}: faster than the fastest baseline", fastest_baseline(point) / graph, 1.7, found)
            _under(f"{name}: against the limit", graph / point["limit"], 1.8, found)
            if (point["context"], point["batch"]) == (8192, 4):
                compiled = p50(point, "static, compiled")
                _over(f"{name}: faster than StaticCache compiled", compiled and compiled / graph, 3, found)
            rest = p50(point, "graph, compiled")
            _under(f"{name}: the rest compiled, against the limit", rest and rest / point["limit"], 1.4, found)
        else:
            _over(f"{name}: faster than the fastest baseline", fastest_baseline(point) / graph, 1, found)
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


def markdown(result: dict[str, Any]) -> str:
    """Milliseconds a token by point and way."""
    ways = list(dict.fromkeys(way for point in result["points"] for way in point["ways"]))
    text = ["| model, context x batch | limit | " + " | ".join(ways) + " |", "|---|" + "---:|" * (len(ways) + 1)]
    for point in result["points"]:
        times = [p50(point, way) for way in ways]
        cells = ["" if time is None else f"{time:.2f}" for time in times]
        text.append(f"| {title(point)} | {point['limit']:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(text)
