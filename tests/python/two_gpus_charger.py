"""A process of test_two_gpus.py that takes and gives back memory of one device at random, as much as it can get.

Run as `two_gpus_charger.py DEVICE LEDGER LIMIT PAGE STEPS SEED`; says "ready", and begins when told."""

from __future__ import annotations

import random
import sys

import torch

import elastikv


def main() -> None:
    device, ledger, limit, page, steps, seed = sys.argv[1], sys.argv[2], *(int(word) for word in sys.argv[3:])
    dice = random.Random(seed)
    with elastikv.SharedMemoryPool(limit, device, park_limit=0, name=ledger) as pool:
        model = pool.register_model(f"model-{seed}", 1 << 40)
        tensors = [elastikv.empty((0, page), (limit // page, page), torch.uint8, model) for _ in range(3)]
        print("ready", flush=True)
        sys.stdin.readline()
        grown = short = 0
        for step in range(steps):
            tensor = dice.choice(tensors)
            try:
                length = dice.randint(0, len(tensor) + limit // page // 4)
                if length <= len(tensor):
                    elastikv.shrink_(tensor, length)
                    continue
                before = len(tensor)
                elastikv.grow_(tensor, min(length, limit // page), exact=dice.random() < 0.5)
                grown += 1
                assert not tensor[before:].any()  # nobody else's bytes
                tensor[before:].fill_(seed)
            except elastikv.OutOfPhysicalMemory:
                short += 1
                if short % 2:
                    elastikv.shrink_(tensor, 0)
            assert all(not len(each) or int(each[-1, -1]) == seed for each in tensors), step
            assert pool.global_stats().physical_usage <= limit
        tensors.clear()
        del tensor
        if device != "cpu":
            torch.cuda.synchronize(device)
        model.drain()
        pool.trim()
        assert model.quota().charged == 0, model.quota()
        print(f"done {grown} {short}", flush=True)
        sys.stdin.readline()


main()
