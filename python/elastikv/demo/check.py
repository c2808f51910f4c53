"""Every answer once more with transformers' own DynamicCache: the tokens must be the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import DynamicCache

from elastikv.demo.reference import next_token
from elastikv.demo.roles import Role
from elastikv.demo.workload import Job


@dataclass(frozen=True)
class Difference:
    """Where an answer leaves the reference. A token of None: that answer has ended."""

    request: int
    model: str
    position: int
    elastic: int | None
    dynamic: int | None

    def __str__(self) -> str:
        return (
            f"request {self.request} ({self.model}), token {self.position}: "
            f"the engine gave {self.elastic}, DynamicCache {self.dynamic}"
        )


def reference_answer(role: Role, prompt: list[int], wanted: int) -> list[int]:
    """The greedy answer with a DynamicCache: at most wanted tokens, a stop token included."""
    cache = DynamicCache(config=role.model.config)
    answer: list[int] = []
    while len(answer) < wanted and not (answer and answer[-1] in role.stop):
        answer.append(next_token(role.model, prompt, answer, cache))
    return answer


def check_answers(
    jobs: Sequence[Job], roles: Sequence[Role], on_checked: Callable[[Job], None] = lambda job: None
) -> list[Difference]:
    """The first difference of each job that has one."""
    differences = []
    for job in jobs:
        role = roles[job.role]
        reference = reference_answer(role, job.prompt, job.wanted)
        if reference != job.answer:
            position = next((i for i, (a, b) in enumerate(zip(job.answer, reference)) if a != b), None)
            if position is None:
                position = min(len(job.answer), len(reference))
            ours, theirs = _at(job.answer, position), _at(reference, position)
            differences.append(Difference(job.index, role.name, position, ours, theirs))
        on_checked(job)
    return differences


def _at(tokens: list[int], position: int) -> int | None:
    return tokens[position] if position < len(tokens) else None
