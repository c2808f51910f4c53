#!/usr/bin/env python3
"""vLLM's attention over KV blocks that lie in memory in several ways: what a layout costs a decode step.

    benchmarks/python/bench_vllm_attention.py [--blocks 16,32,64] [--json FILE]

A step writes a token of each sequence and attends to all of it, in one layer after the other, within a CUDA graph:
with vLLM's own kernels, the model's shape and the batch of bench_vllm. All layouts hold the same content, are timed in
turns, and are compared with plain vLLM's: torch's memory, each layer a tensor of its own. Where a block lies:

apart   each layer has its blocks one after the other
beside  all layers of a block side by side, block after block
chunks  blocks in chunks of so many MiB of one layer, and all layers of a chunk side by side; ids count chunks of all

Needs vLLM and a Hopper GPU (FlashAttention 3).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import elastikv

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_vllm import MODEL

LAYERS, HEADS = MODEL["num_hidden_layers"], MODEL["num_attention_heads"]
KV_HEADS, HEAD = MODEL["num_key_value_heads"], MODEL["head_dim"]
MIB = 1 << 20
ROUNDS, REPLAYS = 7, 10


@dataclass(frozen=True)
class Load:
    """Sequences of a decode step, and the tokens that each has."""

    sequences: int
    tokens: int
    block: int  # tokens
    shuffled: bool = False  # blocks are anywhere; else prompts lie together and what was decoded is interleaved

    def ids(self) -> torch.Tensor:
        """Block ids [sequences, blocks of one]; 0 is no sequence's, as in vLLM."""
        each = -(-self.tokens // self.block)
        prompt = min(each, max(1, each * 4 // 5))
        ids = torch.empty(self.sequences, each, dtype=torch.int64)
        ids[:, :prompt] = torch.arange(self.sequences * prompt).view(self.sequences, prompt)
        later = torch.arange(self.sequences * (each - prompt)).view(each - prompt, self.sequences).T
        ids[:, prompt:] = self.sequences * prompt + later
        if self.shuffled:
            ids = torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(1))[ids]
        return ids + 1

    @property
    def count(self) -> int:
        """Blocks that there must be; a multiple of those in 64 MiB, so that any chunks divide them."""
        whole = max(1, 64 * MIB // self.part)
        return -(-(self.sequences * -(-self.tokens // self.block) + 1) // whole) * whole

    @property
    def part(self) -> int:
        """Bytes of one layer in a block."""
        return 2 * self.block * KV_HEADS * HEAD * 2


@dataclass(frozen=True)
class Layout:
    """Where blocks lie in a piece of memory that holds them all."""

    name: str
    chunk: int | None = None  # bytes of a layer that lie together; None: all

    def layers(self, memory: torch.Tensor, load: Load) -> list[torch.Tensor]:
        """Views [ids, 2, tokens, heads, dim] of each layer; memory: bfloat16 in one dimension."""
        chunk = self.chunk if self.chunk is not None else load.count * load.part
        span = memory.numel()
        begins = [layer * chunk // 2 for layer in range(LAYERS)]
        if self.name == "beside":
            begins, stride = [layer * load.part // 2 for layer in range(LAYERS)], LAYERS * load.part // 2
        else:
            stride = load.part // 2
        inner = (load.part // 4, KV_HEADS * HEAD, HEAD, 1)
        shape = (2, load.block, KV_HEADS, HEAD)
        counts = [load.count if self.name != "chunks" else (span - begin) // stride for begin in begins]
        return [memory.as_strided((count, *shape), (stride, *inner), begin) for count, begin in zip(counts, begins)]

    def id_of(self, ids: torch.Tensor, load: Load) -> torch.Tensor:
        """What vLLM's block tables would hold for these blocks."""
        if self.name != "chunks":
            return ids
        assert self.chunk is not None
        per = self.chunk // load.part
        return ids // per * (per * LAYERS) + ids % per


class Step:
    """A captured decode step over one layout."""

    def __init__(
        self, layers: list[torch.Tensor], ids: torch.Tensor, load: Load, inputs: Inputs, seed_from: Any
    ) -> None:
        self.layers, self.ids, self.load, self.inputs = layers, ids.to("cuda"), load, inputs
        self.table = self.ids.to(torch.int32).contiguous()
        last = load.tokens - 1
        self.slots = self.ids[:, last // load.block] * load.block + last % load.block
        for layer, content in zip(layers, seed_from):  # content: [blocks in the table, 2, tokens, heads, dim]
            layer[self.ids.flatten()] = content
        self.outputs = torch.empty(LAYERS, load.sequences, HEADS, HEAD, dtype=torch.bfloat16, device="cuda")
        self.run()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.run()
        self.times: list[float] = []

    def run(self) -> None:
        inputs, load = self.inputs, self.load
        for number, layer in enumerate(self.layers):
            keys, values = layer.unbind(1)
            inputs.write(inputs.key, inputs.value, keys, values, self.slots, "auto", inputs.one, inputs.one)
            inputs.attend(
                q=inputs.query, k=keys, v=values, out=self.outputs[number], cu_seqlens_q=inputs.starts,
                max_seqlen_q=1, seqused_k=inputs.lengths, max_seqlen_k=load.tokens, softmax_scale=HEAD**-0.5,
                causal=True, window_size=[-1, -1], block_table=self.table, scheduler_metadata=inputs.metadata,
                fa_version=3, num_splits=32,
            )  # fmt: skip

    def time(self) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.graph.replay()
        begin.record()
        for _ in range(REPLAYS):
            self.graph.replay()
        end.record()
        end.synchronize()
        self.times.append(begin.elapsed_time(end) / REPLAYS)


class Inputs:
    """What a step reads beside the cache, made as vLLM's runner makes it; the same for all layouts."""

    def __init__(self, load: Load) -> None:
        from vllm.v1.attention.backends import fa_utils

        self.attend: Callable[..., Any] = fa_utils.flash_attn_varlen_func
        self.write: Callable[..., Any] = fa_utils.reshape_and_cache_flash
        made = torch.Generator("cuda").manual_seed(0)
        shapes = [(load.sequences, heads, HEAD) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        self.query, self.key, self.value = (
            torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=made) for shape in shapes
        )
        self.starts = torch.arange(load.sequences + 1, dtype=torch.int32, device="cuda")
        self.lengths = torch.full((load.sequences,), load.tokens, dtype=torch.int32, device="cuda")
        self.one = torch.ones(1, dtype=torch.float32, device="cuda")
        found = fa_utils.get_scheduler_metadata(
            batch_size=load.sequences, max_seqlen_q=1, max_seqlen_k=load.tokens, num_heads_q=HEADS,
            num_heads_kv=KV_HEADS, headdim=HEAD, cache_seqlens=self.lengths, qkv_dtype=torch.bfloat16,
            cu_seqlens_q=self.starts, page_size=load.block, causal=True, window_size=(-1, -1), num_splits=32,
        )  # fmt: skip
        kept = torch.zeros(1 + 256 * 4, dtype=torch.int32, device="cuda")
        kept[: found.shape[0]] = found
        self.metadata = kept[: found.shape[0]]


class Memories:
    """Pieces of memory for all blocks, by who made them: torch, or a pool with extents of a size."""

    def __init__(self, load: Load, extents: list[int]) -> None:
        size = LAYERS * load.count * load.part
        self.shared = elastikv.SharedMemoryPool(size * len(extents) + (2 << 30), "cuda:0", park_limit=0)
        self.mapping: dict[str, float] = {}
        self.pools = []
        self.by_name = {"torch": torch.empty(size // 2, dtype=torch.bfloat16, device="cuda")}
        for extent in extents:
            name = "one extent" if extent == 0 else f"{extent // MIB} MiB extents"
            model = self.shared.register_model(name, 2 * size)
            unit = 64 * MIB if extent == 0 else min(extent, 2 * MIB)  # of a block of this pool
            pool = elastikv.BlockPool(model, size // unit, (unit,), 1, torch.int8, extent_bytes=extent or size)
            begin = time.perf_counter()
            pool.allocate(size // unit)
            self.mapping[name] = (time.perf_counter() - begin) * 1e6 / (size / pool.extent_bytes)
            flat = pool.layer(0).view(-1).view(torch.bfloat16)
            self.pools.append(pool)
            self.by_name[name] = flat

    def close(self) -> None:
        self.by_name.clear()
        for pool in self.pools:
            pool.close()
        self.shared.close()


def measure(load: Load, extents: list[int], layouts: list[Layout]) -> list[dict[str, Any]]:
    """A row for each memory and layout; the first is plain vLLM's."""
    inputs, memories = Inputs(load), Memories(load, extents)
    ids = load.ids()
    made = torch.Generator("cuda").manual_seed(0)
    shape = (ids.numel(), 2, load.block, KV_HEADS, HEAD)
    content = [torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=made) for _ in range(LAYERS)]
    steps: dict[tuple[str, Layout], Step] = {}
    outputs: dict[tuple[str, Layout], torch.Tensor] = {}
    for name, memory in memories.by_name.items():
        for layout in layouts:
            memory.zero_()
            key = name, layout
            steps[key] = Step(layout.layers(memory, load), layout.id_of(ids, load), load, inputs, content)
            steps[key].graph.replay()
            torch.cuda.synchronize()
            outputs[key] = steps[key].outputs.clone()
    content.clear()
    first = next(iter(outputs.values()))
    for memory in memories.by_name.values():  # all read the same piece in their own order, so let it hold numbers
        memory.normal_()
    for _ in range(ROUNDS):
        for step in steps.values():
            step.time()
    rows = []
    plain = statistics.median(next(iter(steps.values())).times)
    for (name, layout), step in steps.items():
        ms = statistics.median(step.times)
        rows.append({
            "sequences": load.sequences, "tokens": load.tokens, "block": load.block, "shuffled": load.shuffled,
            "memory": name, "layout": layout.name, "chunk_mib": layout.chunk and layout.chunk / MIB, "ms": ms,
            "ratio": ms / plain, "more_us": (ms - plain) * 1e3, "us_an_extent": memories.mapping.get(name),
            "equal": bool(torch.equal(outputs[name, layout], first)),
        })  # fmt: skip
    steps.clear()
    memories.close()
    torch.cuda.empty_cache()
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    head = rows[0]
    order = "anywhere" if head["shuffled"] else "as vLLM hands them out"
    print(f"{head['sequences']} sequences of {head['tokens']} tokens, blocks of {head['block']}, {order}: "
          f"plain {head['ms']:.3f} ms a step of {LAYERS} layers")  # fmt: skip
    for row in rows:
        chunk = f"{row['chunk_mib']:g} MiB" if row["layout"] == "chunks" else ""
        print(f"  {row['memory']:15} {row['layout']:7} {chunk:8} {row['ms']:7.3f} ms {row['ratio']:6.3f} x "
              f"{row['more_us']:+7.0f} us{'' if row['equal'] else '  OTHER RESULT'}", flush=True)  # fmt: skip
    mapped = {row["memory"]: row["us_an_extent"] for row in rows if row["us_an_extent"] is not None}
    print("  mapping: " + ", ".join(f"{name} {each:.0f} us each" for name, each in mapped.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", default="16,32,64", help="tokens of a block, the first with all layouts")
    parser.add_argument("--json", help="write the rows here, too")
    asked = parser.parse_args()
    sys.modules.setdefault("xgrammar", mock.MagicMock())  # not needed, and does not import everywhere
    sizes = [int(size) for size in asked.blocks.split(",")]
    apart, beside = Layout("apart"), Layout("beside")
    chunks = [Layout("chunks", MIB // 2), Layout("chunks", MIB), Layout("chunks", 2 * MIB), Layout("chunks", 4 * MIB)]
    rows: list[dict[str, Any]] = []
    for load, extents, layouts in (
        (Load(128, 640, sizes[0]), [2 * MIB, 16 * MIB, 32 * MIB, 0], [apart, beside, *chunks]),
        (Load(128, 640, sizes[0], shuffled=True), [2 * MIB, 16 * MIB, 32 * MIB], [apart, beside, *chunks]),
        (Load(16, 4096, sizes[0]), [16 * MIB, 32 * MIB], [apart, beside, *chunks]),
        *((Load(128, 640, size), [2 * MIB, 16 * MIB], [apart, beside, chunks[2]]) for size in sizes[1:]),
    ):
        found = measure(load, extents, layouts)
        show(found)
        rows += found
    if asked.json:
        Path(asked.json).write_text(json.dumps({"benchmark": "vllm-attention", "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
