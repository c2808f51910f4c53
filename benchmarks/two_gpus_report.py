"""Tables and bars of bench_two_gpus' results. Needs nothing but Python."""

from __future__ import annotations

from typing import Any

Bar = tuple[str, float, float, bool]


def copies(row: dict[str, float]) -> float:
    """The slowest of our copies against torch's own."""
    ours = [value for way, value in row.items() if way.startswith("elastikv: copy")]
    return min(ours) / row["torch: copy"]


def bars(result: dict[str, Any]) -> list[Bar]:
    """What must hold of one run on two GPUs: what, value, bar, whether it does."""
    found: list[Bar] = []
    if "decode" in result:
        ratio = result["decode"]["ratio"]
        found.append(("decoding with agreement against without, at most", ratio, 1.01, ratio <= 1.01))
    for direction, row in result.get("peers", {}).items():
        copied, read = copies(row), row["elastikv: read by a kernel"] / row["torch: read by a kernel"]
        found.append((f"{direction}: copies against torch's, at least", copied, 0.95, copied >= 0.95))
        found.append((f"{direction}: a kernel's reads against torch's memory, at least", read, 0.95, read >= 0.95))
    return found


def print_decode(decode: dict[str, Any]) -> None:
    print(f"decoding, batch {decode['batch']}, from {decode['context']} tokens, {decode['steps']} steps:")
    print(f"  one GPU             {decode['one_gpu_ms']:8.3f} ms a token")
    for way, time in decode["ms"].items():
        print(f"  two GPUs, {way:9} {time:8.3f} ms a token")
    print(
        f"  ratio {decode['ratio']:.4f}; the host agrees for {decode['host_share'] * 100:.2f} % of the time, "
        f"once in {decode['tokens_per_decision']:.0f} tokens"
    )


def print_tables(result: dict[str, Any]) -> None:
    if "decode" in result:
        print_decode(result["decode"])
    for direction, row in result.get("peers", {}).items():
        print(f"{direction}:")
        for way, value in row.items():
            print(f"  {way:30} {value:8.1f} GB/s")


def markdown(result: dict[str, Any]) -> str:
    text: list[str] = []
    if "decode" in result:
        decode = result["decode"]
        cost, often = f"{(decode['ratio'] - 1) * 100:+.2f} %", f"{decode['tokens_per_decision']:.0f} tokens"
        text += ["| decoding | ms a token |", "|---|---:|", f"| one GPU | {decode['one_gpu_ms']:.3f} |"]
        text += [f"| two ranks, growing {way} | {time:.3f} |" for way, time in decode["ms"].items()]
        text += ["", f"Agreement: {cost}, once in {often}.", ""]
    directions = result.get("peers", {})
    if directions:
        text += ["| 1 GiB, GB/s | " + " | ".join(directions) + " |", "|---|" + "---:|" * len(directions)]
        for way in next(iter(directions.values())):
            cells = [f"{row[way]:.0f}" for row in directions.values()]
            text.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(text).strip()
