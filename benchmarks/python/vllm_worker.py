"""One vLLM engine in a process of its own, as bench_vllm runs it: reads orders from a JSON file, writes what it saw.

An order is a list of tasks: {"do": "outputs" | "steady" | "look" | "steps" | "idle" | "sleep" | "trace", ...}; see
the functions of these names.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

BLOCK = 16


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


class Clock:
    """Calls of methods and seconds in them, those that they call included."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    def watch(self, owner: Any, *names: str) -> None:
        """Counts these methods of an object from now on, but for those that it has not."""
        for name in names:
            method = getattr(owner, name, None)
            if method is not None:
                setattr(owner, name, self._counted(f"{type(owner).__name__}.{name}", method))

    def _counted(self, name: str, method: Any) -> Any:
        self.calls[name], self.seconds[name] = 0, 0.0

        def counted(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*args, **options)
            finally:
                self.seconds[name] += time.perf_counter() - begin
                self.calls[name] += 1

        return counted

    def reset(self) -> None:
        for name in self.calls:
            self.calls[name], self.seconds[name] = 0, 0.0

    def table(self, steps: int) -> dict[str, list[float]]:
        """Calls and microseconds a step, by method."""
        return {name: [n / steps, self.seconds[name] * 1e6 / steps] for name, n in self.calls.items()}


class Tail:
    """What goes on in the longest steps: prompts that are computed, Python's collections, and our driver calls."""

    def __init__(self, engine: Any) -> None:
        self.core = engine.engine_core.engine_core
        self.memory = getattr(self.core.scheduler.kv_cache_manager.block_pool, "memory", None)
        self.steps: list[dict[str, float]] = []
        self.now: dict[str, float] = {}
        self.schedule, self.collecting = self.core.scheduler.schedule, 0.0

    def __enter__(self) -> Tail:
        self.core.scheduler.schedule = self._schedule
        gc.callbacks.append(self._collects)
        self.driver = self._driver()
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.core.scheduler.schedule = self.schedule
        gc.callbacks.remove(self._collects)

    def _schedule(self, *args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        planned = self.schedule(*args, **options)
        self.now["schedule_ms"] += (time.perf_counter() - begin) * 1e3
        self.now["tokens"] += planned.total_num_scheduled_tokens
        return planned

    def _collects(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self.collecting = time.perf_counter()
        else:
            self.now["collect_ms"] += (time.perf_counter() - self.collecting) * 1e3

    def _driver(self) -> tuple[int, float, int]:
        """Calls of the engine's pool, its worker's too, ms in them, and extents that the step itself has mapped."""
        if self.memory is None:
            return 0, 0.0, 0
        made = self.memory.model.stats().driver_calls.values()
        calls, ms = sum(each.count for each in made), sum(each.nanoseconds for each in made) / 1e6
        return calls, ms, self.memory.blocks.mapped_on_demand

    def begin(self) -> None:
        self.now = {"begin": time.perf_counter(), "schedule_ms": 0.0, "tokens": 0, "collect_ms": 0.0}

    def end(self) -> None:
        """A step is over, and the next begins."""
        self.now["ms"] = (time.perf_counter() - self.now["begin"]) * 1e3
        before, self.driver = self.driver, self._driver()
        made = (now - then for now, then in zip(self.driver, before))
        self.now["driver_calls"], self.now["driver_ms"], self.now["mapped_on_demand"] = made
        self.steps.append(self.now)
        self.begin()

    def longest(self, start: float, end: float, count: int = 8) -> list[dict[str, float]]:
        """Those that began from `start` on and before `end`, with the number of each since then."""
        within = [{**step, "step": i} for i, step in enumerate(s for s in self.steps if start <= s["begin"] < end)]
        found = sorted(within, key=lambda step: -step["ms"])[:count]
        return [{key: round(value, 3) for key, value in step.items() if key != "begin"} for step in found]


class Worker:
    """The engine, and its loop, step by step."""

    def __init__(self, folder: Path, name: str, order: dict[str, Any]) -> None:
        sys.modules.setdefault("xgrammar", mock.MagicMock())  # not needed, and does not import everywhere
        import torch
        from vllm import LLM, SamplingParams

        self.torch, self.folder, self.name, self.order = torch, folder, name, order
        self.sampling = lambda n: SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False)
        if order["elastic"]:
            import elastikv.vllm

            elastikv.vllm.register()  # as vLLM's entry point does, where the package is installed
        torch.zeros(1, device="cuda")
        begin = time.perf_counter()
        self.llm = LLM(model=order["model"], **order["options"])
        self.startup = time.perf_counter() - begin
        self.engine = self.llm.llm_engine
        self.number = 0
        self.ledger: Any = None
        if order["elastic"]:
            import elastikv

            names = elastikv.ledgers()
            self.ledger = elastikv.Ledger(next(name for name in names if name.startswith(order["pool"] + ".")))

    def kv_bytes(self) -> int:
        """Physical bytes of this engine's KV cache."""
        if self.ledger is not None:
            return sum(client.charged for client in self.ledger.clients(refresh=False) if client.pid == os.getpid())
        seen = {}
        runner = self.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        for cache in runner.kv_caches:
            storage = cache.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return sum(seen.values())

    def driver_calls(self) -> dict[str, tuple[int, float]]:
        """Of the engine's pool, since its start, by name: their number and ms in them."""
        if self.ledger is None:
            return {}
        memory = self.engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.memory
        made = memory.model.stats().driver_calls.items()
        return {name: (each.count, each.nanoseconds / 1e6) for name, each in made}

    def add(self, tokens: list[int], n: int) -> str:
        self.number += 1
        self.engine.add_request(str(self.number), {"prompt_token_ids": tokens}, self.sampling(n))
        return str(self.number)

    def run(self, tail: Tail | None = None) -> tuple[dict[str, list[int]], dict[str, list[float]]]:
        """Steps until all is done: the tokens and the times of tokens, by request."""
        tokens: dict[str, list[int]] = {}
        times: dict[str, list[float]] = {}
        while self.engine.has_unfinished_requests():
            self.note(self.engine.step(), tokens, times)
            if tail is not None:
                tail.end()
        return tokens, times

    def note(self, outputs: Any, tokens: dict[str, list[int]], times: dict[str, list[float]]) -> None:
        now = time.perf_counter()
        for output in outputs:
            ids = list(output.outputs[0].token_ids)
            fresh = len(ids) - len(tokens.get(output.request_id, []))
            tokens[output.request_id] = ids
            times.setdefault(output.request_id, []).extend([now] * fresh)

    # --- tasks ---

    def outputs(self, requests: int, seed: int = 1) -> dict[str, Any]:
        """Greedy tokens of a mixed set: many lengths, prefixes that are shared, twice so that they hit."""
        chance = random.Random(seed)
        shared = [[chance.randrange(10, 30000) for _ in range(BLOCK * 40)] for _ in range(4)]
        for _ in range(requests):
            front = shared[chance.randrange(4)][: BLOCK * chance.randrange(0, 41)]
            self.add([*front, *(chance.randrange(10, 30000) for _ in range(chance.randrange(4, 600)))],
                     chance.randrange(1, 160))  # fmt: skip
        tokens, _ = self.run()
        return {"tokens": [tokens[key] for key in sorted(tokens, key=int)]}

    def _round(self, requests: int, prompt: int, n: int, chance: random.Random, tail: Tail | None = None) -> Any:
        """Tokens a second, and when steps ended that had tokens for all requests."""
        for _ in range(requests):
            self.add([chance.randrange(10, 30000) for _ in range(prompt)], n)
        begin = time.perf_counter()
        if tail is not None:
            tail.begin()
        _, times = self.run(tail)
        rate = requests * n / (time.perf_counter() - begin)
        start = max(each[0] for each in times.values())
        end = min(each[-1] for each in times.values())
        return rate, sorted({each for one in times.values() for each in one if start <= each <= end})

    def steady(self, requests: int, prompt: int, n: int, seed: int) -> dict[str, Any]:
        """A round: tokens a second, ms between tokens once all requests run, and the KV cache's bytes then."""
        rate, steps = self._round(requests, prompt, n, random.Random(7 + seed))
        return {"tokens_per_second": rate, "gaps_ms": [(b - a) * 1e3 for a, b in itertools.pairwise(steps)],
                "kv_bytes": self.kv_bytes()}  # fmt: skip

    def look(self, requests: int, prompt: int, n: int, rounds: int) -> list[dict[str, Any]]:
        """What goes on in the longest steps of a round, before all requests run and then. To look costs time."""
        found, chance = [], random.Random(17)
        for _ in range(rounds):
            with Tail(self.engine) as tail:
                _, steps = self._round(requests, prompt, n, chance, tail)
            found.append({"filling": tail.longest(0.0, steps[0]), "all run": tail.longest(steps[0], steps[-1])})
        return found

    def steps(self, requests: int, prompt: int, n: int, count: int, profile: int) -> dict[str, Any]:
        """Where a decode step's time goes: `count` steps on the CPU by method, then `profile` of them on the GPU."""
        core = self.engine.engine_core.engine_core
        manager = core.scheduler.kv_cache_manager
        pool, clock = manager.block_pool, Clock()
        memory = getattr(pool, "memory", None)
        clock.watch(core.scheduler, "schedule", "update_from_output")
        clock.watch(core.model_executor, "execute_model", "sample_tokens")
        clock.watch(manager, "allocate_slots")
        clock.watch(pool, "get_new_blocks", "free_blocks", "touch", "get_num_free_blocks", "secure", "end_step")
        if memory is not None:
            clock.watch(memory, "try_allocate", "free", "available")
        chance = random.Random(11)
        for _ in range(requests):
            self.add([chance.randrange(10, 30000) for _ in range(prompt)], n)
        tokens: dict[str, list[int]] = {}
        times: dict[str, list[float]] = {}
        while len(tokens) < requests or min(len(each) for each in tokens.values()) < 8:
            self.note(self.engine.step(), tokens, times)
        calls = memory.model.stats().driver_calls if memory is not None else {}
        clock.reset()
        gaps = []
        for _ in range(count):
            begin = time.perf_counter()
            self.engine.step()
            gaps.append(time.perf_counter() - begin)
        after = memory.model.stats().driver_calls if memory is not None else {}
        found = {
            "methods": clock.table(count),
            "driver_calls": {
                name: [
                    (after[name].count - each.count) / count,
                    (after[name].nanoseconds - each.nanoseconds) / 1e3 / count,
                ]
                for name, each in calls.items()
            },
            "step_ms": [percentile(gaps, share) * 1e3 for share in (0.1, 0.5, 0.9, 0.99)],
            "kernels": self.kernels(profile),
        }
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return found

    def kernels(self, count: int) -> dict[str, list[float]] | str:
        """Calls and microseconds a step of the GPU, by kernel, longest first; why not, where it can't be profiled."""
        try:
            with self.torch.profiler.profile(activities=[self.torch.profiler.ProfilerActivity.CUDA]) as profile:
                for _ in range(count):
                    self.engine.step()
                self.torch.cuda.synchronize()
            found = {
                each.key: [each.count / count, each.self_device_time_total / count]
                for each in profile.key_averages()
                if each.self_device_time_total > 0
            }
        except Exception as error:  # of CUPTI, which not every machine lets in
            return str(error)
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    def idle(self) -> dict[str, Any]:
        """KV bytes after a burst, and how soon they are gone once its prefixes are."""
        kept = self.kv_bytes()
        begin = time.perf_counter()
        while not self.llm.reset_prefix_cache() and time.perf_counter() - begin < 3:
            self.engine.step()  # what the last step holds is freed with the next
        while (now := self.kv_bytes()) > 64 << 20 and time.perf_counter() - begin < 3:
            time.sleep(0.002)
        return {"after_burst": kept, "without_prefixes": now, "seconds": time.perf_counter() - begin}

    def sleep(self, requests: int, prompt: int, n: int) -> dict[str, Any]:
        """The same requests twice, the second time with a sleep by order amid them: bytes, seconds, tokens."""
        chance = random.Random(13)
        prompts = [[chance.randrange(10, 30000) for _ in range(prompt)] for _ in range(requests)]
        answers = []
        for asleep in (False, True):
            numbers = [self.add(each, n) for each in prompts]
            tokens: dict[str, list[int]] = {}
            times: dict[str, list[float]] = {}
            while asleep and (len(tokens) < requests or min(len(each) for each in tokens.values()) < n // 4):
                self.note(self.engine.step(), tokens, times)
            if asleep:
                held, begin = self.kv_bytes(), time.perf_counter()
                self.ledger.sleep(self.name, pid=os.getpid())
                slept, left = time.perf_counter(), self.kv_bytes()
                self.ledger.wake(self.name, pid=os.getpid())
                woke = time.perf_counter()
            while self.engine.has_unfinished_requests():
                self.note(self.engine.step(), tokens, times)
            answers.append([tokens[number] for number in numbers])
        return {
            "requests": requests, "equal": sum(a == b for a, b in zip(*answers)), "held": held, "left": left,
            "sleep_s": slept - begin, "wake_s": woke - slept,
        }  # fmt: skip

    def trace(self, begin: float, arrivals: list[tuple[float, int, int]], until: float, seed: int) -> dict[str, Any]:
        """Requests (second, prompt, n) as they come: seconds to the first token, None if not reached."""
        chance = random.Random(seed)
        due = sorted(arrivals)
        came: dict[str, float] = {}
        tokens: dict[str, list[int]] = {}
        times: dict[str, list[float]] = {}
        held = []
        before = self.driver_calls()
        offset = time.perf_counter() - time.time()
        start = begin + offset
        while time.perf_counter() < start + until:
            now = time.perf_counter() - start
            while due and due[0][0] <= now:
                at, prompt, n = due.pop(0)
                came[self.add([chance.randrange(10, 30000) for _ in range(prompt)], n)] = at
            if self.engine.has_unfinished_requests():
                self.note(self.engine.step(), tokens, times)
            elif due:
                time.sleep(min(0.005, max(0.0, due[0][0] - now)))
            else:
                break
            if not held or now - held[-1][0] > 0.1:
                held.append((now, self.kv_bytes()))
        if self.engine.has_unfinished_requests():
            self.engine.abort_request(list(came))
            while self.engine.has_unfinished_requests():
                self.engine.step()
        first = [times[key][0] - start - at if key in times else None for key, at in came.items()]
        calls = {
            name: [count - before[name][0], (ms - before[name][1]) * 1e3 / max(1, count - before[name][0])]
            for name, (count, ms) in self.driver_calls().items()
        }
        return {"first": first, "arrived": list(came.values()), "held": held, "driver_calls": calls}


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    order = json.loads((folder / f"{name}.order.json").read_text())
    worker = Worker(folder, name, order)
    (folder / f"{name}.ready").write_text(str(worker.startup))
    results: dict[str, Any] = {"startup": worker.startup, "idle_at_start": worker.kv_bytes()}
    for number, task in enumerate(order["tasks"]):
        kind = task.pop("do")
        if task.pop("wait", False):
            gate = folder / f"{name}.task{number}.go"
            while not gate.exists():
                time.sleep(0.01)
            if kind == "trace":  # which several engines begin together
                task["begin"] = float(gate.read_text())
        results.setdefault(kind, []).append(getattr(worker, kind)(**task))
        (folder / f"{name}.done{number}").write_text("")
    (folder / f"{name}.result.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
