"""Generates the default trace: bursts of requests with pauses between them.

`scripts/make-trace` writes the file that comes with the package, byte for byte.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta

SEED = 20260
BURSTS = 4
BURST_SECONDS = 15.0  # from the start of a burst to the start of the next
REQUESTS_PER_BURST = 6
ARRIVALS_WITHIN = 5.0  # seconds, in the first part of a burst
START = datetime(2026, 1, 5, 9, 0, 0)


def generate_trace(seed: int = SEED) -> Iterator[tuple[float, int, int]]:
    """(arrival in seconds, context tokens, generated tokens) of each request, in order. Same seed, same trace."""
    rng = random.Random(seed)
    for burst in range(BURSTS):
        offsets = sorted(rng.random() * ARRIVALS_WITHIN for _ in range(REQUESTS_PER_BURST - 1))
        for offset in (0.0, *offsets):
            context = round(rng.triangular(80, 390, 160))
            generated = round(rng.triangular(18, 56, 30))
            yield burst * BURST_SECONDS + offset, context, generated


def csv_lines(seed: int = SEED) -> Iterator[str]:
    """The trace as lines of a CSV file, timestamps with seven digits as in Azure's dataset."""
    yield "TIMESTAMP,ContextTokens,GeneratedTokens"
    for arrival, context, generated in generate_trace(seed):
        moment = START + timedelta(seconds=int(arrival))
        ticks = round((arrival - int(arrival)) * 10**7)
        moment += timedelta(seconds=ticks // 10**7)
        yield f"{moment:%Y-%m-%d %H:%M:%S}.{ticks % 10**7:07d},{context},{generated}"


if __name__ == "__main__":
    print("\n".join(csv_lines(int(sys.argv[1]) if len(sys.argv) > 1 else SEED)))
