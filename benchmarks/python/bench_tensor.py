#!/usr/bin/env python3
"""A cache that grows token by token: in place (grow_), by torch.cat as DynamicCache does, or held whole from the start.

    benchmarks/python/bench_tensor.py [--device cuda:0] [--tokens 4096] [--json FILE]

One row a way: microseconds a token with the write of that token included, its ratio to the tensor that is held whole,
and the most physical bytes it took. All ways write the same tokens in the same run; of each, the median of a few rounds
counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

import elastikv

TOKEN = (16, 2, 8, 128)  # layers, K/V, heads, dim: 64 KiB in bfloat16


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def whole(device: str, tokens: int, token: torch.Tensor) -> int:
    cache = torch.zeros((tokens, *TOKEN), dtype=token.dtype, device=device)
    for length in range(tokens):
        cache[length].copy_(token)
    return cache.nbytes


def copied(device: str, tokens: int, token: torch.Tensor) -> int:
    cache = torch.empty((0, *TOKEN), dtype=token.dtype, device=device)
    for _ in range(tokens):
        cache = torch.cat([cache, token[None]])
    return 2 * cache.nbytes  # the old and the new one, while the last token is appended


def elastic(device: str, tokens: int, token: torch.Tensor) -> int:
    with elastikv.SharedMemoryPool(4 * tokens * token.nbytes, device) as shared:
        model = shared.register_model("bench", 4 * tokens * token.nbytes)
        cache = elastikv.empty((0, *TOKEN), (tokens, *TOKEN), token.dtype, model, scrub=False)
        for length in range(tokens):
            elastikv.grow_(cache, length + 1)
            cache[length].copy_(token)
        synchronize(device)
        return model.stats().peak_physical


def measure(run: Callable[[str, int, torch.Tensor], int], device: str, tokens: int, rounds: int) -> tuple[float, int]:
    """Median microseconds a token, and bytes."""
    token = torch.randn(TOKEN, device=device).to(torch.bfloat16)
    times, held = [], 0
    for _ in range(rounds + 1):
        synchronize(device)
        start = time.perf_counter()
        held = run(device, tokens, token)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / tokens * 1e6, held  # the first round warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the rows here, too")
    asked = parser.parse_args()
    rows = {}
    for name, run in (("held whole", whole), ("torch.cat", copied), ("grow_", elastic)):
        microseconds, held = measure(run, asked.device, asked.tokens, asked.rounds)
        rows[name] = {"microseconds": microseconds, "bytes": held}
    base = rows["held whole"]["microseconds"]
    print(f"{asked.tokens} tokens of 64 KiB on {asked.device}")
    for name, row in rows.items():
        time_, ratio, mib = row["microseconds"], row["microseconds"] / base, row["bytes"] / 2**20
        print(f"  {name:12} {time_:9.1f} us/token {ratio:7.2f} x {mib:9.1f} MiB")
    if asked.json:
        with open(asked.json, "w") as file:
            result = {"device": asked.device, "tokens": asked.tokens, "torch": torch.__version__, "rows": rows}
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
