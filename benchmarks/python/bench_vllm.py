#!/usr/bin/env python3
"""vLLM with elastikv's plugin beside plain vLLM, on one GPU, with a random model of a billion weights.

    benchmarks/python/bench_vllm.py [--sections single,pair,kill] [--json FILE] [--picture FILE]

single  one engine, plain and then elastic: the tokens of 256 mixed requests, throughput, time between tokens, startup,
        KV memory when idle and how soon a burst's is back
pair    two engines with peaks that alternate: static halves of the KV memory, and one ledger over all of it; time to
        the first token over load
kill    kill -9 of one of two engines under load: when its memory is the other's, and that the other goes on
steps   where a decode step's time goes, plain and elastic: methods and driver calls on the CPU, kernels on the GPU; in
        no table of results. bench_vllm_attention has attention alone, over other layouts

Parts can be run apart, as `single-plain,single-elastic`, `pair-static,pair-elastic`, `steps-plain,steps-elastic`, and
join in the folder of --work.
Needs vLLM; every engine is a process, and lives in it (VLLM_ENABLE_V1_MULTIPROCESSING=0).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import vllm_report  # noqa: E402

MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPTIONS = {
    "load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 4096, "max_num_seqs": 256, "seed": 0,
    "enable_prefix_caching": True, "disable_log_stats": True,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY",
                           "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 192, 256]},
}  # fmt: skip
PAIR_KV = 4 << 30  # bytes of KV cache that two engines share: some 60 sequences of 1k
LOADS = (4.0, 7.0, 10.0)  # requests a second of the engine that has its peak
PHASE = 7.0  # seconds of a peak
SLO = 1.0  # seconds to the first token
UNTIL = 2 * PHASE + 5  # seconds of a trace; what has no token by then has waited as long


class Bench:
    def __init__(self, work: Path) -> None:
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self.model = work / "model"
        self.model.mkdir(exist_ok=True)
        (self.model / "config.json").write_text(json.dumps(MODEL))

    def start(self, part: str, name: str, tasks: list[dict[str, Any]], elastic: bool, options: dict[str, Any],
              **settings: Any) -> subprocess.Popen[bytes]:  # fmt: skip
        folder = self.work / part
        folder.mkdir(exist_ok=True)
        for old in folder.glob(f"{name}.*"):
            old.unlink()
        pool = f"bench-{part}"
        order = {"model": str(self.model), "options": {**OPTIONS, **options}, "tasks": tasks, "elastic": elastic,
                 "pool": pool}  # fmt: skip
        (folder / f"{name}.order.json").write_text(json.dumps(order))
        environment = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1", "ELASTIKV_VLLM": str(int(elastic)),
        }  # fmt: skip
        if elastic:
            environment.update({f"ELASTIKV_VLLM_{key.upper()}": str(value) for key, value in settings.items()})
            environment.update(ELASTIKV_VLLM_POOL=pool, ELASTIKV_VLLM_NAME=name)
        log = (folder / f"{name}.log").open("wb")
        return subprocess.Popen([sys.executable, str(HERE / "vllm_worker.py"), str(folder), name], env=environment,
                                stdout=log, stderr=subprocess.STDOUT)  # fmt: skip

    def finish(self, part: str, **processes: subprocess.Popen[bytes]) -> dict[str, Any]:
        """Results by name; on a failure the end of the log, and SystemExit."""
        found = {}
        for name, process in processes.items():
            try:
                code = process.wait(timeout=170)
            except subprocess.TimeoutExpired:
                process.kill()
                code = -1
            if code != 0:
                for other in processes.values():
                    other.kill()
                print((self.work / part / f"{name}.log").read_text(errors="replace")[-6000:])
                raise SystemExit(f"{part}: the engine '{name}' ended with {code}")
            found[name] = json.loads((self.work / part / f"{name}.result.json").read_text())
        (self.work / f"{part}.json").write_text(json.dumps(found))
        return found

    def ready(self, part: str, *names: str, task: int, processes: list[subprocess.Popen[bytes]]) -> None:
        """Waits until these engines have come to a task, and opens it for all at once."""
        folder = self.work / part
        marks = [folder / (f"{name}.ready" if task == 0 else f"{name}.done{task - 1}") for name in names]
        while not all(mark.exists() for mark in marks):
            if any(process.poll() not in (None, 0) for process in processes):
                return  # finish() tells
            time.sleep(0.02)
        gate = folder / f"task{task}.go"
        gate.with_suffix(".tmp").write_text(str(time.time() + 0.2))
        gate.with_suffix(".tmp").rename(gate)

    # --- parts ---

    def single(self, elastic: bool) -> None:
        part = "single-elastic" if elastic else "single-plain"
        tasks = [
            {"do": "outputs", "requests": 256}, {"do": "outputs", "requests": 256},
            {"do": "steady", "requests": 128, "prompt": 512, "n": 256, "rounds": 3}, {"do": "idle"},
        ]  # fmt: skip
        options = {"gpu_memory_utilization": 0.5}
        if not (self.work / "warm.json").exists():  # the first engine on a machine compiles kernels for tens of seconds
            self.finish("warm", one=self.start("warm", "one", [], False, options))
        self.finish(part, one=self.start(part, "one", tasks, elastic, options))

    def steps(self, elastic: bool) -> None:
        part = "steps-elastic" if elastic else "steps-plain"
        tasks = [{"do": "steps", "requests": 128, "prompt": 512, "n": 256, "count": 100, "profile": 30}]
        self.finish(part, one=self.start(part, "one", tasks, elastic, {"gpu_memory_utilization": 0.5}))

    def pair(self, elastic: bool) -> None:
        part = "pair-elastic" if elastic else "pair-static"
        share = PAIR_KV if elastic else PAIR_KV // 2
        for gate in (self.work / part).glob("task*.go"):
            gate.unlink()
        processes = {}
        for i, name in enumerate(("a", "b")):
            tasks = [
                {"do": "trace", "wait": True, "arrivals": arrivals(load, i, seed), "until": UNTIL, "seed": seed}
                for seed, load in enumerate(LOADS)
            ]
            options = {"gpu_memory_utilization": 0.4, "kv_cache_memory_bytes": share}
            processes[name] = self.start(part, name, tasks, elastic, options, limit=PAIR_KV, other=0)
        for task in range(len(LOADS)):
            self.ready(part, *processes, task=task, processes=list(processes.values()))
        self.finish(part, **processes)

    def kill(self) -> None:
        part = "kill"
        for gate in (self.work / part).glob("task*.go"):
            gate.unlink()
        every = [(0.02 * n, 1024, 512) for n in range(200)]
        later = [(4.0 + 0.02 * n, 1024, 256) for n in range(200)]
        options = {"gpu_memory_utilization": 0.4, "kv_cache_memory_bytes": PAIR_KV}
        settings = {"limit": PAIR_KV, "other": 0, "prefix_cache": 0}
        processes = {
            name: self.start(part, name, [{"do": "trace", "wait": True, "arrivals": due, "until": 60.0, "seed": 3}],
                             True, options, **settings)
            for name, due in (("victim", every), ("other", later))
        }  # fmt: skip
        self.ready(part, *processes, task=0, processes=list(processes.values()))
        import elastikv

        time.sleep(3.0)
        victim = processes.pop("victim")
        ledger = elastikv.Ledger(next(name for name in elastikv.ledgers() if name.startswith(f"bench-{part}.")))
        held = sum(client.charged for client in ledger.clients() if client.pid == victim.pid)
        begin = time.perf_counter()
        os.kill(victim.pid, signal.SIGKILL)
        while any(client.pid == victim.pid for client in ledger.clients(refresh=False)):
            time.sleep(0.001)
            if time.perf_counter() - begin > 10:
                break
        seconds = time.perf_counter() - begin
        victim.wait()
        other = self.finish(part, **processes)["other"]["trace"][0]
        result = {
            "victim_held": held,
            "seconds": seconds,
            "other_peak": max(size for _, size in other["held"]),
            "other_served": sum(first is not None for first in other["first"]),
            "other_asked": len(later),
        }
        (self.work / "kill.json").write_text(json.dumps(result))


def arrivals(load: float, which: int, seed: int) -> list[tuple[float, int, int]]:
    """Poisson arrivals, most of them in this engine's phase, a tenth of the load in the other's."""
    chance = random.Random(100 * seed + which)
    found, at = [], 0.0
    while at < 2 * PHASE:
        rate = load if int(at / PHASE) == which else load / 10
        at += chance.expovariate(rate)
        found.append((at, 1024, 384))
    return found[:-1]


def collected(work: Path) -> dict[str, Any]:
    """What the parts in the folder say together."""

    def read(part: str) -> Any:
        path = work / f"{part}.json"
        return json.loads(path.read_text()) if path.exists() else None

    import torch
    import vllm

    result: dict[str, Any] = {"benchmark": "vllm", "torch": torch.__version__, "vllm": vllm.__version__, "slo": SLO}
    plain, elastic = read("single-plain"), read("single-elastic")
    if plain and elastic:
        result["single"] = vllm_report.single(plain["one"], elastic["one"])
    static, shared = read("pair-static"), read("pair-elastic")
    if static and shared:
        result["pair"] = vllm_report.pair(static, shared, list(LOADS), UNTIL, SLO)
    if killed := read("kill"):
        result["kill"] = killed
    if steps := {name: part["one"]["steps"][0] for name in ("plain", "elastic") if (part := read(f"steps-{name}"))}:
        result["steps"] = steps
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="single,pair,kill", help="what to run; '' only reports")
    parser.add_argument("--work", type=Path, help="folder of parts; kept")
    parser.add_argument("--json", help="write the results here, too")
    parser.add_argument("--picture", help="write the curve of 'pair' here (.png)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(asked.work or Path(temporary))
        parts = {
            "single-plain": lambda: bench.single(False), "single-elastic": lambda: bench.single(True),
            "steps-plain": lambda: bench.steps(False), "steps-elastic": lambda: bench.steps(True),
            "pair-static": lambda: bench.pair(False), "pair-elastic": lambda: bench.pair(True), "kill": bench.kill,
        }  # fmt: skip
        for section in filter(None, asked.sections.split(",")):
            chosen = [name for name in parts if name == section or name.startswith(f"{section}-")]
            if not chosen:
                parser.error(f"there is no section '{section}', but {', '.join(parts)}")
            for name in chosen:
                begin = time.perf_counter()
                parts[name]()
                print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
        result = collected(bench.work)
    vllm_report.print_tables(result)
    if asked.json:
        Path(asked.json).write_text(json.dumps(result, indent=1))
    if asked.picture and result.get("pair"):
        vllm_report.picture(result, asked.picture)


if __name__ == "__main__":
    main()
