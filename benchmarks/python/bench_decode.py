#!/usr/bin/env python3
"""Decoding with ElasticCache against transformers' caches: milliseconds a token, in one run, as ratios.

    benchmarks/python/bench_decode.py [--quick] [--json FILE]          # on a GPU
    benchmarks/python/bench_decode.py --device cpu --tiny              # the same code with toy models, to see it run

Models have random weights, and caches are filled with random keys and values: what a step costs does not depend on
them. Each step is timed by itself, with the device waited for: p50 and p99 of them count. Ways:

    graph            elastikv's decoder: one CUDA graph for every length, memory mapped as it grows
    graph, resident  the same over rows that are wholly mapped from the start
    graph, compiled  the same with the rest of the model compiled (full run, one point)
    eager            the model with an ElasticCache and attention 'elastikv', as generate() calls it
    dynamic          DynamicCache, as it comes
    dynamic, flash   DynamicCache with SDPA's flash back end forced, its best
    static           StaticCache
    static, compiled StaticCache with the forward compiled, as transformers compiles it (full run, two points)
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

import elastikv
from elastikv.hf import Decoder, ElasticCache
from elastikv.hf.forward import cache_argument

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import decode_report

LAYERS = 16
QUICK = [("gqa", 1024, 1), ("gqa", 8192, 4), ("mha", 8192, 1)]
FULL = [
    *(("gqa", tokens, batch) for tokens, batch in ((1024, 1), (1024, 64), (8192, 1), (8192, 4), (8192, 16))),
    *(("gqa", 32768, batch) for batch in (1, 4)),
    *(("mha", tokens, batch) for tokens, batch in ((1024, 1), (8192, 4), (32768, 1))),
]
STATIC_COMPILED = {("gqa", 8192, 4)}
REST_COMPILED = {("gqa", 8192, 4)}


def config_of(kind: str, tiny: bool) -> LlamaConfig:
    if tiny:
        heads = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
        return LlamaConfig(**heads, num_key_value_heads=2 if kind == "gqa" else 4, vocab_size=256,
                           max_position_embeddings=65536)  # fmt: skip
    sizes = {"num_hidden_layers": LAYERS, "vocab_size": 32000, "max_position_embeddings": 65536, "head_dim": 128}
    if kind == "gqa":
        return LlamaConfig(**sizes, hidden_size=4096, intermediate_size=8192, num_attention_heads=32,
                           num_key_value_heads=8)  # fmt: skip
    return LlamaConfig(**sizes, hidden_size=2048, intermediate_size=8192, num_attention_heads=16,
                       num_key_value_heads=16)  # fmt: skip


class Bench:
    """One model on one device, and the ways to decode with it."""

    def __init__(self, kind: str, device: str, tiny: bool, steps: int) -> None:
        self.kind, self.device, self.steps = kind, device, steps
        self.config = config_of(kind, tiny)
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        with torch.device(device):
            self.model = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype).eval()
        self.cache_name = cache_argument(type(self.model))
        self.weight_bytes = sum(each.numel() * each.element_size() for each in self.model.parameters())
        self.heads = self.config.num_key_value_heads
        self.token_bytes = 2 * self.config.num_hidden_layers * self.heads * self.config.head_dim * self.dtype.itemsize

    def synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def timed(self, step: Callable[[], Any], warm: int = 4) -> dict[str, float]:
        """Milliseconds of single steps."""
        times = []
        for number in range(warm + self.steps):
            self.synchronize()
            begin = time.perf_counter()
            step()
            self.synchronize()
            if number >= warm:
                times.append((time.perf_counter() - begin) * 1e3)
        times.sort()
        return {"p50": statistics.median(times), "p99": times[min(len(times) - 1, int(len(times) * 0.99))]}

    def states(self, batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (batch, self.heads, tokens, self.config.head_dim)
        keys = torch.randn(shape, device=self.device, dtype=self.dtype)
        return keys, keys.flip(1)

    def one_token(self, cache: Any, batch: int, forward: Any = None) -> Callable[[], None]:
        """A greedy step of the model's own forward."""
        token = torch.full((batch, 1), 7, device=self.device)
        forward = forward or self.model

        def step() -> None:
            logits = forward(input_ids=token, use_cache=True, **{self.cache_name: cache}).logits
            token.copy_(logits[:, -1:].argmax(-1))

        return step

    def fill(self, cache: Any, batch: int, tokens: int) -> Any:
        for layer in range(self.config.num_hidden_layers):
            cache.update(*self.states(batch, tokens), layer)
        return cache

    # ---- the ways

    @contextlib.contextmanager
    def elastic(self, batch: int, tokens: int, room: int):
        """An ElasticCache that holds so many tokens, on a pool of its own."""
        needed = batch * (tokens + room) * self.token_bytes
        with elastikv.SharedMemoryPool(2 * needed + (1 << 30), self.device) as pool:
            handle = pool.register_model("bench", virtual_capacity=1 << 44)
            config = copy.deepcopy(self.config)
            cache = ElasticCache(config, model=handle, max_batch=batch, max_tokens=tokens + room)
            self.fill(cache, batch, tokens)
            self.model.set_attn_implementation("elastikv")
            config._attn_implementation = "elastikv"
            try:
                yield cache, handle
            finally:
                self.model.set_attn_implementation("sdpa")
                cache.close()

    def graph(self, batch: int, tokens: int, *, resident: bool = False, compiled: bool = False) -> dict[str, float]:
        room = self.steps + 64
        with self.elastic(batch, tokens, room) as (cache, handle):
            slots = cache.slots
            if resident:
                slots.tensor.grow(list(range(batch)), [slots.max_tokens + 1] * batch, exact=True)
            model = torch.compile(self.model, fullgraph=True) if compiled else self.model
            self.synchronize()
            begin = time.perf_counter()
            decoder = Decoder(model, slots, range(batch), capacity=room)
            decoder.start(torch.randn(batch, self.config.vocab_size, device=self.device), limits=[room] * batch)
            decoder.step()
            self.synchronize()
            first = time.perf_counter() - begin
            row = self.timed(decoder.step)
            decoder.finish()
            held = sum(slots.lengths) * self.token_bytes
            # Beside the tokens: a page's rest in each row, and what is claimed and mapped ahead in tokens.
            slack = batch * (2 * handle.page_size + 96 * self.token_bytes)
            peak = handle.stats().peak_physical
            row.update(first_token_s=first, bytes=peak, needed=held, slack=slack, captures=decoder.captures)
            return row

    def eager(self, batch: int, tokens: int) -> dict[str, float]:
        with self.elastic(batch, tokens, self.steps + 64) as (cache, _):
            return self.timed(self.one_token(cache, batch))

    def dynamic(self, batch: int, tokens: int, *, flash: bool = False) -> dict[str, float]:
        cache = self.fill(DynamicCache(config=self.config), batch, tokens)
        backend = SDPBackend.FLASH_ATTENTION
        with sdpa_kernel(backend) if flash and self.device != "cpu" else contextlib.nullcontext():
            return self.timed(self.one_token(cache, batch))

    def static(self, batch: int, tokens: int, *, compiled: bool = False) -> dict[str, float]:
        cache = self.fill(StaticCache(config=self.config, max_cache_len=tokens + self.steps + 64), batch, tokens)
        if not compiled:
            return self.timed(self.one_token(cache, batch))
        torch._dynamo.reset()
        forward = torch.compile(self.model.forward, mode="reduce-overhead", fullgraph=True)
        step = self.one_token(cache, batch, forward)
        begin = time.perf_counter()
        step()
        self.synchronize()
        first = time.perf_counter() - begin
        return {**self.timed(step), "first_token_s": first}

    def ways(self, point: tuple[str, int, int], quick: bool) -> dict[str, Callable[[], dict[str, float]]]:
        _, tokens, batch = point
        ways: dict[str, Callable[[], dict[str, float]]] = {
            "graph": lambda: self.graph(batch, tokens),
            "graph, resident": lambda: self.graph(batch, tokens, resident=True),
            "eager": lambda: self.eager(batch, tokens),
            "dynamic": lambda: self.dynamic(batch, tokens),
            "dynamic, flash": lambda: self.dynamic(batch, tokens, flash=True),
            "static": lambda: self.static(batch, tokens),
        }
        if not quick and point in REST_COMPILED:
            ways["graph, compiled"] = lambda: self.graph(batch, tokens, compiled=True)
        if not quick and point in STATIC_COMPILED:
            ways["static, compiled"] = lambda: self.static(batch, tokens, compiled=True)
        return ways


def copy_bandwidth(device: str) -> float:
    """Bytes a second that the device reads and writes in a plain copy: the yardstick for the limit."""
    source = torch.empty((1 << 30) if device != "cpu" else (1 << 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(6):
        if device != "cpu":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        target.copy_(source)
        if device != "cpu":
            torch.cuda.synchronize()
        best = max(best, 2 * source.nbytes / (time.perf_counter() - begin))
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="three points and few steps")
    parser.add_argument("--tiny", action="store_true", help="toy models and short contexts")
    parser.add_argument("--steps", type=int, help="timed steps a way (default 60, quick 30)")
    parser.add_argument("--json", help="write the result here, too")
    asked = parser.parse_args()
    points = QUICK if asked.quick else FULL
    if asked.tiny:
        points = [("gqa", 64, 2), ("mha", 48, 1)]
    steps = asked.steps or (30 if asked.quick else 60)
    result: dict[str, Any] = {
        "benchmark": "decode", "device": asked.device, "torch": torch.__version__, "quick": asked.quick,
        "bandwidth": copy_bandwidth(asked.device), "points": [],
    }  # fmt: skip
    bench: Bench | None = None
    with torch.inference_mode():
        for point in points:
            kind, tokens, batch = point
            if bench is None or bench.kind != kind:
                bench = None
                gc.collect()
                bench = Bench(kind, asked.device, asked.tiny, steps)
            found: dict[str, Any] = {
                "model": kind, "context": tokens, "batch": batch, "ways": {},
                "limit": (bench.weight_bytes + batch * tokens * bench.token_bytes) / result["bandwidth"] * 1e3,
            }  # fmt: skip
            for name, run in bench.ways(point, asked.quick).items():
                try:
                    found["ways"][name] = run()
                except torch.OutOfMemoryError as error:
                    found["ways"][name] = {"error": str(error).splitlines()[0]}
                gc.collect()
                if asked.device != "cpu":
                    torch.cuda.empty_cache()
            result["points"].append(found)
            decode_report.print_point(found)
    if asked.json:
        Path(asked.json).write_text(json.dumps(result, indent=2) + "\n")
    fine = True
    for what, value, bar, holds in decode_report.bars(result):
        print(f"  {'ok  ' if holds else 'MISS'} {what} {bar:g}: {value:.3g}")
        fine = fine and holds
    return 0 if fine or asked.device == "cpu" else 1


if __name__ == "__main__":
    sys.exit(main())
