#!/usr/bin/env python3
"""Three models, each in a process of its own, on one GPU: out of one pool, then out of static thirds of that memory.

    examples/serving/mixed.py --limit 6GiB --model random:large                       # on a GPU
    examples/serving/mixed.py --device cpu --dtype float32 --limit 3MiB --model random:tiny --time-scale 0.2

Starts `elastikv serve` for each --model (given once, it is served three times), replays a trace against them by
load.py, and does the same again where each may hold a third. Prints both, and writes a JSON file and a picture. While
it runs, `elastikv top` shows who holds what.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import load

import elastikv
from elastikv.cli.sizes import parse_size
from elastikv.plots.serving import plot_first_tokens
from elastikv.trace import Outcome, TraceRequest, summary


@contextlib.contextmanager
def servers(
    models: Sequence[str], arguments: argparse.Namespace, *, pool: str, share: int | None
) -> Iterator[list[str]]:
    """Their addresses, once all of them answer. They end with the block."""
    processes: list[subprocess.Popen[str]] = []
    try:
        for index, model in enumerate(models):
            command = [
                sys.executable, "-m", "elastikv.cli", "serve", model, "--name", f"model-{index}", "--pool", pool,
                "--limit", arguments.limit, "--device", arguments.device, "--dtype", arguments.dtype,
                "--max-tokens", str(arguments.max_tokens), "--max-batch", str(arguments.max_batch), "--port", "0",
                "--prefixes", str(arguments.prefixes),
            ]  # fmt: skip
            if share is not None:
                command += ["--quota", str(share)]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        until = time.monotonic() + arguments.patience
        yield [address(process, until) for process in processes]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def address(process: subprocess.Popen[str], until: float) -> str:
    """Where the server says that it listens. Ends this program where it does not say so in time."""
    assert process.stdout is not None
    while select.select([process.stdout], [], [], max(until - time.monotonic(), 0.0))[0]:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"a server ended with status {process.wait()} before it listened; it said why above")
        if line.startswith("listens at "):
            return line.removeprefix("listens at ").strip()
    raise SystemExit(f"server {process.pid} does not listen yet: more time with --patience SECONDS")


class Watch(threading.Thread):
    """Looks at the ledger while a trace runs: the most that was charged, by model and of all."""

    def __init__(self, pool: str) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, int] = {}
        self.peak = 0
        self._ledger = elastikv.Ledger(pool)
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._over.wait(0.02):
            for client in self._ledger.clients(refresh=False):
                self.peaks[client.model] = max(self.peaks.get(client.model, 0), client.charged)
            self.peak = max(self.peak, self._ledger.stats().charged)

    def stop(self) -> None:
        self._over.set()
        self.join()


def serve_trace(
    models: Sequence[str], requests: Sequence[TraceRequest], arguments: argparse.Namespace, *, share: int | None
) -> tuple[list[Outcome], dict[str, object]]:
    pool = f"mixed-{os.getpid()}-{'pool' if share is None else 'static'}"
    shift = arguments.shift * arguments.time_scale
    with servers(models, arguments, pool=pool, share=share) as urls:
        # Each once, so that what is made at first use is there.
        warm = [TraceRequest(0.0, 64, 8)] * 6 * len(models)
        for url in urls:
            asyncio.run(load.run([url], warm, shift=1.0))
        elastikv.Ledger(pool).trim()
        watch = Watch(pool)
        outcomes = asyncio.run(load.run(urls, requests, shift=shift))
        watch.stop()
    load.tell(outcomes, [f"model-{index}" for index in range(len(models))])
    return outcomes, {"peak_bytes": watch.peak, "peak_bytes_by_model": watch.peaks, **summary(outcomes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="a checkpoint or random:SIZE; may be given again")
    parser.add_argument("--limit", required=True, help="physical memory of all together, as 6GiB")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--prefixes", type=int, default=32, help="rows kept for prompts that share a prefix")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds that the servers may take to start")
    parser.add_argument("--out", type=Path, default=Path("mixed"), help="without ending: .json and .png are put to it")
    load.add_trace_options(parser)
    arguments = parser.parse_args()
    models = arguments.model or ["random:large"]
    models = models * 3 if len(models) == 1 else models
    requests, limit = load.requests_of(arguments), parse_size(arguments.limit)

    both: dict[str, list[Outcome]] = {}
    facts: dict[str, dict[str, object]] = {}
    for name, share in (("pool", None), ("static shares", limit // len(models))):
        print(name, flush=True)
        both[name], facts[name] = serve_trace(models, requests, arguments, share=share)
    pool, static = facts["pool"], facts["static shares"]
    for field in ("served", "waited", "tokens_per_second", "first_token_p50", "first_token_p99"):
        print(f"  {field:18} pool {pool[field]:10.4g}   static {static[field]:10.4g}")
    result = {
        "limit_bytes": limit,
        "models": models,
        "ways": facts,
        "outcomes": {name: [asdict(one) for one in outcomes] for name, outcomes in both.items()},
    }
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    plot_first_tokens(arguments.out.with_suffix(".png"), {f"{len(models)} models, {arguments.limit}": both})


if __name__ == "__main__":
    main()
