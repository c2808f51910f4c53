#!/usr/bin/env python3
"""vLLM with elastikv's plugin beside plain vLLM, on one GPU, with a random model of a billion weights.

    benchmarks/python/bench_vllm.py [--sections single,large,pair,trio,kill] [--json FILE] [--picture FILE]

single  a plain engine and an elastic one, each running while the other waits: the tokens of 256 mixed requests, then
        rounds by turns for throughput and time between tokens; startup, KV memory when idle, how soon a burst's is back
large   the rounds of `single` with eight billion weights, where a step waits for the GPU: with one billion it waits for
        Python, whose speed on a machine that others use, too, is theirs to change
pair    two engines with peaks one after the other: static halves of the KV memory, and one ledger over all of it;
        time to the first token, and requests that have it in time, over load
trio    the same with three engines and thirds
kill    kill -9 of one of two engines under load: when its memory is the other's, and that the other goes on
sleep   one engine, elastic: `elastikv sleep` and `wake` amid its requests; in no table of results
steps   where a decode step's time goes once all memory is in use, plain and elastic: methods and driver calls on CPU,
        kernels on GPU; in no table of results. bench_vllm_attention has attention alone, over other layouts

Parts can be run apart, as `pair-static,pair-elastic`, `trio-static,trio-elastic`, `steps-plain,steps-elastic`, and
join in the folder of --work. A part of `pair` or `trio` takes SPAN + REST seconds a load, and the engines' start.
Needs vLLM; every engine is a process, and lives in it (VLLM_ENABLE_V1_MULTIPROCESSING=0).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
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
LARGE = {**MODEL, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "tie_word_embeddings": False}  # fmt: skip
OPTIONS = {
    "load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 4096, "max_num_seqs": 256, "seed": 0,
    "enable_prefix_caching": True, "disable_log_stats": True,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY",
                           "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 192, 256]},
}  # fmt: skip
ALONE = {"gpu_memory_utilization": 0.4}  # an engine beside which only its like is
SHARED_KV = 4 << 30  # bytes of KV cache that the engines have together: some 50 sequences of PROMPT + ANSWER tokens
PROMPT, ANSWER = 1024, 384  # tokens of each request
# Requests a second of the engine that has its peak: from where each does with its static share to where all of the
# memory is just enough.
LOADS = {"pair": (6.0, 12.0, 17.0, 22.0), "trio": (5.0, 9.0, 14.0, 20.0)}
ENGINES = {"pair": ("a", "b"), "trio": ("a", "b", "c")}
SPAN = 12.0  # seconds in which requests come; an equal part of them is the peak of each engine
REST = 3.0  # seconds more to serve them
SLO = 0.5  # seconds to the first token
# Pairs of engines: on which cores one comes to run, and where its memory lies, is chance.
STARTS = {"single": 2, "large": 2}
ROUNDS = {"single": 14, "large": 4}  # by each engine of a pair; the first pair's outputs fill a part of its memory, too
FILLING = 9  # rounds until all memory is in use, by answers or by what is kept of their prefixes
STEADY = {"requests": 128, "prompt": 512, "n": 256}  # a round


class Bench:
    def __init__(self, work: Path) -> None:
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self.model, self.large_model = work / "model", work / "large-model"
        for folder, config in ((self.model, MODEL), (self.large_model, LARGE)):
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text(json.dumps(config))

    def start(self, part: str, name: str, tasks: list[dict[str, Any]], elastic: bool, options: dict[str, Any],
              **settings: Any) -> subprocess.Popen[bytes]:  # fmt: skip
        folder = self.work / part
        folder.mkdir(exist_ok=True)
        for old in folder.glob(f"{name}.*"):
            old.unlink()
        pool = f"bench-{part}"
        model = self.large_model if part.startswith("large") else self.model
        order = {"model": str(model), "options": {**OPTIONS, **options}, "tasks": tasks, "elastic": elastic,
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
        self.keep(part, found)
        return found

    def keep(self, part: str, found: dict[str, Any]) -> None:
        (self.work / f"{part}.json").write_text(json.dumps(found))

    def ready(self, part: str, *names: str, task: int, processes: list[subprocess.Popen[bytes]]) -> None:
        """Waits until these engines have come to a task, and opens it for all at once."""
        folder = self.work / part
        self.await_task(part, *names, task=task - 1, processes=processes)
        begin = str(time.time() + 0.2)
        for name in names:
            gate = folder / f"{name}.task{task}.go"
            gate.with_suffix(".tmp").write_text(begin)
            gate.with_suffix(".tmp").rename(gate)

    def await_task(self, part: str, *names: str, task: int, processes: list[subprocess.Popen[bytes]]) -> None:
        """Waits until these engines have done a task, or have started, which is -1."""
        marks = [self.work / part / (f"{name}.ready" if task < 0 else f"{name}.done{task}") for name in names]
        while not all(mark.exists() for mark in marks):
            if any(process.poll() not in (None, 0) for process in processes):
                return  # finish() tells
            time.sleep(0.02)

    # --- parts ---

    def single(self) -> None:
        self.by_turns("single", [{"do": "outputs", "requests": 256}] * 2, [
            {"do": "look", "rounds": 2, **STEADY}, {"do": "idle"},
        ])  # fmt: skip

    def large(self) -> None:
        self.by_turns("large", [], [])

    def by_turns(self, part: str, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
        """Pairs of a plain engine and an elastic one: rounds, and around those of the first pair other tasks."""
        if not (self.work / "warm.json").exists():  # the first engine on a machine compiles kernels for tens of seconds
            self.finish("warm", one=self.start("warm", "one", [], False, ALONE))
        found: dict[str, Any] = {}
        for start in range(STARTS[part]):
            rounds = [{"do": "steady", "seed": start * ROUNDS[part] + n, **STEADY} for n in range(ROUNDS[part])]
            pair = self.pair_by_turns(part, rounds if found else [*before, *rounds, *after])
            for name, one in pair.items():
                if name in found:
                    found[name]["steady"] += one["steady"]
                else:
                    found[name] = one
        self.keep(part, found)

    def pair_by_turns(self, part: str, tasks: list[dict[str, Any]]) -> dict[str, Any]:
        pair, tasks = f"{part}-pair", [{**task, "wait": True} for task in tasks]
        processes = {}
        for name in ("plain", "elastic"):
            processes[name] = self.start(pair, name, tasks, name == "elastic", ALONE)
            self.await_task(pair, name, task=-1, processes=list(processes.values()))
        for number in range(len(tasks)):
            # By turns, and neither always first: a machine that is slower for a while is so for both.
            for name in sorted(processes, reverse=number % 2 == 0):
                self.ready(pair, name, task=number, processes=list(processes.values()))
                self.await_task(pair, name, task=number, processes=list(processes.values()))
        return self.finish(pair, **processes)

    def steps(self, elastic: bool) -> None:
        part = "steps-elastic" if elastic else "steps-plain"
        tasks = [{"do": "steady", "seed": n, **STEADY} for n in range(FILLING)]
        tasks += [{"do": "steps", **STEADY, "count": 100, "profile": 30}]
        self.finish(part, one=self.start(part, "one", tasks, elastic, ALONE))

    def sleep(self) -> None:
        tasks = [{"do": "sleep", "requests": 64, "prompt": 512, "n": 128}]
        self.finish("sleep", one=self.start("sleep", "one", tasks, True, {"gpu_memory_utilization": 0.5}))

    def sharing(self, group: str, elastic: bool) -> None:
        """The engines of `pair` or `trio`, on static shares or on one ledger, at one load after the other."""
        part = f"{group}-{'elastic' if elastic else 'static'}"
        names, loads = ENGINES[group], LOADS[group]
        share = SHARED_KV if elastic else SHARED_KV // len(names)
        processes = {}
        for i, name in enumerate(names):
            tasks = [
                {"do": "trace", "wait": True, "arrivals": arrivals(load, i, len(names), seed), "until": SPAN + REST,
                 "seed": seed}
                for seed, load in enumerate(loads)
            ]  # fmt: skip
            options = {"gpu_memory_utilization": 0.4, "kv_cache_memory_bytes": share}
            processes[name] = self.start(part, name, tasks, elastic, options, limit=SHARED_KV, other=0)
        for task in range(len(loads)):
            self.ready(part, *processes, task=task, processes=list(processes.values()))
        self.finish(part, **processes)

    def kill(self) -> None:
        part = "kill"
        every = [(0.02 * n, 1024, 512) for n in range(200)]
        later = [(4.0 + 0.02 * n, 1024, 256) for n in range(200)]
        options = {"gpu_memory_utilization": 0.4, "kv_cache_memory_bytes": SHARED_KV}
        settings = {"limit": SHARED_KV, "other": 0, "prefix_cache": 0}
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
        self.keep(part, result)


def arrivals(load: float, which: int, engines: int, seed: int) -> list[tuple[float, int, int]]:
    """Requests (second, prompt, answer) of one of so many engines: Poisson, at `load` a second in its own part of SPAN
    and at a tenth of that in the others'."""
    chance = random.Random(100 * seed + which)
    found, at = [], chance.expovariate(load)
    while at < SPAN:
        if int(at / SPAN * engines) == which or chance.random() < 0.1:
            found.append((at, PROMPT, ANSWER))
        at += chance.expovariate(load)
    return found


def collected(work: Path) -> dict[str, Any]:
    """What the parts in the folder say together."""

    def read(part: str) -> Any:
        path = work / f"{part}.json"
        return json.loads(path.read_text()) if path.exists() else None

    result: dict[str, Any] = {"benchmark": "vllm", "slo": SLO}
    if one := read("single"):
        result["single"] = vllm_report.single(one["plain"], one["elastic"])
    if one := read("large"):
        result["large"] = vllm_report.rounds(one["plain"], one["elastic"])
    for group, loads in LOADS.items():
        static, shared = read(f"{group}-static"), read(f"{group}-elastic")
        if static and shared:
            result[group] = vllm_report.sharing(static, shared, list(loads), SPAN + REST, SLO)
    if killed := read("kill"):
        result["kill"] = killed
    if slept := read("sleep"):
        result["sleep"] = slept["one"]["sleep"][0]
    if steps := {name: part["one"]["steps"][0] for name in ("plain", "elastic") if (part := read(f"steps-{name}"))}:
        result["steps"] = steps
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="single,large,pair,trio,kill", help="what to run; '' only reports")
    parser.add_argument("--work", type=Path, help="folder of parts; kept")
    parser.add_argument("--json", help="write the results here, too")
    parser.add_argument("--picture", help="write the curves of 'pair' and 'trio' here (.png)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(asked.work or Path(temporary))
        parts = {
            "single": bench.single, "large": bench.large,
            "steps-plain": lambda: bench.steps(False), "steps-elastic": lambda: bench.steps(True),
            "pair-static": lambda: bench.sharing("pair", False), "pair-elastic": lambda: bench.sharing("pair", True),
            "trio-static": lambda: bench.sharing("trio", False), "trio-elastic": lambda: bench.sharing("trio", True),
            "kill": bench.kill, "sleep": bench.sleep,
        }  # fmt: skip
        asked_for = [section for section in asked.sections.split(",") if section]
        chosen = {each: [name for name in parts if name == each or name.startswith(f"{each}-")] for each in asked_for}
        for section, names in chosen.items():
            if not names:
                parser.error(f"there is no section '{section}', but {', '.join(parts)}")
        for name in itertools.chain.from_iterable(chosen.values()):
            begin = time.perf_counter()
            parts[name]()
            print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
        result = collected(bench.work)
        result.update(torch=version("torch"), vllm=version("vllm"))
    vllm_report.print_tables(result)
    if asked.json:
        Path(asked.json).write_text(json.dumps(result, indent=1))
    if asked.picture and any(result.get(group) for group in LOADS):
        vllm_report.picture(result, asked.picture)


if __name__ == "__main__":
    main()
