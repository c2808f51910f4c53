"""From a trace to jobs: which model answers, when in the server's rounds, and what memory it all would need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from elastikv.demo.roles import Role
from elastikv.errors import InvalidArgument
from elastikv.trace import TraceRequest, model_of

#: Rounds of the server to a second of the trace. A round gives every running job one token.
ROUNDS_PER_SECOND = 5.0


@dataclass
class Job:
    """One request on its way. The server owns it and is the only one to change it."""

    index: int
    role: int
    arrival: int  # round
    prompt: list[int]
    wanted: int  # tokens of the answer, at most
    answer: list[int] = field(default_factory=list)
    done: bool = False
    pauses: int = 0  # times that it made way for want of memory, with its pages kept,
    restarts: int = 0  # and with its pages given back


def make_jobs(requests: Sequence[TraceRequest], roles: Sequence[Role], *, shift: float) -> tuple[list[Job], int]:
    """Jobs in the order of arrival, and how many requests had to be cut to what their model can take.

    What is cut is the answer down to half of the model's positions, then the prompt to the rest.
    """
    if not shift > 0:
        raise InvalidArgument(f"the models take turns every {shift} seconds: that must be above 0")
    jobs, cut = [], 0
    for index, request in enumerate(requests):
        role = model_of(index, request.arrival, models=len(roles), shift=shift)
        most = getattr(roles[role].model.config.get_text_config(), "max_position_embeddings", None) or 2048
        wanted = min(request.generated_tokens, most // 2)
        context = min(request.context_tokens, most - wanted)
        cut += (context, wanted) != (request.context_tokens, request.generated_tokens)
        prompt = roles[role].prompt(index, context)
        jobs.append(Job(index, role, round(request.arrival * ROUNDS_PER_SECOND), prompt, wanted))
    return jobs, cut


def row_tokens(jobs: Sequence[Job], role: int) -> int:
    """Tokens of the longest job of a model, in steps of 64: the row that a cache must be able to hold."""
    longest = max((len(job.prompt) + job.wanted for job in jobs if job.role == role), default=1)
    return -(-longest // 64) * 64


@dataclass(frozen=True)
class Demand:
    """Bytes of keys and values that the jobs would take if memory had no limit and none ever waited."""

    peaks: tuple[int, ...]  # per model
    peak: int  # of all models together: less than the sum where their peaks are at different times
    largest: int  # of a single job


def demand(jobs: Sequence[Job], roles: Sequence[Role]) -> Demand:
    last = max(job.arrival + job.wanted for job in jobs)
    usage = [[0] * (last + 1) for _ in roles]
    for job in jobs:
        token_bytes = roles[job.role].token_bytes
        for step in range(job.wanted):
            usage[job.role][job.arrival + step] += (len(job.prompt) + step) * token_bytes
    largest = max((len(job.prompt) + job.wanted) * roles[job.role].token_bytes for job in jobs)
    return Demand(tuple(max(line) for line in usage), max(map(sum, zip(*usage))), largest)


def choose_limit(need: Demand, page_size: int) -> int:
    """A limit that is tight on purpose: 80 % of the peak, so that some requests wait, but room for any single one.

    The 9/8 is what open-ended growth may map ahead; the pages are for the ends of rows.
    """
    tight = max(int(need.peak * 0.8), need.largest * 9 // 8 + 4 * page_size)
    unit = max(page_size, 1 << 20)
    return -(-tight // unit) * unit
