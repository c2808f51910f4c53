"""Pools and engines for tests of serving, and what transformers answers."""

from __future__ import annotations

import gc
import random

import torch

import elastikv
from conftest import settled_usage
from elastikv.serving import Engine

PAGES = 1024


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_pool(device: str, page_size: int, pages: int = PAGES):
    return elastikv.SharedMemoryPool(physical_limit=pages * page_size, device=device, park_limit=0)


def make_engine(pool, network, name: str = "model", **options):
    options = {"max_batch": 4, "max_tokens": 160, "chunk": 16, "shortest_prefix": 4, **options}
    options.setdefault("clock", Clock())
    return Engine(network, pool.register_model(name, virtual_capacity=1 << 40), **options)


def prompt(seed: int, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, 128) for _ in range(length)]


def expected(network, tokens: list[int], new: int, stop=(), penalty: float = 1.0) -> list[int]:
    """transformers' own answer, greedy. Its stop tokens are part of it, as ours are."""
    inputs = torch.tensor([tokens], device=network.device)
    options = {"eos_token_id": list(stop) or None, "pad_token_id": 0, "do_sample": False, "max_new_tokens": new}
    return network.generate(inputs, attention_mask=torch.ones_like(inputs), **options)[0, len(tokens) :].tolist()


def same(ours: list[int], theirs: list[int], device: str) -> bool:
    """Equal; in float16 two ways of adding up may part somewhere."""
    if device == "cpu":
        return ours == theirs
    return len(ours) == len(theirs) or ours[:3] == theirs[:3]


def closed(pool, *engines) -> None:
    """Everything goes back."""
    handles = [engine.handle for engine in engines]
    for engine in engines:
        engine.close()
    gc.collect()
    assert settled_usage(pool, *handles) == 0
