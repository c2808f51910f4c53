"""The demo's words and numbers, for any screen."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

from elastikv.demo.accounting import Sample
from elastikv.demo.run import Plan, Result
from elastikv.demo.workload import Job

MIB = 1 << 20
OTHERS = {"StaticCache": "static_cache", "DynamicCache": "dynamic_cache"}  # fields of a ModelSample


def mib(size: int) -> str:
    return f"{size / MIB:.1f}"


def size_text(size: int) -> str:
    return f"{size / (1 << 30):.3g} GiB" if size >= 1 << 30 else f"{size / MIB:.4g} MiB"


def intro(plan: Plan) -> Iterator[str]:
    """What will happen, in lines of rich markup."""
    first, second = plan.services
    yield (
        f"[bold]{first.role.name}[/] ({first.role.about}) and [bold]{second.role.name}[/] ({second.role.about}) "
        f"share one pool on {plan.device}."
    )
    prompts, answers = sum(len(job.prompt) for job in plan.jobs), sum(job.wanted for job in plan.jobs)
    of_trace = "" if len(plan.jobs) == plan.in_trace else f" of the trace's {plan.in_trace} (--max-requests)"
    yield f"{len(plan.jobs)} requests{of_trace}: {prompts:,} prompt tokens, answers of up to {answers:,}."
    if plan.cut:
        yield f"{plan.cut} requests were longer than their model can take, and were cut."
    yield f"Physical limit: [bold]{mib(plan.limit)} MiB[/]. A static split would give each model {mib(plan.half)} MiB."
    needs = zip(plan.services, plan.need.peaks)
    over = [f"{mib(peak)} MiB ({one.role.name})" for one, peak in needs if peak > plan.half]
    if over:
        yield f"That would be overrun: at the busiest moment the keys and values take {' and '.join(over)}."
    else:
        yield "This trace would fit the halves too: lower --limit, or raise --token-scale."


def conclusion(result: Result) -> Iterator[str]:
    """How it went, in lines of rich markup."""
    summary, plan = result.summary, result.plan
    total, seconds, speed = summary["total"], summary["seconds"], summary["tokens_per_second"]
    yield (
        f"Served {total['requests']} requests, {total['tokens']:,} tokens. The most at once: "
        f"{mib(total['physical_peak'])} MiB of the {mib(plan.limit)} MiB limit; StaticCache would have held "
        f"{mib(total['static_cache_peak'])} MiB, DynamicCache {mib(total['dynamic_cache_peak'])} MiB."
    )
    for model in summary["models"]:
        if model["over_static_half"]:
            yield (
                f"{model['name']} used {mib(model['physical_peak'])} MiB at its peak: "
                f"{mib(model['over_static_half'])} MiB more than a static half."
            )
    if total["most_waiting"]:
        yield (
            f"When the pool was full, requests waited: up to {total['most_waiting']} at once; {total['pauses']} times "
            f"one that ran made way with its pages kept, and {total['restarts']} times without."
        )
    yield (
        f"Loading {seconds['loading']:.0f} s, serving {seconds['serving']:.0f} s ({speed['elastic']} tokens/s), "
        f"checking with DynamicCache {seconds['checking']:.0f} s ({speed['dynamic']} tokens/s)."
    )
    if result.left:
        yield f"[bold red]{result.left} bytes are still mapped after the last answer.[/]"
    if result.differences:
        yield f"[bold red]{len(result.differences)} answers differ from DynamicCache's:[/]"
        yield from (f"  {one}" for one in result.differences)
    else:
        yield f"[bold green]All {total['tokens']:,} tokens equal those of transformers' DynamicCache.[/]"
    yield f"Picture: {result.picture}   (beside it: timeline.csv, summary.json)"


class Board:
    """Follows a run and keeps what a screen needs to draw it at any moment."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.checked = 0
        self._sample: Sample | None = None
        self._peaks = {name: [0] * (len(plan.services) + 1) for name in OTHERS.values()}
        # A panel follows one request from its first token to its last, then the next that speaks.
        self._followed: list[Job | None] = [None] * len(plan.services)
        self._said: list[list[str]] = [[] for _ in plan.services]

    def token(self, job: Job) -> None:
        followed = self._followed[job.role]
        if followed is None or followed.done:
            self._followed[job.role] = job

    def finished(self, job: Job) -> None:
        if self._followed[job.role] is job:
            self._said[job.role].append(self._entry(job))
            del self._said[job.role][:-8]
            self._followed[job.role] = None

    def sampled(self, sample: Sample) -> None:
        self._sample = sample
        for field, peaks in self._peaks.items():
            self._peaks[field] = [max(pair) for pair in zip(peaks, self._now(field))]

    def lines(self, role: int, width: int, height: int) -> list[str]:
        """The end of what a model said, wrapped."""
        followed = self._followed[role]
        entries = self._said[role] + ([self._entry(followed) + "\u258c"] if followed else [])
        return [line for entry in entries[-3:] for line in textwrap.wrap(entry, width)][-height:]

    def status(self) -> str:
        if self._sample is None:
            return ""
        waiting = f", {self._sample.waiting} waiting" if self._sample.waiting else ""
        physical, limit = mib(self._sample.physical), mib(self.plan.limit)
        return f"{self._sample.seconds:5.1f} s of the trace: {physical} of {limit} MiB in use{waiting}"

    @property
    def columns(self) -> list[str]:
        """The table's head: what is counted, each model, both together."""
        return ["", *(one.role.name for one in self.plan.services), "both"]

    def rows(self) -> list[list[str]]:
        """The table, a row for each thing that is counted. Of the caches that we compare with: what they would hold."""
        services, pool = self.plan.services, self.plan.pool.global_stats()
        stats = [one.handle.stats() for one in services]
        physical = [*((own.physical_usage, own.peak_physical) for own in stats)]
        physical.append((pool.physical_usage, pool.peak_physical))

        def both(values: Iterable[int]) -> list[int]:
            values = list(values)
            return [*values, sum(values)]

        jobs = zip(both(one.done for one in services), both(one.jobs for one in services))
        table = [
            ["requests done", *(f"{done} of {all_of_them}" for done, all_of_them in jobs)],
            ["tokens", *(f"{count:,}" for count in both(one.tokens for one in services))],
            ["physical MiB (peak)", *(f"{mib(now)} ({mib(peak)})" for now, peak in physical)],
        ]
        for label, field in OTHERS.items():
            pairs = zip(self._now(field), self._peaks[field])
            table.append([f"{label} MiB (peak)", *(f"{mib(now)} ({mib(peak)})" for now, peak in pairs)])
        table.append(["address space", *map(size_text, both(own.virtual_capacity for own in stats))])
        table.append(["driver calls", *(f"{calls:,}" for calls in both(own.total_driver_calls for own in stats))])
        return table

    def _now(self, field: str) -> list[int]:
        """A field of the last sample: of each model, then of both together."""
        values = [getattr(one, field) for one in self._sample.models] if self._sample else [0] * len(self.plan.services)
        return [*values, sum(values)]

    def _entry(self, job: Job) -> str:
        role = self.plan.services[job.role].role
        return f"#{job.index} " + " ".join(role.text(job.answer).split())
