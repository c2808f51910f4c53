"""Ways to answer a list of jobs in real time, each until a moment at which it is cut: what bench_serving compares."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, StoppingCriteria, StoppingCriteriaList

import elastikv
from elastikv.hf.decoder import size_class
from elastikv.serving import Engine
from elastikv.serving.runner import Round, run_until_idle
from elastikv.trace import Outcome, summary

MAX_BATCH = 64


@dataclass(frozen=True)
class Job:
    """due: seconds after the start at which it comes."""

    due: float
    prompt: list[int]
    wanted: int
    model: int


@dataclass(frozen=True)
class Served:
    """cut: seconds after the start at which the time was up; None where all jobs have had their turn.

    What had no first token then counts as if it came just then, which is better than it was; what had not come by then
    is left out.
    """

    outcomes: list[Outcome]
    cut: float | None = None

    def row(self) -> dict[str, Any]:
        """Numbers for the results, with each request's time to the first token."""
        row: dict[str, Any] = dict(summary(self.outcomes))
        if self.cut is not None:
            seconds = self.cut - min((one.due for one in self.outcomes), default=0.0)
            row |= {
                "cut_after": self.cut,
                "unfinished": sum(one.end is None and one.first is not None for one in self.outcomes),
                "seconds": seconds,
                "tokens_per_second": row["tokens"] / max(seconds, 1e-9),
            }
            row["refused"] -= row["unfinished"]
        firsts = [one.first_token_seconds for one in self.outcomes if one.first_token_seconds is not None]
        return row | {"first_tokens": [round(first, 4) for first in sorted(firsts)]}


def at_cut(job: Job, cut: float, first: float | None = None, tokens: int = 0) -> Outcome:
    """What became of a job that had no end when the time was up."""
    return Outcome(job.due, cut if first is None else first, None, tokens, job.model)


def wait_until(moment: float) -> None:
    time.sleep(max(moment - time.perf_counter(), 0.0))


# ---- the slots engine


def make_engines(
    model: Any, pool: elastikv.SharedMemoryPool, jobs: Sequence[Job], count: int
) -> tuple[list[Engine], int]:
    """Engines with room for the longest job, and how many tokens that is."""
    longest = -(-max(len(job.prompt) + job.wanted for job in jobs) // 256) * 256
    options = {"max_batch": MAX_BATCH, "max_tokens": longest, "prefix_entries": 0}
    addresses = Engine.addresses(model.config, model.dtype, **options)
    handles = [pool.register_model(f"model-{index}", addresses) for index in range(count)]
    return [Engine(model, handle, clock=time.perf_counter, **options) for handle in handles], longest


def warm(engines: Sequence[Engine], jobs: Sequence[Job], longest: int) -> None:
    """Every batch size at every length that has a graph of its own, then the jobs, briefly."""
    graphed = engines[0].slots.device.type == "cuda"
    bounds = sorted({size_class(tokens) for tokens in range(1, longest + 1, 64)}) if graphed else []
    for engine in engines:
        for bound in bounds:
            size = 1
            while size <= MAX_BATCH:
                tokens = max(min(bound, longest) - 8, 1)
                prompts = [[3] * tokens, *([3] * 8 for _ in range(size - 1))]
                for prompt in prompts:
                    engine.submit(prompt, max_new_tokens=4)
                run_until_idle(engine)
                size *= 2
        for job in jobs[:MAX_BATCH]:
            engine.submit(job.prompt, max_new_tokens=4)
        run_until_idle(engine)


def serve_engines(engines: Sequence[Engine], jobs: Sequence[Job], until: float) -> tuple[Served, dict[str, Any]]:
    """A job of model i goes to engine i; those that an engine refuses, as they can never fit, have no first token.

    With facts of the run: the most that was charged at the end of a step, and what the engines' counts grew by.
    """
    before = [(engine.counts.pauses, engine.counts.restarts) for engine in engines]
    requests: list[Any] = []
    try:
        served, peak = _serve(engines, jobs, until, requests)
    finally:
        for request in requests:
            if request is not None:
                request.cancel()
        run_until_idle(*engines)
    facts = {
        "peak_bytes": peak,
        "pauses": sum(engine.counts.pauses - then for engine, (then, _) in zip(engines, before)),
        "restarts": sum(engine.counts.restarts - then for engine, (_, then) in zip(engines, before)),
    }
    return served, facts


def _serve(engines: Sequence[Engine], jobs: Sequence[Job], until: float, requests: list[Any]) -> tuple[Served, int]:
    together, coming = Round(engines), list(jobs)
    peak = 0
    start = time.perf_counter()
    while (coming or not together.idle) and time.perf_counter() < until:
        if together.idle:
            wait_until(min(start + coming[0].due, until))
        while coming and start + coming[0].due <= time.perf_counter():
            job = coming.pop(0)
            try:
                requests.append(engines[job.model].submit(job.prompt, max_new_tokens=job.wanted))
            except elastikv.OutOfPhysicalMemory:
                requests.append(None)
        together.advance()
        peak = max(peak, sum(engine.handle.quota().charged for engine in engines))
    cut = time.perf_counter() - start if coming or not together.idle else None

    def outcome(job: Job, request: Any) -> Outcome:
        if request is None:
            return Outcome(job.due, None, None, 0, job.model)
        if request.error is not None:
            raise request.error
        first = None if request.first_token is None else request.first_token - start
        if not request.done and cut is not None:
            return at_cut(job, cut, first, len(request.answer))
        return Outcome(job.due, first, request.ended - start, len(request.answer), job.model)

    return Served([outcome(*pair) for pair in zip(jobs, requests)], cut), peak


# ---- transformers' ways


def next_result(manager: Any, until: float = math.inf) -> Any:
    """None where there is none within a second. RuntimeError once the thread that computes them has died."""
    done = manager.get_result(timeout=max(min(1.0, until - time.perf_counter()), 0.001))
    if done is None and not manager.is_running():
        raise RuntimeError("the thread of transformers' continuous batching has died")
    return done


def serve_continuous(
    model: Any, jobs: Sequence[Job], until: float, say: Callable[[str], None], *, blocks: int | None = None
) -> Served:
    """transformers' own continuous batching, as it comes, warmed up.

    blocks: of its cache; by default it takes most of the memory. say: is told how far it is.
    """
    longest = max(job.wanted for job in jobs)
    settings = GenerationConfig(max_new_tokens=longest, do_sample=False, eos_token_id=-1)
    options: dict[str, Any] = {"generation_config": settings}
    if blocks is not None:
        options["continuous_batching_config"] = ContinuousBatchingConfig(num_blocks=blocks)
    with model.continuous_batching_context_manager(**options) as manager:
        say("continuous: its cache and graphs are there")
        warming = [manager.add_request(jobs[0].prompt, max_new_tokens=4, eos_token_id=-1) for _ in range(4)]
        while warming:
            done = next_result(manager)
            warming = [one for one in warming if done is None or one != done.request_id]
        say(f"continuous: {len(jobs)} requests begin")
        start = time.perf_counter()
        names: dict[str, Job] = {}
        outcomes: dict[str, Outcome] = {}
        for job in jobs:
            if start + job.due >= until:
                break
            wait_until(start + job.due)
            name = manager.add_request(job.prompt, max_new_tokens=job.wanted, record_timestamps=True, eos_token_id=-1)
            names[name] = job
        while len(outcomes) < len(names) and time.perf_counter() < until:
            done = next_result(manager, until)
            if done is None:
                continue
            if done.error or not done.timestamps:
                raise RuntimeError(f"continuous batching failed: {done.error}")
            job, (first, end) = names[done.request_id], (done.timestamps[0] - start, done.timestamps[-1] - start)
            outcomes[done.request_id] = Outcome(job.due, first, end, len(done.generated_tokens), job.model)
        if len(outcomes) == len(jobs):
            return Served(list(outcomes.values()))
        cut = time.perf_counter() - start
        manager.stop(block=True, hard_stop=True)  # which hands out what the others have so far
        while (done := manager.get_result(timeout=0.01)) is not None:
            if done.request_id not in outcomes:
                times = done.timestamps or []
                first = times[0] - start if times else None
                outcomes[done.request_id] = at_cut(names[done.request_id], cut, first, len(done.generated_tokens))
        outcomes |= {name: at_cut(job, cut) for name, job in names.items() if name not in outcomes}
        return Served(list(outcomes.values()), cut)


class Marks(StoppingCriteria):
    """When each token of a batch came; stops it once the time is up."""

    def __init__(self, until: float) -> None:
        self.times: list[float] = []
        self._until = until

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if input_ids.is_cuda and not self.times:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        late = self.times[-1] >= self._until
        return torch.full((len(input_ids),), late, dtype=torch.bool, device=input_ids.device)


def serve_batches(model: Any, jobs: Sequence[Job], until: float) -> Served:
    """Whoever has come makes the next batch, which runs to the end of its longest answer."""
    outcomes: list[Outcome] = []
    start = time.perf_counter()
    left = list(jobs)
    while left and time.perf_counter() < until:
        wait_until(start + left[0].due)
        now = time.perf_counter() - start
        batch = [job for job in left[:MAX_BATCH] if job.due <= now]
        left = left[len(batch) :]
        width = max(len(job.prompt) for job in batch)
        tokens = torch.tensor([[0] * (width - len(job.prompt)) + job.prompt for job in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in batch])
        marks, longest = Marks(until), max(job.wanted for job in batch)
        model.generate(
            tokens, attention_mask=mask.to(model.device), do_sample=False, pad_token_id=0, eos_token_id=None,
            max_new_tokens=longest, min_new_tokens=longest, stopping_criteria=StoppingCriteriaList([marks]),
        )  # fmt: skip
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        end, first, came = time.perf_counter() - start, marks.times[0] - start, len(marks.times)
        for job in batch:
            ended = end if came == longest else None
            outcomes.append(Outcome(job.due, first, ended, min(job.wanted, came), job.model))
    cut = time.perf_counter() - start
    if not left and all(one.end is not None for one in outcomes):
        return Served(outcomes)
    return Served([*outcomes, *(at_cut(job, cut) for job in left if job.due < cut)], cut)
