"""Seeded logs of allocations in the shapes of training and of serving, for tests and for benches without a GPU."""

from __future__ import annotations

import random
from collections.abc import Iterator

from elastikv.torch.allocation_log import AllocationEvent


class _Recorder:
    """Numbers blocks and writes events as an allocator without other streams would."""

    def __init__(self) -> None:
        self.events: list[AllocationEvent] = []
        self.sizes: list[int] = []

    def alloc(self, size: int) -> int:
        block = len(self.sizes)
        self.sizes.append(size)
        self._add("alloc", block)
        return block

    def free(self, block: int) -> None:
        self._add("free_requested", block)
        self._add("free_completed", block)

    def _add(self, action: str, block: int) -> None:
        self.events.append(AllocationEvent(1000 * len(self.events), action, block, self.sizes[block]))


def training_log(seed: int = 0, steps: int = 8, layers: int = 24, width: int = 2048) -> list[AllocationEvent]:
    """Training steps of a transformer in bfloat16, of which each has a length of its own.

    Weights and the optimizer's state stay; activations are freed in the order opposite to their allocation, while
    gradients appear; each layer has temporary memory besides.
    """
    rng = random.Random(seed)
    to = _Recorder()
    shapes = [3 * width * width, width * width, 4 * width * width, 4 * width * width, 2 * width, 2 * width]
    weights = [to.alloc(2 * shape) for _ in range(layers) for shape in shapes]
    moments: list[int] = []
    for _ in range(steps):
        tokens = rng.randrange(2048, 8192)
        unit = 2 * tokens * width
        saved: list[list[int]] = []
        for _ in range(layers):
            temporary = to.alloc(rng.choice((unit, 2 * unit)))
            saved.append([to.alloc(size) for size in (unit, 3 * unit, unit, 4 * tokens, unit, 4 * unit, 4 * unit)])
            to.free(temporary)
        logits = to.alloc(2 * tokens * 32000)
        loss = to.alloc(4)
        gradients: list[int] = []
        upstream = to.alloc(unit)
        for blocks in reversed(saved):
            for block in reversed(blocks):
                temporary = to.alloc(to.sizes[block])
                to.free(block)
                to.free(temporary)
            gradients += [to.alloc(2 * shape) for shape in shapes]
            following = to.alloc(unit)
            to.free(upstream)
            upstream = following
        for block in (upstream, logits, loss):
            to.free(block)
        moments = moments or [to.alloc(2 * to.sizes[block]) for block in weights for _ in range(2)]
        for block in gradients:
            scratch = to.alloc(2 * to.sizes[block])
            to.free(block)
            to.free(scratch)
    for block in (*weights, *moments):
        to.free(block)
    return to.events


def serving_log(seed: int = 0, requests: int = 96, layers: int = 8, token: int = 4096) -> list[AllocationEvent]:
    """Requests that come and go, each with a cache a layer that is copied into a larger one as it fills up.

    `token` is the bytes of one token in one layer; caches double. Each step has temporary memory by the batch.
    """
    rng = random.Random(seed)
    to = _Recorder()
    weights = [to.alloc(rng.choice((32, 64, 96)) << 20) for _ in range(4 * layers)]
    waiting = requests
    running: list[tuple[list[int], list[int]]] = []  # caches by layer; their capacity, length, and length to come
    while waiting or running:
        if waiting and len(running) < 24 and rng.random() < 0.5:
            waiting -= 1
            length = int(rng.lognormvariate(7.0, 1.0)) + 16
            prompt = _prompt(to, rng, layers, length * token)
            running.append((list(prompt), [length, length, length + rng.randrange(8, 128)]))
        batch = to.alloc(max(len(running), 1) * 8192)
        for caches, counts in running:
            counts[1] += 1
            if counts[1] > counts[0]:
                counts[0] *= 2
                for layer, old in enumerate(caches):
                    caches[layer] = to.alloc(counts[0] * token)
                    to.free(old)
            scores = to.alloc(4 * 32 * counts[1])
            to.free(scores)
        to.free(batch)
        for finished in [each for each in running if each[1][1] >= each[1][2]]:
            running.remove(finished)
            for block in finished[0]:
                to.free(block)
    for block in weights:
        to.free(block)
    return to.events


def _prompt(to: _Recorder, rng: random.Random, layers: int, cache: int) -> Iterator[int]:
    for _ in range(layers):
        hidden = to.alloc(rng.choice((2, 3, 8)) * cache)
        yield to.alloc(cache)
        to.free(hidden)
