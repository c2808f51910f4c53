"""The parts of bench_serving, each run in a process of its own: what loads they put on which models."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from serving_ways import Job, make_engines, serve_batches, serve_continuous, serve_engines, warm

import elastikv
import serving_report
from elastikv.hf.attention import NAME
from elastikv.hf.geometry import kv_geometry
from elastikv.server.models import load_model
from elastikv.serving import Engine
from elastikv.trace import DEFAULT_TRACE, TraceRequest, model_of, read_trace, scale_trace

MODELS = 3
PAGE = 2 << 20
#: Seconds of the trace, as it is written, after which another of the three models is the busy one.
SHIFT = 15.0


@dataclass(frozen=True)
class Load:
    """A trace, scaled: its first so many requests, as many copies of them laid over one another, times and tokens
    multiplied."""

    requests: int
    copies: int
    time_scale: float
    token_scale: float
    answer_scale: float = 1.0  # on the answers, besides


@dataclass(frozen=True)
class Point:
    """A load on three models. in_turn: each has its busy time; else all are busy at once."""

    copies: int
    in_turn: bool = True
    answer_scale: float = 1.0

    @property
    def series(self) -> str:
        return "busy in turn" + (", long answers" if self.answer_scale > 1 else "") if self.in_turn else "busy at once"


#: The most telling first: those at the end are for longer budgets.
POINTS = (
    Point(4), Point(2), Point(4, in_turn=False), Point(8), Point(1), Point(4, answer_scale=3.0), Point(6),
    Point(8, in_turn=False), Point(2, answer_scale=3.0), Point(3), Point(2, in_turn=False), Point(12),
)  # fmt: skip


def make_jobs(
    requests: Sequence[TraceRequest], load: Load, vocabulary: int, models: int, in_turn: bool = True
) -> list[Job]:
    """The prompts are random. Copies come within a second of the trace of one another."""
    rng = random.Random(7)
    jobs: list[Job] = []
    for one in scale_trace(requests, token_scale=load.token_scale, max_requests=load.requests):
        for _ in range(load.copies):
            arrival = one.arrival + rng.random()
            prompt = [rng.randrange(3, vocabulary) for _ in range(one.context_tokens)]
            model = model_of(len(jobs), arrival, models=models, shift=SHIFT) if in_turn else len(jobs) % models
            wanted = max(round(one.generated_tokens * load.answer_scale), 2)
            jobs.append(Job(arrival * load.time_scale, prompt, wanted, model))
    return sorted(jobs, key=lambda job: job.due)


def describe(jobs: Sequence[Job]) -> dict[str, Any]:
    return {
        "requests": len(jobs),
        "prompt_tokens": sum(len(job.prompt) for job in jobs),
        "answer_tokens": sum(job.wanted for job in jobs),
        "last_due_seconds": jobs[-1].due,
    }


def share(engines: Sequence[Engine], jobs: Sequence[Job], most: int, until: float) -> dict[str, Any]:
    """The engines' row where each may hold so many bytes at most, and nothing is left of an earlier run."""
    for engine in engines:
        engine.handle.drain()
        engine.handle.trim()
        engine.handle.set_quota(limit=most)
    served, facts = serve_engines(engines, jobs, until)
    return {**served.row(), **facts}


class Part:
    """What all parts need: the model, the trace, the moment to end, and a way to say what was found."""

    def __init__(self, arguments: argparse.Namespace, found: Callable[..., None], say: Callable[[str], None]) -> None:
        self.found, self.say = found, say
        self.tiny: bool = arguments.tiny
        self.device: str = arguments.device
        trace = arguments.trace or DEFAULT_TRACE
        found("trace", trace.name)
        for scale in ("skip", "time_scale", "token_scale", "answer_scale"):
            found("scales", getattr(arguments, scale), scale)
        requests = [
            replace(one, arrival=one.arrival - arguments.skip)
            for one in read_trace(trace)
            if one.arrival >= arguments.skip
        ]
        self.requests = scale_trace(requests, time_scale=arguments.time_scale, token_scale=arguments.token_scale)
        self.answer_scale: float = arguments.answer_scale
        self.copies = 1 if self.tiny else min(max(round(arguments.budget / 100), 1), 8)
        if self.tiny:
            torch.set_num_threads(1)

    def run(self, name: str, until: float) -> None:
        """until: by time.perf_counter."""
        source, dtype = ("random:tiny", torch.float32) if self.tiny else ("random:large", torch.bfloat16)
        self.until = until
        self.model, _ = load_model(source, device=self.device, dtype=dtype)
        self.model.generation_config.eos_token_id = self.model.config.eos_token_id = None
        self.say(f"{name}: {source} is there")
        self.found("torch", torch.__version__)
        self.found("model", source)
        if name == "three":
            self.three()
        else:
            self.one(name)

    def memory(self) -> int:
        """Bytes for caches where they are ample."""
        return 1 << 30 if self.device == "cpu" else torch.cuda.mem_get_info()[0] // 2

    def one(self, name: str) -> None:
        """All requests to one model, by one of the ways."""
        token_scale = 0.25 if self.tiny else 4.0
        load = Load(24, self.copies, 0.02 if self.tiny else 0.03, token_scale, self.answer_scale)
        jobs = make_jobs(self.requests, load, self.model.config.vocab_size, 1)
        self.found("one", {**describe(jobs), **asdict(load)})
        facts: dict[str, Any] = {}
        self.model.set_attn_implementation(NAME if name == "engine" else "sdpa")
        if name == "engine":
            with elastikv.SharedMemoryPool(self.memory(), self.device) as pool:
                engines, longest = make_engines(self.model, pool, jobs, 1)
                warm(engines, jobs, longest)
                engines[0].handle.trim()
                self.say(f"{name}: {engines[0].graphs} graphs are there, {len(jobs)} requests begin")
                served, facts = serve_engines(engines, jobs, self.until)
                engines[0].close()
        elif name == "continuous":
            served = serve_continuous(self.model, jobs, self.until, self.say, blocks=64 if self.tiny else None)
        else:
            serve_batches(self.model, jobs[:1], min(self.until, time.perf_counter() + 3.0))
            self.say(f"{name}: warm")
            served = serve_batches(self.model, jobs, self.until)
        self.found("ways", {**served.row(), **facts}, name)

    def three(self) -> None:
        """Point by point, as long as there is time for another one."""
        self.model.set_attn_implementation(NAME)
        token_scale, time_scale = (1.0, 0.02) if self.tiny else (4.0, 0.12)
        first = sum(one.arrival < MODELS * SHIFT for one in self.requests)  # so that each is busy once

        def jobs_of(point: Point) -> list[Job]:
            load = Load(first, point.copies, time_scale, token_scale, self.answer_scale * point.answer_scale)
            return make_jobs(self.requests, load, self.model.config.vocab_size, MODELS, point.in_turn)

        everyone = {point: jobs_of(point) for point in POINTS}
        usual = everyone[Point(1)]
        # A third holds somewhat more than the busy model's requests at a load of one.
        fits = max(round(1.6 * len(usual) / MODELS), 4)
        tokens = sum(len(job.prompt) + job.wanted for job in usual) / len(usual)
        token_bytes = kv_geometry(self.model.config).token_bytes(self.model.dtype)
        pages = -(-int(tokens * token_bytes) // PAGE)
        limit = (fits * pages + 2) * PAGE * MODELS
        with elastikv.SharedMemoryPool(limit, self.device, page_size=PAGE) as pool:
            engines, longest = make_engines(
                self.model, pool, [job for jobs in everyone.values() for job in jobs], MODELS
            )
            warm(engines, usual, longest)
            third = limit // MODELS
            self.found("three", {**describe(usual), "limit_bytes": limit, "page_bytes": PAGE,
                                 "requests_a_third_holds": fits, "shift_seconds": SHIFT * time_scale})  # fmt: skip
            self.say(
                f"three: {sum(engine.graphs for engine in engines)} graphs are there, {limit >> 20} MiB, points begin"
            )
            a_job = 0.0  # seconds that both ways took beyond the trace's own, for each job of a point: the most so far
            for point in POINTS:
                jobs = everyone[point]
                began, arrivals = time.perf_counter(), 2 * jobs[-1].due
                if began + arrivals + a_job * len(jobs) > self.until:
                    self.found("points_not_run", f"{point.series}, load {point.copies}", None)
                    continue
                row = {"series": point.series, "copies": point.copies, "requests": len(jobs),
                       "burst": len(jobs) / (MODELS * fits), "limit_bytes": limit}  # fmt: skip
                # Half of the time that is left is the other way's.
                half = began + (self.until - began) / 2
                try:
                    for name, most, until in (("pool", limit, half), ("static thirds", third, self.until)):
                        row[name] = share(engines, jobs, most, until)
                        self.say(f"{point.series}, load {point.copies}, {name}: {serving_report.line(row[name])}")
                except elastikv.VmmError as failed:
                    self.found("points_not_run", f"{point.series}, load {point.copies}: {failed}", None)
                    self.say(f"{point.series}, load {point.copies}: {failed}")
                    continue
                a_job = max(a_job, (time.perf_counter() - began - arrivals) / len(jobs))
                self.found("points", row, None)
            for engine in engines:
                engine.close()
