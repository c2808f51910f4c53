#!/usr/bin/env python3
"""Serving a trace: the slots engine against transformers' ways, and one pool against static shares, in one run.

    benchmarks/python/bench_serving.py [--quick] [--json FILE] [--picture FILE] [--trace AZURE.csv]    # on a GPU
    benchmarks/python/bench_serving.py --device cpu --tiny          # the same code with a toy model, to see it run

A Llama of 16 layers with random weights (hidden 4096, 32/8 heads of 128) answers a trace in real time: requests come
when the trace says, whether or not the earlier ones are done. Time to the first token counts from then. Ways:

    engine          elastikv.serving.Engine
    continuous      transformers' own continuous batching, as it comes
    static batches  model.generate with a DynamicCache on batches of those who have come

Then three models (three engines; the weights are shared, the caches are not) that are busy in turn answer the trace out
of one pool, and out of static thirds of the same memory, at several limits: shares of what they take where it is ample.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

import elastikv
from elastikv.hf.attention import NAME
from elastikv.plots.serving import plot_first_tokens
from elastikv.server.models import load_model
from elastikv.serving import Engine
from elastikv.serving.runner import Round
from elastikv.trace import DEFAULT_TRACE, Outcome, TraceRequest, model_of, read_trace, scale_trace, summary

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import serving_report

MAX_BATCH = 64
MODELS = 3


@dataclass(frozen=True)
class Job:
    due: float
    prompt: list[int]
    wanted: int
    model: int


@dataclass(frozen=True)
class Load:
    """A trace, scaled: its first so many requests, as many copies of them laid over one another, times and tokens
    multiplied."""

    requests: int
    copies: int
    time_scale: float
    token_scale: float


@dataclass(frozen=True)
class Plan:
    """What runs: a load that fills one model, and one for three that leaves each of them quiet times. limits: shares of
    what the three take where memory is ample."""

    source: str
    dtype: torch.dtype
    one: Load
    three: Load
    limits: tuple[float, ...]


TINY = Plan("random:tiny", torch.float32, Load(16, 1, 0.02, 0.25), Load(24, 3, 0.02, 1.0), (0.6, 0.4))
QUICK = Plan("random:large", torch.bfloat16, Load(24, 2, 0.03, 4.0), Load(24, 4, 0.1, 4.0), (0.5,))
FULL = Plan("random:large", torch.bfloat16, Load(240, 8, 0.06, 4.0), Load(240, 6, 0.1, 4.0), (0.8, 0.6, 0.4, 0.25))
#: Seconds of the trace, as it is written, after which another of the three models is the busy one.
SHIFT = 15.0


def make_jobs(requests: Sequence[TraceRequest], load: Load, vocabulary: int, models: int) -> list[Job]:
    """The prompts are random. Copies come within a second of the trace of one another."""
    rng = random.Random(7)
    jobs = []
    for one in scale_trace(requests, token_scale=load.token_scale, max_requests=load.requests):
        for _ in range(load.copies):
            arrival = one.arrival + rng.random()
            prompt = [rng.randrange(3, vocabulary) for _ in range(one.context_tokens)]
            model = model_of(len(jobs), arrival, models=models, shift=SHIFT)
            jobs.append(Job(arrival * load.time_scale, prompt, one.generated_tokens, model))
    return sorted(jobs, key=lambda job: job.due)


def wait_until(moment: float) -> None:
    time.sleep(max(moment - time.perf_counter(), 0.0))


# ---- ways to serve


def serve_engines(engines: Sequence[Engine], jobs: Sequence[Job], peaks: list[int]) -> list[Outcome]:
    """A job of model i goes to engine i; those that an engine refuses, as they can never fit, have no end.

    To peaks comes the most that was charged at the end of a step.
    """
    together, coming = Round(engines), list(jobs)
    requests: list[Any] = []
    peaks.append(0)
    start = time.perf_counter()
    while coming or not together.idle:
        if together.idle:
            wait_until(start + coming[0].due)
        while coming and start + coming[0].due <= time.perf_counter():
            job = coming.pop(0)
            try:
                requests.append(engines[job.model].submit(job.prompt, max_new_tokens=job.wanted))
            except elastikv.OutOfPhysicalMemory:
                requests.append(None)
        together.advance()
        peaks[-1] = max(peaks[-1], sum(engine.handle.quota().charged for engine in engines))

    def outcome(job: Job, request: Any) -> Outcome:
        if request is None or request.first_token is None:
            return Outcome(job.due, None, None, 0, job.model)
        return Outcome(job.due, request.first_token - start, request.ended - start, len(request.answer), job.model)

    return [outcome(*pair) for pair in zip(jobs, requests)]


def next_result(manager: Any) -> Any:
    """None where there is none within a second. RuntimeError once the thread that computes them has died."""
    done = manager.get_result(timeout=1.0)
    if done is None and not manager.is_running():
        raise RuntimeError("the thread of transformers' continuous batching has died")
    return done


def serve_continuous(model: Any, jobs: Sequence[Job]) -> list[Outcome]:
    settings = GenerationConfig(max_new_tokens=max(job.wanted for job in jobs), do_sample=False, eos_token_id=-1)
    with model.continuous_batching_context_manager(generation_config=settings) as manager:
        warm = [manager.add_request(jobs[0].prompt, max_new_tokens=4, eos_token_id=-1) for _ in range(4)]
        while warm:
            done = next_result(manager)
            warm = [one for one in warm if done is None or one != done.request_id]
        start = time.perf_counter()
        names = {}
        for index, job in enumerate(jobs):
            wait_until(start + job.due)
            name = manager.add_request(job.prompt, max_new_tokens=job.wanted, record_timestamps=True, eos_token_id=-1)
            names[name] = index
        outcomes: dict[int, Outcome] = {}
        while len(outcomes) < len(jobs):
            done = next_result(manager)
            if done is None:
                continue
            index = names[done.request_id]
            if done.error or not done.timestamps:
                raise RuntimeError(f"continuous batching failed: {done.error}")
            first, end = done.timestamps[0] - start, done.timestamps[-1] - start
            outcomes[index] = Outcome(jobs[index].due, first, end, len(done.generated_tokens), jobs[index].model)
    return [outcomes[index] for index in range(len(jobs))]


class Marks(StoppingCriteria):
    """When each token of a batch came; never stops it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if input_ids.is_cuda and not self.times:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def serve_batches(model: Any, jobs: Sequence[Job]) -> list[Outcome]:
    """Whoever has come makes the next batch, which runs to the end of its longest answer."""
    outcomes: list[Outcome] = []
    start = time.perf_counter()
    left = list(jobs)
    while left:
        wait_until(start + left[0].due)
        now = time.perf_counter() - start
        batch = [job for job in left[:MAX_BATCH] if job.due <= now]
        left = left[len(batch) :]
        width = max(len(job.prompt) for job in batch)
        tokens = torch.tensor([[0] * (width - len(job.prompt)) + job.prompt for job in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in batch])
        marks, longest = Marks(), max(job.wanted for job in batch)
        model.generate(
            tokens, attention_mask=mask.to(model.device), do_sample=False, pad_token_id=0, eos_token_id=None,
            max_new_tokens=longest, min_new_tokens=longest, stopping_criteria=StoppingCriteriaList([marks]),
        )  # fmt: skip
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        end = time.perf_counter() - start
        outcomes += [Outcome(job.due, marks.times[0] - start, end, job.wanted, job.model) for job in batch]
    return outcomes


# ---- the run


def make_engines(
    model: Any, pool: elastikv.SharedMemoryPool, jobs: Sequence[Job], count: int, share: int | None = None
) -> list[Engine]:
    longest = max(len(job.prompt) + job.wanted for job in jobs)
    options = {"max_batch": MAX_BATCH, "max_tokens": -(-longest // 256) * 256, "prefix_entries": 0}
    addresses = Engine.addresses(model.config, model.dtype, **options)
    engines = []
    for index in range(count):
        handle = pool.register_model(f"model-{index}", addresses, limit=share)
        engines.append(Engine(model, handle, clock=time.perf_counter, **options))
    return engines


def warm(engines: Sequence[Engine], jobs: Sequence[Job]) -> None:
    """Every batch size once, so that the graphs are there."""
    count = min(MAX_BATCH, len(jobs))
    for engine in engines:
        for index in range(count):
            engine.submit(jobs[index].prompt[:64], max_new_tokens=2 + 2 * index)
        together = Round([engine])
        while not together.idle:
            together.advance()


def with_engines(
    model: Any, jobs: Sequence[Job], *, limit: int, count: int, share: int | None = None
) -> tuple[list[Outcome], dict[str, Any]]:
    with elastikv.SharedMemoryPool(limit, str(model.device)) as pool:
        engines = make_engines(model, pool, jobs, count, share)
        warm(engines, jobs)
        for engine in engines:
            engine.handle.trim()
        peaks: list[int] = []
        outcomes = serve_engines(engines, jobs, peaks)
        counts = [engine.counts for engine in engines]
        facts = {
            "limit_bytes": limit,
            "page_bytes": pool.page_size,
            "peak_bytes": peaks[0],
            "pauses": sum(one.pauses for one in counts),
            "restarts": sum(one.restarts for one in counts),
            "graphs": sum(engine.graphs for engine in engines),
        }
        for engine in engines:
            engine.close()
        return outcomes, facts


def describe(jobs: Sequence[Job]) -> dict[str, float]:
    return {
        "requests": len(jobs),
        "prompt_tokens": sum(len(job.prompt) for job in jobs),
        "answer_tokens": sum(job.wanted for job in jobs),
        "last_due_seconds": jobs[-1].due,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="a toy model")
    parser.add_argument("--quick", action="store_true", help="fewer requests and limits: 90 s on an H100")
    parser.add_argument("--trace", type=Path, default=DEFAULT_TRACE, help="in the format of the Azure dataset")
    parser.add_argument("--time-scale", type=float, default=1.0, help="multiplies the trace's times once more")
    parser.add_argument("--token-scale", type=float, default=1.0, help="multiplies the trace's token counts once more")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    plan = TINY if arguments.tiny else QUICK if arguments.quick else FULL
    requests = scale_trace(
        read_trace(arguments.trace), time_scale=arguments.time_scale, token_scale=arguments.token_scale
    )
    if arguments.tiny:
        torch.set_num_threads(1)
    model, _ = load_model(plan.source, device=arguments.device, dtype=plan.dtype)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    alone = make_jobs(requests, plan.one, model.config.vocab_size, 1)
    jobs = make_jobs(requests, plan.three, model.config.vocab_size, MODELS)
    memory = 1 << 30 if arguments.device == "cpu" else torch.cuda.mem_get_info()[0] // 2
    single: dict[str, list[Outcome]] = {}
    facts: dict[str, Any] = {}
    not_run: dict[str, str] = {}

    def engine() -> list[Outcome]:
        outcomes, facts["engine"] = with_engines(model, alone, limit=memory, count=1)
        return outcomes

    ways: dict[str, tuple[str, Callable[[], list[Outcome]]]] = {
        "engine": (NAME, engine),
        "continuous": ("sdpa", lambda: serve_continuous(model, alone)),
        "static batches": ("sdpa", lambda: serve_batches(model, alone)),
    }
    for name, (attention, way) in ways.items():
        model.set_attn_implementation(attention)
        if name == "static batches":
            serve_batches(model, [Job(0.0, alone[0].prompt, 2, 0)])
        try:
            single[name] = way()
        except Exception as failed:  # transformers' interfaces for serving change from version to version
            if name == "engine":
                raise
            not_run[name] = f"{type(failed).__name__}: {failed}"
            print(f"  {name:16} could not be run: {not_run[name]}", flush=True)
            continue
        print(f"  {name:16} {serving_report.line(summary(single[name]))}", flush=True)
        gc.collect()

    model.set_attn_implementation(NAME)
    shares: list[dict[str, Any]] = []
    panels = {"one model": single}
    ample, ample_facts = with_engines(model, jobs, limit=memory, count=MODELS)
    print(f"  {'ample':16} {serving_report.line(summary(ample))}", flush=True)
    for part in plan.limits:
        unit = MODELS * ample_facts["page_bytes"]
        limit = max(int(ample_facts["peak_bytes"] * part) // unit, 1) * unit
        both: dict[str, list[Outcome]] = {}
        point: dict[str, Any] = {"share_of_ample_peak": part, "limit_bytes": limit}
        for name, third in (("pool", None), ("static thirds", limit // MODELS)):
            both[name], point[name] = with_engines(model, jobs, limit=limit, count=MODELS, share=third)
            point[name].update(summary(both[name]))
            print(f"  {part:4.2f} {name:11} {serving_report.line(point[name])}", flush=True)
        shares.append(point)
        panels[f"three models, {limit / (1 << 20):.4g} MiB"] = both

    result = {
        "benchmark": "serving",
        "torch": torch.__version__,
        "device": arguments.device,
        "model": plan.source,
        "trace": arguments.trace.name,
        "one": describe(alone),
        "three": describe(jobs),
        "ways": {name: {**summary(outcomes), **facts.get(name, {})} for name, outcomes in single.items()},
        "not_run": not_run,
        "ample": {**summary(ample), **ample_facts},
        "shares": shares,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.picture:
        plot_first_tokens(arguments.picture, panels)
    serving_report.print_tables(result)
    found = serving_report.bars(result)
    for what, value, bar, holds in found:
        print(f"  {'ok  ' if holds else 'MISS'} {what} {bar:g}: {value:.3g}")
    return 0 if arguments.tiny or all(holds for *_, holds in found) else 1


if __name__ == "__main__":
    sys.exit(main())
