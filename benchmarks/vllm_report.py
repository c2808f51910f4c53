"""Tables and bars of bench_vllm's results. Needs nothing but Python, and matplotlib for the picture."""

from __future__ import annotations

import statistics
from typing import Any

Bar = tuple[str, float, float, bool]
MIB = 1 << 20
# Engines that share memory: how many they are, and what a static share of it is called.
GROUPS = {"pair": ("two engines", "halves"), "trio": ("three engines", "thirds")}
WAYS = {"static": "tab:gray", "elastic": "tab:green"}
IN_TIME = 0.99  # of all requests, where a load is served within the SLO
# Of one engine: as what is found is called, as the table calls it, its unit, and its form there.
FIGURES = (
    ("tokens_per_second", "tokens a second", 1, "{:,.0f}"),
    ("growing_tokens_per_second", "while its memory grows", 1, "{:,.0f}"),
    ("filled_tokens_per_second", "once all of it is in use", 1, "{:,.0f}"),
    ("gap_p50_ms", "between tokens, p50 of the median round", 1, "{:.2f} ms"),
    ("gap_p99_ms", "between tokens, p99 of the median round", 1, "{:.2f} ms"),
    ("gap_p99_of_all_ms", "between tokens, p99 of all rounds", 1, "{:.2f} ms"),
    ("startup_s", "until it can serve, kernels compiled before", 1, "{:.1f} s"),
    ("idle_bytes", "KV memory before the first request", MIB, "{:,.0f} MiB"),
    ("after_burst_bytes", "KV memory after a burst, prefixes kept", MIB, "{:,.0f} MiB"),
)


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def _by_phase(plain: dict[str, Any], elastic: dict[str, Any]) -> dict[str, list[float]]:
    """Tokens a second of the rounds in which the elastic engine's memory grows, and of those once it is all in use."""
    found: dict[str, list[list[float]]] = {}
    before = None
    for both in zip(plain["steady"], elastic["steady"]):
        held = both[1].get("kv_bytes")
        if held is None:
            return {}
        # A new engine has less than the last one in the end.
        phase = "growing" if before is None or abs(held - before) > before / 100 else "filled"
        found.setdefault(f"{phase}_tokens_per_second", []).append([each["tokens_per_second"] for each in both])
        before = held
    return {name: [statistics.median(way) for way in zip(*rates)] for name, rates in found.items()}


def rounds(plain: dict[str, Any], elastic: dict[str, Any]) -> dict[str, Any]:
    """Of one engine and another: lists are [plain, elastic]."""
    both = (plain, elastic)
    between = [[each["gaps_ms"] for each in one["steady"]] for one in both]
    return {
        "rounds": [[each["tokens_per_second"] for each in one["steady"]] for one in both],
        "tokens_per_second": [statistics.median(each["tokens_per_second"] for each in one["steady"]) for one in both],
        **_by_phase(plain, elastic),
        # Of the median round, as throughput is: a round in which the machine was slow for a second is no engine's.
        "gap_p50_ms": [statistics.median(percentile(gaps, 0.5) for gaps in each) for each in between],
        "gap_p99_ms": [statistics.median(percentile(gaps, 0.99) for gaps in each) for each in between],
        "gap_p99_of_all_ms": [percentile([gap for gaps in each for gap in gaps], 0.99) for each in between],
    }


def single(plain: dict[str, Any], elastic: dict[str, Any]) -> dict[str, Any]:
    """As `rounds`, with what else `single` finds."""
    both = (plain, elastic)
    # Twice the same set: the second time prefixes hit, in both.
    equal = [a == b for x, y in zip(*(one["outputs"] for one in both)) for a, b in zip(x["tokens"], y["tokens"])]
    again = [a == b for a, b in zip(*(each["tokens"] for each in plain["outputs"]))]
    return {
        "requests": len(equal),
        "equal": sum(equal),
        "plain_equal_to_itself": sum(again),
        **rounds(plain, elastic),
        "longest_steps": [one["look"][0] for one in both],
        "startup_s": [one["startup"] for one in both],
        "idle_bytes": [one["idle_at_start"] for one in both],
        "after_burst_bytes": [one["idle"][0]["after_burst"] for one in both],
        "returned_bytes": elastic["idle"][0]["without_prefixes"],
        "return_s": elastic["idle"][0]["seconds"],
    }


def sharing(static: dict[str, Any], elastic: dict[str, Any], loads: list[float], until: float, slo: float) -> Any:
    """A point a load: all engines' requests together. Who has no first token at the end has waited until then."""
    points = []
    for i, load in enumerate(loads):
        point: dict[str, Any] = {"load": load}
        for name, found in (("static", static), ("elastic", elastic)):
            traces = [one["trace"][i] for one in found.values()]
            waits = [
                until - came if first is None else first
                for trace in traces
                for came, first in zip(trace["arrived"], trace["first"])
            ]
            point[name] = {
                "requests": len(waits),
                "p50": percentile(waits, 0.5),
                "p99": percentile(waits, 0.99),
                "within_slo": sum(wait <= slo for wait in waits) / len(waits),
            }
            if name == "elastic":
                point["elastic_driver_calls"] = [trace.get("driver_calls", {}) for trace in traces]
        points.append(point)
    return points


def load_in_time(points: list[dict[str, Any]], way: str) -> float:
    """The highest load that is served within the SLO, as all lower ones are; 0 where none is."""
    best = 0.0
    for point in points:
        if point[way]["within_slo"] < IN_TIME:
            break
        best = point["load"]
    return best


def groups(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {group: result[group] for group in GROUPS if result.get(group)}


def _sooner(point: dict[str, Any]) -> str:
    """How many times sooner the ledger's p99 is."""
    ratio = point["static"]["p99"] / point["elastic"]["p99"]
    return f"{ratio:.1f} x" if ratio < 10 else f"{ratio:.0f} x"


def _ratio(both: list[float]) -> float:
    return both[1] / both[0]


def _print_figures(one: dict[str, Any]) -> None:
    for name, _, unit, _ in FIGURES:
        if name not in one:
            continue
        plain, elastic = one[name]
        label = name.replace("bytes", "MiB")
        print(f"  {label:18} plain {plain / unit:10.2f}  elastic {elastic / unit:10.2f}  {elastic / plain:6.3f} x")
    for name, rates in zip(("plain", "elastic"), one.get("rounds", ())):
        print(f"  rounds of {name}, tokens a second: " + ", ".join(f"{rate:,.0f}" for rate in rates))


def print_tables(result: dict[str, Any]) -> None:
    one = result.get("single")
    if one:
        print(f"one engine: {one['equal']} of {one['requests']} requests have plain vLLM's tokens", end=" ")
        print(f"(plain's second run of them: {one['plain_equal_to_itself']} of {one['requests'] // 2})")
        _print_figures(one)
        for name, looks in zip(("plain", "elastic"), one.get("longest_steps", ())):
            for number, found in enumerate(looks):
                for when, steps in found.items():
                    print(f"  longest steps of {name}, look {number + 1}, {when}:")
                    for step in steps:
                        print("    " + ", ".join(f"{key} {value:g}" for key, value in step.items()))
        print(f"  a burst's memory is back to {one['returned_bytes'] / MIB:.0f} MiB after {one['return_s']:.3f} s")
    if large := result.get("large"):
        print("one engine, eight billion weights:")
        _print_figures(large)
    for group, points in groups(result).items():
        many, shares = GROUPS[group]
        for point in points:
            static, elastic = point["static"], point["elastic"]
            print(
                f"{many}, {point['load']:g} requests/s at peak: first token p99 {static['p99']:.2f} s with {shares}, "
                f"{elastic['p99']:.2f} s with one ledger, {_sooner(point)}; of {elastic['requests']} within "
                f"{result['slo']:g} s {static['within_slo']:.1%} and {elastic['within_slo']:.1%}"
            )
            for number, calls in enumerate(point.get("elastic_driver_calls", ())):
                made = ", ".join(f"{call} {each} ({us:.1f} us)" for call, (each, us) in calls.items() if each)
                print(f"  driver calls of engine {number + 1}: {made}")
        best = [load_in_time(points, way) for way in WAYS]
        print(
            f"{many}: {IN_TIME:.0%} within {result['slo']:g} s up to {best[0]:g} requests/s with {shares}, {best[1]:g}"
        )
    killed = result.get("kill")
    if killed:
        print(
            f"killed: {killed['victim_held'] / MIB:.0f} MiB free after {killed['seconds']:.3f} s; the other served "
            f"{killed['other_served']} of {killed['other_asked']}, {killed['other_peak'] / MIB:.0f} MiB at most"
        )

    if slept := result.get("sleep"):
        held, left = (slept[name] / MIB for name in ("held", "left"))
        print(
            f"sleep amid {slept['requests']} requests: {held:.0f} MiB -> {left:.0f} MiB in {slept['sleep_s']:.2f} s, "
            f"awake in {slept['wake_s']:.2f} s; {slept['equal']} have the tokens that they have without"
        )
    if result.get("steps"):
        _print_steps(result["steps"])


def _print_steps(steps: dict[str, Any]) -> None:
    for name, found in steps.items():
        p10, p50, p90, p99 = found["step_ms"]
        print(f"a decode step, {name}: p10 {p10:.3f} ms, p50 {p50:.3f}, p90 {p90:.3f}, p99 {p99:.3f}")
        made = found["driver_calls"].items()
        calls = ", ".join(f"{call} {each:.2f} ({us:.1f} us)" for call, (each, us) in made if each)
        if calls:
            print(f"  driver calls a step: {calls}")
    methods = sorted({method for found in steps.values() for method in found["methods"]})
    print(f"  {'calls and us a step':44}" + "".join(f"{name:>22}" for name in steps))
    for method in methods:
        cells = [found["methods"].get(method) for found in steps.values()]
        text = "".join(f"{cell[0]:11.2f}{cell[1]:8.1f} us" if cell else f"{'':22}" for cell in cells)
        print(f"  {method:44}{text}")
    kernels = {name: found["kernels"] for name, found in steps.items()}
    for name, why in kernels.items():
        if isinstance(why, str):
            print(f"  the GPU could not be profiled ({name}): {why}")
            return
    print(f"  {'kernels a step, in all':62}", end="")
    print("".join(f"{sum(each[1] for each in found.values()):16.1f} us" for found in kernels.values()))
    longest = list(next(iter(kernels.values())))[:12]
    for kernel in longest:
        cells = [found.get(kernel, [0.0, 0.0]) for found in kernels.values()]
        print(f"    {kernel[:60]:60}" + "".join(f"{cell[0]:8.1f}{cell[1]:8.1f} us" for cell in cells))


def _rows(one: dict[str, Any]) -> list[str]:
    found = []
    for name, title, unit, form in FIGURES:
        if name in one:
            plain, elastic = one[name]
            cells = f"{form.format(plain / unit)} | {form.format(elastic / unit)} | {elastic / plain:.3g} x"
            found.append(f"| {title} | {cells} |")
    return found


def markdown(result: dict[str, Any]) -> str:
    one = result["single"]
    text = ["| one engine, a billion weights | plain vLLM | on elastikv | |", "|---|---:|---:|---:|", *_rows(one)]
    if large := result.get("large"):
        text += ["| **eight billion weights** | | | |", *_rows(large)]
    text += ["", f"{one['equal']} of {one['requests']} requests have plain vLLM's tokens."]
    text.append(
        f"Without the kept prefixes the burst's memory is back to {one['returned_bytes'] / MIB:.0f} MiB after "
        f"{one['return_s']:.2f} s."
    )
    for group, points in groups(result).items():
        text += ["", *_table_of(group, points, result["slo"])]
    killed = result.get("kill")
    if killed:
        text += [""] * bool(groups(result))
        text.append(
            f"After kill -9 of one of two engines its {killed['victim_held'] / MIB:,.0f} MiB are free within "
            f"{killed['seconds'] * 1e3:.0f} ms; the other served {killed['other_served']} of {killed['other_asked']}."
        )
    if "note" in result:
        text += ["", f"Measured so: {result['note']}."]
    return "\n".join(text)


def _table_of(group: str, points: list[dict[str, Any]], slo: float) -> list[str]:
    many, shares = GROUPS[group]
    text = [
        f"| {many}, requests/s at the peak | first token p99, static {shares} | one ledger | | within {slo:g} s, "
        f"static {shares} | one ledger |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for point in points:
        static, elastic = point["static"], point["elastic"]
        text.append(
            f"| {point['load']:g} | {static['p99'] * 1e3:,.0f} ms | {elastic['p99'] * 1e3:,.0f} ms | "
            f"{_sooner(point)} sooner | {static['within_slo']:.1%} | {elastic['within_slo']:.1%} |"
        )
    return text


def bars(result: dict[str, Any]) -> list[Bar]:
    found: list[Bar] = []

    def over(what: str, value: float, bar: float) -> None:
        found.append((f"{what}, at least", value, bar, value >= bar))

    def under(what: str, value: float, bar: float) -> None:
        found.append((f"{what}, at most", value, bar, value <= bar))

    if large := result.get("large"):
        over("throughput against plain, eight billion weights", _ratio(large["tokens_per_second"]), 0.99)
        under("p99 between tokens against plain, eight billion weights", _ratio(large["gap_p99_ms"]), 1 / 0.99)
    one = result.get("single")
    if one:
        over("requests with plain vLLM's tokens", one["equal"], one["requests"])
        over("throughput against plain", _ratio(one["tokens_per_second"]), 0.99)
        under("p99 between tokens against plain", _ratio(one["gap_p99_ms"]), 1 / 0.99)
        if "startup_s" in one:  # not of runs whose first engine had kernels to compile
            under("startup against plain", _ratio(one["startup_s"]), 1.05)
        under("idle KV memory, MiB", max(one["idle_bytes"][1], one["returned_bytes"]) / MIB, 64)
        under("seconds until a burst's memory is back", one["return_s"], 1)
    for group, points in groups(result).items():
        many, shares = GROUPS[group]
        best = max(point["static"]["p99"] / point["elastic"]["p99"] for point in points)
        over(f"{many}: p99 to the first token, times better than {shares} at best", best, 1.2)
        static, elastic = (points[-1][way]["within_slo"] for way in WAYS)
        over(f"{many}: requests in time at the highest load, against {shares}", elastic / max(static, 1e-9), 1.0)
    if slept := result.get("sleep"):
        over("requests with the same tokens after a sleep", slept["equal"], slept["requests"])
        under("KV memory asleep, MiB", slept["left"] / MIB, 0)
    killed = result.get("kill")
    if killed:
        under("seconds until a killed engine's memory is free", killed["seconds"], 1)
        over("requests that the other served", killed["other_served"], killed["other_asked"])
    return found


def picture(result: dict[str, Any], path: str) -> None:
    """A row for two engines and one for three: p99 to the first token, and requests within the SLO, over load. Numbers
    are how many times later the static share's p99 is."""
    from matplotlib.figure import Figure

    found = groups(result)
    figure = Figure(figsize=(9, 3.4 * len(found)), dpi=120, layout="constrained")
    for (left, right), (group, points) in zip(figure.subplots(len(found), 2, squeeze=False), found.items()):
        many, shares = GROUPS[group]
        loads = [point["load"] for point in points]
        for way, color in WAYS.items():
            label = f"static {shares}" if way == "static" else "one ledger"
            left.plot(loads, [point[way]["p99"] for point in points], "o-", label=label, color=color)
            right.plot(loads, [100 * point[way]["within_slo"] for point in points], "o-", color=color)
        for point in points:
            late = max(point[way]["p99"] for way in WAYS)
            left.annotate(_sooner(point), (point["load"], late), (0, 5), textcoords="offset points", ha="center",
                          fontsize=8)  # fmt: skip
        left.axhline(result["slo"], color="tab:red", linewidth=0.8, linestyle=":", label=f"SLO, {result['slo']:g} s")
        left.set(yscale="log", xlabel="requests/s at the peak", ylabel="seconds")
        left.set_title(f"{many.capitalize()}: p99 time to the first token", loc="left", fontsize=10)
        left.margins(y=0.12)
        right.axhline(100 * IN_TIME, color="tab:red", linewidth=0.8, linestyle=":")
        right.set(xlabel="requests/s at the peak", ylabel="% of requests", ylim=(0, 104))
        right.set_title(f"First token within {result['slo']:g} s", loc="left", fontsize=10)
        left.legend(frameon=False, fontsize=8)
    figure.savefig(path)
