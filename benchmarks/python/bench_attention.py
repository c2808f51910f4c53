#!/usr/bin/env python3
"""One query a row over ragged rows: elastikv's own kernel against torch's flash op, in microseconds a layer.

    benchmarks/python/bench_attention.py [--json FILE]    # needs a GPU

Both run within a CUDA graph, over windows of several layers, so that the device's cache does not hold what they read;
the best of some replays counts. Times are whole: with the copies that the op makes, with what puts parts of a row
together, and with the launches in between. GB/s are of keys and values read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from elastikv import _core
from elastikv.hf import flash

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import attention_report
from report import show_bars

#: Rows, tokens of each, query heads, KV heads, elements of a head.
SHAPES = (
    *((rows, 1024, 32, 8, 128) for rows in (1, 4, 16, 64)),
    (4, 8192, 32, 8, 128),
    (16, 8192, 32, 8, 128),
    (1, 32768, 32, 8, 128),
    (4, 8192, 64, 8, 128),
    (4, 8192, 32, 8, 64),
    (64, 1024, 16, 16, 128),
    (1, 8192, 16, 16, 128),
    (4, 8192, 16, 16, 128),
)
CALLS, REPLAYS = 32, 6


def graph_of(call: Callable[[int], Any]) -> torch.cuda.CUDAGraph:
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(CALLS):
            call(number)
    return graph


def microseconds(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / CALLS


def compare(rows: int, tokens: int, heads: int, kv_heads: int, dim: int) -> dict[str, Any]:
    pitch = tokens + 64
    size = rows * tokens * kv_heads * dim * 4
    layers = max(1, min(8, (1 << 29) // size))
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    windows = [torch.randn(rows * pitch, 2, kv_heads, dim, **options) for _ in range(layers)]
    query = torch.randn(rows, heads, dim, **options)
    numbers = torch.arange(rows + 1, dtype=torch.int32, device="cuda")
    starts, lengths = numbers * pitch, torch.full((rows,), tokens, dtype=torch.int32, device="cuda")

    def ours(number: int) -> torch.Tensor:
        window = windows[number % layers]
        return _core.fused_attend(query, window[:, 0], window[:, 1], starts, lengths, tokens, None)

    def theirs(number: int) -> torch.Tensor:
        window = windows[number % layers]
        return flash.attend(query, window[:, 0], window[:, 1], query_starts=numbers, key_starts=starts, lengths=lengths,
                            max_query=1, max_key=tokens, scaling=None)  # fmt: skip

    torch.testing.assert_close(ours(0), theirs(0), rtol=2**-6, atol=2**-7)
    graphs = {"elastikv": graph_of(ours), "flash": graph_of(theirs)}
    times = {name: min(microseconds(graph) for _ in range(REPLAYS)) for name, graph in graphs.items()}
    shape = {"rows": rows, "tokens": tokens, "heads": heads, "kv_heads": kv_heads, "dim": dim}
    return {**shape, "bytes": size, "microseconds": times}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the result here, too")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_attention needs a GPU", file=sys.stderr)
        return 2
    with torch.inference_mode():
        shapes = [compare(*shape) for shape in SHAPES]
    result = {"benchmark": "attention", "device": "cuda:0", "torch": torch.__version__, "shapes": shapes}
    if asked.json:
        Path(asked.json).write_text(json.dumps(result, indent=2) + "\n")
    attention_report.print_tables(result)
    return 0 if show_bars(attention_report.bars(result)) else 1


if __name__ == "__main__":
    sys.exit(main())
