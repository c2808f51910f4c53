#!/usr/bin/env python3
"""Records what torch's own allocator is asked for in two runs on a GPU, as compact logs that can be replayed.

    benchmarks/python/record_traces.py training FILE.csv.gz    # steps of a small GPT, each of a length of its own
    benchmarks/python/record_traces.py serving FILE.csv.gz     # requests of mixed lengths, with caches that grow

Weights and tokens are random, and seeded. `--tiny` is a size to try it with; with `--device cpu` nothing is recorded.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from elastikv.torch.allocation_log import compact, log_allocations, read_log, write_log
from elastikv.trace import DEFAULT_TRACE, read_trace

SEED = 4


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, each [batch, heads, tokens, dim]."""
        batch, tokens, width = hidden.shape
        shape = (batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = self.qkv(self.before(hidden)).view(shape).permute(2, 0, 3, 1, 4)
        return query, key, value

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.out(attended.transpose(1, 2).flatten(2))
        return hidden + self.down(F.gelu(self.up(self.between(hidden))))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = self.project(hidden)
        return self.finish(hidden, F.scaled_dot_product_attention(query, key, value, is_causal=True))


class Transformer(nn.Module):
    def __init__(self, layers: int, width: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, width // 128) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(self.norm(hidden), self.embedding.weight)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.logits(hidden)


def train(device: str, tiny: bool) -> None:
    """AdamW in float32 under bfloat16 autocast; some 20 GiB at the peak."""
    layers, width, vocabulary, steps, longest = (2, 256, 512, 2, 64) if tiny else (16, 1536, 32000, 6, 2048)
    rng = random.Random(SEED)
    with torch.device(device):
        model = Transformer(layers, width, vocabulary)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        length = rng.randrange(longest // 4, longest)
        tokens = torch.randint(vocabulary, (4, length + 1), device=device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        del logits, loss, tokens


class Request:
    """A prompt, and a cache a layer, copied into a new one for every token, as transformers' DynamicCache is."""

    def __init__(self, prompt: int, answer: int) -> None:
        self.prompt, self.left = prompt, answer
        self.caches: list[tuple[torch.Tensor, torch.Tensor]] = []


def prefill(model: Transformer, request: Request, device: str) -> None:
    tokens = torch.randint(model.embedding.num_embeddings, (1, request.prompt), device=device)
    hidden = model.embedding(tokens)
    for block in model.blocks:
        query, key, value = block.project(hidden)
        request.caches.append((key.contiguous(), value.contiguous()))
        hidden = block.finish(hidden, F.scaled_dot_product_attention(query, key, value, is_causal=True))
    model.logits(hidden[:, -1:]).argmax(-1)


def decode(model: Transformer, running: list[Request], device: str) -> None:
    """One token for each: the layers as a batch, attention one request after the other, as lengths differ."""
    tokens = torch.randint(model.embedding.num_embeddings, (len(running), 1), device=device)
    hidden = model.embedding(tokens)
    for layer, block in enumerate(model.blocks):
        query, key, value = block.project(hidden)
        attended = []
        for row, request in enumerate(running):
            keys, values = request.caches[layer]
            keys = torch.cat([keys, key[row : row + 1]], dim=2)
            values = torch.cat([values, value[row : row + 1]], dim=2)
            request.caches[layer] = (keys, values)
            attended.append(F.scaled_dot_product_attention(query[row : row + 1], keys, values))
        hidden = block.finish(hidden, torch.cat(attended))
    model.logits(hidden).argmax(-1)
    for request in running:
        request.left -= 1


@torch.inference_mode()
def serve(device: str, tiny: bool) -> None:
    """The shipped trace, its requests shuffled; bfloat16, at most 12 at once, some 15 GiB."""
    layers, width, vocabulary, scale = (2, 256, 512, 0.25) if tiny else (4, 4096, 32000, 64)
    rng = random.Random(SEED)
    waiting = [
        Request(max(int(each.context_tokens * scale * rng.uniform(0.2, 1.6)), 1), each.generated_tokens)
        for each in read_trace(DEFAULT_TRACE)
    ]
    rng.shuffle(waiting)
    waiting = waiting[:4] if tiny else waiting
    with torch.device(device):
        model = Transformer(layers, width, vocabulary).to(torch.bfloat16)
    running: list[Request] = []
    while waiting or running:
        if waiting and len(running) < 12:
            running.append(waiting.pop())
            prefill(model, running[-1], device)
        decode(model, running, device)
        running = [request for request in running if request.left > 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=("training", "serving"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    torch.manual_seed(SEED)
    run = train if asked.run == "training" else serve
    if asked.device == "cpu":
        run("cpu", asked.tiny)
        return
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.csv"
        with log_allocations(log):
            run(asked.device, asked.tiny)
            torch.cuda.synchronize()
        events = compact(read_log(log))
    write_log(asked.file, events)
    gib, size = torch.cuda.max_memory_allocated() / 2**30, asked.file.stat().st_size / 1000
    print(f"{asked.run}: {len(events)} events, {gib:.1f} GiB at the peak, {size:.0f} kB in {asked.file}")


if __name__ == "__main__":
    main()
