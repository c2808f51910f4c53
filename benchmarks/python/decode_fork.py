"""What bench_decode finds out about forks: rows that begin with the tokens of another, and share its memory."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import LlamaConfig

import elastikv
from elastikv.hf import Slots
from elastikv.hf.geometry import kv_geometry

FORKS = 8


def forks_of(config: LlamaConfig, device: str, tokens: int, chunk: int) -> dict[str, Any]:
    """Forks a row of `tokens` tokens, which came in chunks of so many, eight times. Milliseconds a fork.

    Two prefixes, each of nearly all of the row: one that ends where memory does, and one that ends within a page, whose
    rest is copied. Then all forks grow by a token, which is what sequences with a prompt in common do next.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    geometry = kv_geometry(config)
    limit = 4 * tokens * geometry.token_bytes(dtype) + (1 << 30)
    synchronize = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    found: dict[str, Any] = {"tokens": tokens, "chunk": chunk, "forks": FORKS}
    with elastikv.SharedMemoryPool(limit, device, page_size=4096 if device == "cpu" else None) as pool:
        handle = pool.register_model("forks", virtual_capacity=1 << 44)
        for name, length in (("whole", tokens), ("ragged", tokens - 5)):
            slots = Slots(geometry, model=handle, rows=FORKS + 2, max_tokens=tokens + chunk, dtype=dtype)
            for held in range(0, tokens, chunk):
                slots.claim(0, min(held + chunk, tokens))
            slots.set_lengths([0], [tokens])
            assert slots.tensor is not None
            slots.fork(FORKS + 1, 0, length)  # not timed
            slots.crop([FORKS + 1], [0])
            synchronize()
            before, alone = handle.stats(), handle.stats().physical_usage
            times = []
            for row in range(1, FORKS + 1):
                begin = time.perf_counter()
                slots.fork(row, 0, length)
                times.append((time.perf_counter() - begin) * 1e3)
                synchronize()
            calls = (handle.stats().total_driver_calls - before.total_driver_calls) / FORKS
            slots.reserve(range(1, FORKS + 1), [1] * FORKS)
            synchronize()
            found[name] = {
                "p50_ms": statistics.median(times),
                "worst_ms": max(times),
                "driver_calls": calls,
                "extents": before.extents,
                "bytes": alone,
                "bytes_forked": handle.stats().physical_usage,
            }
            slots.drop()
            del slots
            handle.trim()
    return found
