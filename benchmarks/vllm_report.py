"""Tables and bars of bench_vllm's results. Needs nothing but Python, and matplotlib for the picture."""

from __future__ import annotations

import statistics
from typing import Any

Bar = tuple[str, float, float, bool]
MIB = 1 << 20


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def single(plain: dict[str, Any], elastic: dict[str, Any]) -> dict[str, Any]:
    """One engine beside another: lists are [plain, elastic]."""
    both = (plain, elastic)
    # Twice the same set: the second time prefixes hit, in both.
    equal = [a == b for x, y in zip(*(one["outputs"] for one in both)) for a, b in zip(x["tokens"], y["tokens"])]
    again = [a == b for a, b in zip(*(each["tokens"] for each in plain["outputs"]))]
    return {
        "requests": len(equal),
        "equal": sum(equal),
        "plain_equal_to_itself": sum(again),
        "tokens_per_second": [statistics.median(one["steady"][0]["tokens_per_second"]) for one in both],
        "gap_p50_ms": [one["steady"][0]["gap_p50_ms"] for one in both],
        "gap_p99_ms": [one["steady"][0]["gap_p99_ms"] for one in both],
        "startup_s": [one["startup"] for one in both],
        "idle_bytes": [one["idle_at_start"] for one in both],
        "after_burst_bytes": [one["idle"][0]["after_burst"] for one in both],
        "returned_bytes": elastic["idle"][0]["without_prefixes"],
        "return_s": elastic["idle"][0]["seconds"],
    }


def pair(static: dict[str, Any], elastic: dict[str, Any], loads: list[float], until: float, slo: float) -> Any:
    """A point a load: both engines' requests together; one without a first token counts as if it came at the end."""
    points = []
    for i, load in enumerate(loads):
        point: dict[str, Any] = {"load": load}
        for name, found in (("static", static), ("elastic", elastic)):
            waits = [until if w is None else w for one in found.values() for w in one["trace"][i]["first"]]
            point[name] = {
                "requests": len(waits),
                "p50": percentile(waits, 0.5),
                "p99": percentile(waits, 0.99),
                "within_slo": sum(wait <= slo for wait in waits) / len(waits),
            }
        points.append(point)
    return points


def _ratio(both: list[float]) -> float:
    return both[1] / both[0]


def print_tables(result: dict[str, Any]) -> None:
    one = result.get("single")
    if one:
        print(f"one engine: {one['equal']} of {one['requests']} requests have plain vLLM's tokens", end=" ")
        print(f"(plain's second run of them: {one['plain_equal_to_itself']} of {one['requests'] // 2})")
        for name, unit in (("tokens_per_second", 1), ("gap_p50_ms", 1), ("gap_p99_ms", 1), ("startup_s", 1),
                           ("idle_bytes", MIB), ("after_burst_bytes", MIB)):  # fmt: skip
            if name not in one:
                continue
            plain, elastic = one[name]
            label = name.replace("bytes", "MiB")
            print(f"  {label:18} plain {plain / unit:10.2f}  elastic {elastic / unit:10.2f}  {elastic / plain:6.3f} x")
        print(f"  a burst's memory is back to {one['returned_bytes'] / MIB:.0f} MiB after {one['return_s']:.3f} s")
    for point in result.get("pair", ()):
        static, elastic = point["static"], point["elastic"]
        print(
            f"two engines, {point['load']:g} requests/s at peak: first token p99 {static['p99']:.2f} s with halves, "
            f"{elastic['p99']:.2f} s with one ledger, {static['p99'] / elastic['p99']:.1f} x; "
            f"in time {static['within_slo']:.0%} and {elastic['within_slo']:.0%} of {elastic['requests']}"
        )
    killed = result.get("kill")
    if killed:
        print(
            f"killed: {killed['victim_held'] / MIB:.0f} MiB free after {killed['seconds']:.3f} s; the other served "
            f"{killed['other_served']} of {killed['other_asked']}, {killed['other_peak'] / MIB:.0f} MiB at most"
        )

    if result.get("steps"):
        _print_steps(result["steps"])


def _print_steps(steps: dict[str, Any]) -> None:
    for name, found in steps.items():
        p50, p90, p99 = found["step_ms"]
        print(f"a decode step, {name}: p50 {p50:.3f} ms, p90 {p90:.3f}, p99 {p99:.3f}")
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


def markdown(result: dict[str, Any]) -> str:
    one = result["single"]
    text = ["| one engine | plain vLLM | on elastikv | |", "|---|---:|---:|---:|"]
    for name, title, unit, form in (
        ("tokens_per_second", "tokens a second", 1, "{:,.0f}"),
        ("gap_p50_ms", "between tokens, p50", 1, "{:.2f} ms"),
        ("gap_p99_ms", "between tokens, p99", 1, "{:.2f} ms"),
        ("idle_bytes", "KV memory before the first request", MIB, "{:,.0f} MiB"),
        ("after_burst_bytes", "KV memory after a burst, prefixes kept", MIB, "{:,.0f} MiB"),
    ):
        plain, elastic = one[name]
        text.append(
            f"| {title} | {form.format(plain / unit)} | {form.format(elastic / unit)} | {elastic / plain:.3g} x |"
        )
    text += ["", f"{one['equal']} of {one['requests']} requests have plain vLLM's tokens."]
    text.append(
        f"Without the kept prefixes the burst's memory is back to {one['returned_bytes'] / MIB:.0f} MiB after "
        f"{one['return_s']:.2f} s."
    )
    killed = result.get("kill")
    if killed:
        text.append(
            f"After kill -9 of one of two engines its {killed['victim_held'] / MIB:,.0f} MiB are free within "
            f"{killed['seconds'] * 1e3:.0f} ms; the other served {killed['other_served']} of {killed['other_asked']}."
        )
    return "\n".join(text)


def bars(result: dict[str, Any]) -> list[Bar]:
    found: list[Bar] = []

    def over(what: str, value: float, bar: float) -> None:
        found.append((f"{what}, at least", value, bar, value >= bar))

    def under(what: str, value: float, bar: float) -> None:
        found.append((f"{what}, at most", value, bar, value <= bar))

    one = result.get("single")
    if one:
        over("requests with plain vLLM's tokens", one["equal"], one["requests"])
        over("throughput against plain", _ratio(one["tokens_per_second"]), 0.99)
        under("p99 between tokens against plain", _ratio(one["gap_p99_ms"]), 1 / 0.99)
        if "startup_s" in one:  # not of runs whose first engine had kernels to compile
            under("startup against plain", _ratio(one["startup_s"]), 1.05)
        under("idle KV memory, MiB", max(one["idle_bytes"][1], one["returned_bytes"]) / MIB, 64)
        under("seconds until a burst's memory is back", one["return_s"], 1)
    if result.get("pair"):
        best = max(point["static"]["p99"] / point["elastic"]["p99"] for point in result["pair"])
        over("p99 to the first token: times better than halves", best, 1.2)
    killed = result.get("kill")
    if killed:
        under("seconds until a killed engine's memory is free", killed["seconds"], 1)
        over("requests that the other served", killed["other_served"], killed["other_asked"])
    return found


def picture(result: dict[str, Any], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    loads = [point["load"] for point in result["pair"]]
    for name, label, color in (("static", "static halves", "tab:gray"), ("elastic", "one ledger", "tab:green")):
        left.plot(loads, [point[name]["p99"] for point in result["pair"]], "o-", label=label, color=color)
        right.plot(loads, [100 * point[name]["within_slo"] for point in result["pair"]], "o-", color=color)
    left.set(yscale="log", xlabel="requests/s at the peak", ylabel="seconds", title="p99 time to the first token")
    right.set(xlabel="requests/s at the peak", ylabel="%", ylim=(0, 102))
    right.set_title(f"first token within {result['slo']:g} s")
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
