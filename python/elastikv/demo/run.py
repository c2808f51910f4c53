"""The demo from beginning to end, without a screen of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

import elastikv
from elastikv.demo.accounting import Service, Timeline
from elastikv.demo.check import Difference, check_answers
from elastikv.demo.reference import threads_that_pay
from elastikv.demo.report import model_summary, write_summary, write_timeline
from elastikv.demo.roles import Role, load_roles
from elastikv.demo.serve import MAX_BATCH, Server, Watcher
from elastikv.demo.workload import Demand, Job, choose_limit, demand, make_jobs, row_tokens
from elastikv.errors import DeviceUnavailable, InvalidArgument
from elastikv.plots import plot_memory
from elastikv.serving.engine import Engine
from elastikv.trace import DEFAULT_TRACE, read_trace, scale_trace

UNIT = 1 << 24  # addresses are reserved in steps of 16 MiB


@dataclass(frozen=True)
class Options:
    """What the command line asks for. limit in bytes, shift in seconds of the (scaled) trace."""

    models: str = "auto"
    trace: Path = DEFAULT_TRACE
    time_scale: float = 1.0
    token_scale: float = 1.0
    max_requests: int = 32
    shift: float = 15.0
    limit: int | None = None
    device: str = "auto"
    dtype: torch.dtype = torch.float32
    out: Path = Path("elastikv-demo")


@dataclass(frozen=True)
class Plan:
    """What will run, before it runs. limit, half and need are bytes."""

    device: str
    services: Sequence[Service]
    jobs: Sequence[Job]
    in_trace: int  # requests in the trace file
    cut: int  # requests that had to be shortened
    need: Demand
    limit: int
    pool: elastikv.SharedMemoryPool

    @property
    def half(self) -> int:
        return self.limit // len(self.services)


@dataclass(frozen=True)
class Result:
    plan: Plan
    timeline: Timeline
    differences: list[Difference]
    left: int  # bytes still mapped after the last answer: 0
    summary: dict[str, Any]
    picture: Path

    @property
    def ok(self) -> bool:
        return not self.differences and self.left == 0


class Screen(Watcher, Protocol):
    """Shows a run. Called on one thread, in this order: loading, planned, the watcher's calls, checked a job."""

    def loading(self, device: str) -> None: ...
    def planned(self, plan: Plan) -> None: ...
    def checked(self, job: Job) -> None: ...


def run_demo(options: Options, screen: Screen) -> Result:
    """Serves the trace, checks every answer, writes picture, timeline and summary to options.out."""
    begin = time.monotonic()
    device, granularity = _device(options.device)
    screen.loading(device)
    roles = load_roles(options.models, device=device, dtype=options.dtype)
    plan = _plan(options, roles, device, granularity)
    screen.planned(plan)
    options.out.mkdir(parents=True, exist_ok=True)

    with plan.pool, threads_that_pay(roles[0].model):
        loaded = time.monotonic()
        server = Server(plan.jobs, plan.services, plan.pool, screen)
        server.run()
        served = time.monotonic()
        differences = check_answers(plan.jobs, roles, screen.checked)
        seconds = {"loading": loaded - begin, "serving": served - loaded, "checking": time.monotonic() - served}
        left = plan.pool.global_stats().physical_usage
        summary = _summarise(plan, server.timeline, differences, left, seconds)

    picture = options.out / "elastikv-demo.png"
    names = [role.name for role in roles]
    write_timeline(options.out / "timeline.csv", server.timeline, names)
    write_summary(options.out / "summary.json", summary)
    plot_memory(picture, server.timeline.samples, names, limit=plan.limit)
    return Result(plan, server.timeline, differences, left, summary, picture)


def _device(wanted: str) -> tuple[str, int]:
    """The device and its granularity. auto: the first CUDA device that is available, else the host."""
    known = {str(one["device"]): one for one in elastikv.devices()}
    if wanted == "auto":
        cuda = [name for name, one in known.items() if name.startswith("cuda:") and one["available"]]
        wanted = cuda[0] if cuda and torch.cuda.is_available() else "cpu"
    if wanted == "cuda":
        wanted = "cuda:0"
    if wanted not in known or not known[wanted]["available"]:
        here = ", ".join(name for name, one in known.items() if one["available"])
        why = [one["reason"] for name, one in known.items() if name in (wanted, wanted.partition(":")[0])]
        raise DeviceUnavailable(f"device {wanted!r} can't be used{f' ({why[0]})' if why else ''}; there is {here}")
    return wanted, int(known[wanted]["granularity"])


def _plan(options: Options, roles: Sequence[Role], device: str, granularity: int) -> Plan:
    requests = read_trace(options.trace)
    chosen = scale_trace(
        requests, time_scale=options.time_scale, token_scale=options.token_scale, max_requests=options.max_requests
    )
    jobs, cut = make_jobs(chosen, roles, shift=options.shift)
    need = demand(jobs, roles)
    limit = options.limit or choose_limit(need, granularity)
    enough = choose_limit(replace(need, peak=0), granularity)
    if limit < enough:
        raise InvalidArgument(
            f"a limit of {limit} bytes is too small: the largest request alone takes up to {enough}. "
            "Raise --limit or lower --token-scale"
        )
    pool = elastikv.SharedMemoryPool(physical_limit=limit, device=device, park_limit=0)
    services = []
    for index, role in enumerate(roles):
        count = sum(job.role == index for job in jobs)
        row = row_tokens(jobs, index)
        addresses = Engine.addresses(
            role.model.config, role.dtype, max_batch=MAX_BATCH, max_tokens=row, prefix_entries=0
        )
        handle = pool.register_model(role.name, virtual_capacity=-(-addresses // UNIT) * UNIT)
        services.append(Service(role, handle, row, jobs=count))
    return Plan(device, services, jobs, len(requests), cut, need, limit, pool)


def _summarise(
    plan: Plan, timeline: Timeline, differences: Sequence[Difference], left: int, seconds: dict[str, float]
) -> dict[str, Any]:
    tokens = sum(service.tokens for service in plan.services)
    return {
        "device": plan.device,
        "threads": torch.get_num_threads(),
        "dtype": str(plan.services[0].role.dtype).removeprefix("torch."),
        "versions": {"elastikv": elastikv.__version__, "torch": torch.__version__},
        "limit": plan.limit,
        "static_half": plan.half,
        "needed_without_limit": {"models": list(plan.need.peaks), "total": plan.need.peak},
        "models": [model_summary(one, timeline, i, plan.half) for i, one in enumerate(plan.services)],
        "total": {
            "requests": sum(service.done for service in plan.services),
            "tokens": tokens,
            "prompt_tokens": sum(len(job.prompt) for job in plan.jobs),
            "physical_peak": plan.pool.global_stats().peak_physical,
            "static_cache_peak": timeline.peak("static_cache"),
            "dynamic_cache_peak": timeline.peak("dynamic_cache"),
            "most_waiting": max(sample.waiting for sample in timeline.samples),
            "pauses": sum(job.pauses for job in plan.jobs),
            "restarts": sum(job.restarts for job in plan.jobs),
            "physical_left": left,
        },
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "tokens_per_second": {
            "elastic": round(tokens / seconds["serving"], 1),
            "dynamic": round(tokens / seconds["checking"], 1),
        },
        "differences": [str(one) for one in differences],
    }
