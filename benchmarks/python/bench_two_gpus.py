#!/usr/bin/env python3
"""Two GPUs of one host: what agreement costs a split model's decoding, and how fast GPUs read each other's memory.

    benchmarks/python/bench_two_gpus.py [--json FILE]                # two GPUs that reach each other's memory
    benchmarks/python/bench_two_gpus.py --device cpu --tiny          # two ranks of gloo on the host, to see it run

Decoding: a Llama of random weights, split among two ranks (NCCL, one CUDA graph a step), takes prompts and decodes with
caches of both kinds in turn, in the same processes: `agreed`, whose ranks grow together, and `alone`, where each rank
grows by itself. Milliseconds a token over whole rounds, medians of the ratios of neighbouring rounds; and the share of
the time that the host spends on agreeing, which by itself runs beside the device. `one GPU` is the whole model.

Peers: 1 GiB copies and reads by a kernel from mappings of the other device, half of which were made before peer access
was asked for and half after, against the same from torch's own memory.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import elastikv

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import two_gpus_report
from report import show_bars

BATCH = 4


# ---- decoding


class Spent:
    """Seconds that this process spent in some calls, in all."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def count(self, owner: type, name: str) -> None:
        plain = getattr(owner, name)

        def timed(*given: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return plain(*given, **options)
            finally:
                self.seconds += time.perf_counter() - begin

        setattr(owner, name, timed)


class Decoding:
    """One rank: its device, its share of the model, and the time of rounds."""

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.steps, self.context, self.rounds = (64, 24, 2) if tiny else (512, 2048, 8)
        self.told = dist.new_group(backend="gloo")
        self.spent = Spent()  # agreeing

    def config(self) -> Any:
        from transformers import LlamaConfig

        if self.tiny:
            return LlamaConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=2,
                               num_key_value_heads=2, vocab_size=256, head_dim=16)  # fmt: skip
        return LlamaConfig(hidden_size=4096, intermediate_size=8192, num_attention_heads=32, num_hidden_layers=16,
                           num_key_value_heads=8, vocab_size=32000, head_dim=128,
                           max_position_embeddings=65536)  # fmt: skip

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def round(self, network: Any, cache: Any) -> tuple[float, torch.Tensor]:
        """Milliseconds a token of one round, which begins with the prompt; and the tokens."""
        from elastikv.hf.generation import prefill

        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(3, network.config.vocab_size, (BATCH, self.context), generator=generator)
        tokens = tokens.to(self.device)
        cache.reset()
        batch = cache._batch
        with torch.inference_mode():
            batch.start_rows(BATCH, network.dtype)
            logits = prefill(
                network, cache.slots, range(BATCH), tokens, torch.ones_like(tokens, dtype=torch.bool).cpu()
            )
            batch.adopt_rows(BATCH, self.context)
            decoder = cache.decoder(network, capacity=self.steps + 64)
            decoder.start(logits, limits=[self.steps + 64] * BATCH)
        for _ in range(16):  # the graph is captured, and the ranks are in step
            decoder.step()
        self.wait()
        dist.barrier(group=self.told)
        self.spent.seconds = 0.0
        begin = time.perf_counter()
        for _ in range(self.steps):
            decoder.step()
        self.wait()
        elapsed = time.perf_counter() - begin
        seconds = self.spent.seconds
        decoder.finish()
        self.spent.seconds = seconds
        return elapsed / self.steps * 1e3, decoder.history[:, : self.steps + 16].clone()

    def run(self) -> dict[str, Any]:
        from transformers import AutoModelForCausalLM

        from elastikv.distributed import Ranks, split
        from elastikv.distributed.ranks import Proposal
        from elastikv.hf import ElasticCache

        torch.manual_seed(0)
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        with torch.device(self.device):
            network = AutoModelForCausalLM.from_config(self.config(), dtype=dtype, attn_implementation="elastikv")
        network.eval()
        limit = (1 << 28) if self.tiny else (12 << 30)
        options = {"max_batch": BATCH, "max_tokens": self.context + self.steps + 128}
        found: dict[str, Any] = {"batch": BATCH, "context": self.context, "steps": self.steps, "rounds": self.rounds}
        with elastikv.SharedMemoryPool(limit, str(self.device)) as pool:
            whole = ElasticCache(copy.deepcopy(network.config), model=pool.register_model("whole", 1 << 42), **options)
            self.round(network, whole)
            found["one_gpu_ms"] = self.round(network, whole)[0]
            whole.close()
            del whole
            split(network)
            gc.collect()
            ranks = Ranks()
            self.spent.count(Ranks, "propose")
            self.spent.count(Proposal, "finish")
            caches = {
                "agreed": ElasticCache(
                    network.config, model=pool.register_model("agreed", 1 << 42), ranks=ranks, **options
                ),
                "alone": ElasticCache(network.config, model=pool.register_model("alone", 1 << 42), **options),
            }
            times: dict[str, list[float]] = {way: [] for way in caches}
            answers = {way: self.round(network, cache)[1] for way, cache in caches.items()}
            assert torch.equal(answers["agreed"], answers["alone"])
            shares, asked = [], 0
            for number in range(self.rounds):
                for way in list(caches) if number % 2 == 0 else list(caches)[::-1]:
                    before = ranks.decisions
                    per_token, _ = self.round(network, caches[way])
                    times[way].append(per_token)
                    if way == "agreed":
                        asked += ranks.decisions - before
                        shares.append(self.spent.seconds / (per_token * self.steps / 1e3))
            found["ms"] = {way: statistics.median(each) for way, each in times.items()}
            found["rounds_ms"] = times
            found["ratio"] = statistics.median(a / b for a, b in zip(times["agreed"], times["alone"]))
            found["host_share"] = statistics.median(shares)
            found["tokens_per_decision"] = self.rounds * (self.steps + 16) / max(asked, 1)
            for cache in caches.values():
                cache.close()
        return found


def run_rank(rank: int, folder: Path, device: str, tiny: bool) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.set_num_threads(1)
    where = torch.device("cpu") if device == "cpu" else torch.device("cuda", rank)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = Decoding(where, tiny).run()
    if rank == 0:
        (folder / "decode.json").write_text(json.dumps(found))
    (folder / f"done-{rank}").touch()
    while not all((folder / f"done-{each}").exists() for each in range(2)):
        time.sleep(0.01)
    os._exit(0)  # NCCL's threads are not waited for


def decode(device: str, tiny: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        common = [sys.executable, __file__, "--device", device, "--folder", folder, *(["--tiny"] if tiny else [])]
        runs = [subprocess.Popen([*common, "--rank", str(rank)]) for rank in range(2)]
        try:
            codes = [run.wait(timeout=180) for run in runs]
        finally:
            for run in runs:
                run.kill()
                run.wait()
        if codes != [0, 0]:
            raise RuntimeError(f"the ranks ended with {codes}")
        found: dict[str, Any] = json.loads((Path(folder) / "decode.json").read_text())
        return found


# ---- peers


def on_device(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The same memory under another device's name, so that a kernel of that device reads it where it is."""
    storage = torch._C._construct_storage_from_data_pointer(tensor.data_ptr(), torch.device(device), tensor.nbytes)
    return torch.empty(0, dtype=tensor.dtype, device=device).set_(storage, 0, tensor.shape, tensor.stride())


def bandwidths(ways: dict[str, Callable[[], Any]], size: int, repeat: int = 10, rounds: int = 7) -> dict[str, float]:
    """GB/s of each way, medians over rounds in which all take turns."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, run in ways.items():
            for device in range(2):
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            for _ in range(repeat):
                run()
            for device in range(2):
                torch.cuda.synchronize(device)
            if number:
                times[way].append((time.perf_counter() - begin) / repeat)
    return {way: size / statistics.median(each) / 1e9 for way, each in times.items()}


def peers(size: int = 1 << 30) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for owner, reader in (("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")):
        with elastikv.DevicePools({"cuda:0": 4 * size, "cuda:1": 4 * size}) as pools:
            models = pools.register_model("bench", 1 << 40)
            theirs = elastikv.empty((size // 8,), (size // 4,), torch.float32, models[owner])
            mine = elastikv.empty((size // 8,), (size // 4,), torch.float32, models[reader])
            pools.allow_peers()
            for tensor in (theirs, mine):
                elastikv.grow_(tensor, size // 4)
                tensor.fill_(3.0)
            plain = torch.full((size // 4,), 3.0, device=owner)
            target = torch.zeros(size // 4, device=reader)
            # torch lets each device reach the other with its first copy in that direction.
            target.copy_(plain)
            torch.empty(16, device=owner).copy_(target[:16])
            near, far = on_device(plain, reader), on_device(theirs, reader)
            ways = {
                "torch: copy": lambda target=target, plain=plain: target.copy_(plain),
                "elastikv: copy from": lambda target=target, theirs=theirs: target.copy_(theirs),
                "elastikv: copy into": lambda mine=mine, plain=plain: mine.copy_(plain),
                "elastikv: copy from and into": lambda mine=mine, theirs=theirs: mine.copy_(theirs),
                "torch: read by a kernel": lambda near=near, target=target: torch.add(near, 1, out=target),
                "elastikv: read by a kernel": lambda far=far, target=target: torch.add(far, 1, out=target),
            }
            with torch.cuda.device(reader):
                found[f"{owner} to {reader}"] = bandwidths(ways, size)
            assert bool(target.eq(4).all()) and bool(mine.eq(3).all())
            del near, far, ways, theirs, mine, tensor
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a toy model")
    parser.add_argument("--json", help="write the result here, too")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank is not None:
        run_rank(asked.rank, asked.folder, asked.device, asked.tiny)
    if asked.device == "cuda" and torch.cuda.device_count() < 2:
        print(f"this machine has {torch.cuda.device_count()} GPUs; --device cpu --tiny runs the ranks without one")
        return 2
    result: dict[str, Any] = {"benchmark": "two-gpus", "device": asked.device, "torch": torch.__version__}
    if asked.device == "cuda":
        result["peers"] = peers()
        gc.collect()
        torch.cuda.empty_cache()
    try:
        result["decode"] = decode(asked.device, asked.tiny)
    except (RuntimeError, subprocess.TimeoutExpired) as error:  # what the peers showed is kept
        print(f"decoding failed: {error}")
    if asked.json:
        Path(asked.json).write_text(json.dumps(result, indent=2) + "\n")
    two_gpus_report.print_tables(result)
    fine = show_bars(two_gpus_report.bars(result), digits=4)
    return 0 if "decode" in result and (fine or asked.device == "cpu") else 1


if __name__ == "__main__":
    sys.exit(main())
