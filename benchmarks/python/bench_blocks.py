#!/usr/bin/env python3
"""Blocks a second from Python, allocated and freed in batches: BlockPool beside a list of free ids kept in Python.

    benchmarks/python/bench_blocks.py [--device cuda:0] [--batch 64] [--json FILE]

All extents stay mapped, so no driver call is in it. The list in Python keeps reference counts, too, as engines do; it
has no memory to map or give back. Of each way the median of a few rounds counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import deque
from collections.abc import Callable

import torch

import elastikv

BLOCKS, SHAPE, LAYERS = 4096, (2, 16, 8, 128), 16  # 1 MiB a block in bfloat16


def block_pool(device: str, batch: int, batches: int) -> float:
    with elastikv.SharedMemoryPool(8 << 30, device, page_size=2 << 20) as shared:
        model = shared.register_model("bench", 1 << 40)
        with elastikv.BlockPool(model, BLOCKS, SHAPE, LAYERS, torch.bfloat16) as pool:
            ids = pool.allocate(BLOCKS // 2)
            pool.free(ids[::2].contiguous())  # no extent empties
            start = time.perf_counter()
            for _ in range(batches):
                pool.free(pool.allocate(batch))
            return time.perf_counter() - start


def python_list(device: str, batch: int, batches: int) -> float:
    free = deque(range(BLOCKS))
    references = [0] * BLOCKS
    start = time.perf_counter()
    for _ in range(batches):
        ids = [free.popleft() for _ in range(batch)]
        for each in ids:
            references[each] += 1
        for each in ids:
            references[each] -= 1
            if references[each] == 0:
                free.append(each)
    return time.perf_counter() - start


def measure(run: Callable[[str, int, int], float], device: str, batch: int, rounds: int) -> float:
    """Median blocks a second."""
    batches = max(1, 200_000 // batch)
    return batches * batch / statistics.median([run(device, batch, batches) for _ in range(rounds + 1)][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the rows here, too")
    asked = parser.parse_args()
    rows = {
        "list in Python": measure(python_list, asked.device, asked.batch, asked.rounds),
        "BlockPool": measure(block_pool, asked.device, asked.batch, asked.rounds),
    }
    print(f"batches of {asked.batch} blocks on {asked.device}")
    for name, rate in rows.items():
        print(f"  {name:15} {rate / 1e6:8.2f} M blocks/s {rate / rows['list in Python']:7.2f} x")
    if asked.json:
        with open(asked.json, "w") as file:
            json.dump({"device": asked.device, "batch": asked.batch, "blocks_per_second": rows}, file, indent=2)


if __name__ == "__main__":
    main()
