"""Serves jobs of several models from one pool: an engine for each, all of which take a step a round."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from elastikv.demo.accounting import Sample, Service, Timeline
from elastikv.demo.reference import REPETITION_PENALTY
from elastikv.demo.workload import ROUNDS_PER_SECOND, Job
from elastikv.hf.attention import NAME
from elastikv.serving.engine import Engine
from elastikv.serving.runner import Round

if TYPE_CHECKING:
    import elastikv
    from elastikv.serving.request import Request


#: Most jobs of a model that decode together.
MAX_BATCH = 16
#: Tokens of an answer that a job has memory for when it starts.
PROMISE = 16


class Watcher(Protocol):
    """Is told what happens, on the server's thread."""

    def token(self, job: Job) -> None: ...
    def finished(self, job: Job) -> None: ...
    def sampled(self, sample: Sample) -> None: ...


class Server:
    """The clock counts rounds, so a run is the same on a fast and on a slow machine.

    Each round, jobs that have arrived are submitted, every engine takes a step, and a sample is taken. No prefixes are
    kept: the picture is to show what the answers take, and nothing where there are none.
    """

    def __init__(
        self, jobs: Sequence[Job], services: Sequence[Service], pool: elastikv.SharedMemoryPool, watcher: Watcher
    ) -> None:
        self.clock = 0
        self.timeline = Timeline()
        self._coming = deque(jobs)
        self._services = services
        self._pool = pool
        self._watcher = watcher

    def run(self) -> None:
        """Until all jobs are done. Raises OutOfPhysicalMemory only if a job does not fit even when it is alone."""
        with self._attention():
            engines = [_engine(service, lambda: float(self.clock)) for service in self._services]
            try:
                self._serve(engines)
            finally:
                for engine in engines:
                    engine.close()
        self._sample(engines)  # the end of the picture: everything given back

    def _serve(self, engines: Sequence[Engine]) -> None:
        together = Round(engines)
        while self._coming or not together.idle:
            if together.idle:
                self.clock = max(self.clock, self._coming[0].arrival)
            while self._coming and self._coming[0].arrival <= self.clock:
                job = self._coming.popleft()
                self._submit(job, engines[job.role])
            together.advance()
            for engine in engines:
                if engine.idle:  # a quiet model is shown as it is, not while the device still gives memory back
                    engine.handle.drain()
                    engine.handle.trim()
            self._sample(engines)
            self.clock += 1

    def _submit(self, job: Job, engine: Engine) -> None:
        service = self._services[job.role]

        def listen(request: Request, token: int) -> None:
            job.answer.append(token)
            service.tokens += 1
            self._watcher.token(job)
            if request.finish is not None and len(job.answer) == len(request.answer):
                job.done, job.pauses, job.restarts = True, request.pauses, request.restarts
                service.done += 1
                self._watcher.finished(job)

        engine.submit(
            job.prompt,
            max_new_tokens=job.wanted,
            stop=sorted(service.role.stop),
            repetition_penalty=REPETITION_PENALTY,
            on_token=listen,
        )

    def _sample(self, engines: Sequence[Engine]) -> None:
        sample = Sample(
            seconds=self.clock / ROUNDS_PER_SECOND,
            models=tuple(
                service.sample([request.stored for request in engine.running])
                for service, engine in zip(self._services, engines)
            ),
            physical=self._pool.global_stats().physical_usage,
            waiting=sum(engine.waiting for engine in engines),
        )
        self.timeline.samples.append(sample)
        self._watcher.sampled(sample)

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """The models compute with our attention function meanwhile, and with their own again for the check."""
        models = [service.role.model for service in self._services]
        before = [model.config.get_text_config(decoder=True)._attn_implementation for model in models]
        try:
            for model in models:
                model.set_attn_implementation(NAME)
            yield
        finally:
            for model, implementation in zip(models, before):
                model.set_attn_implementation(implementation)


def _engine(service: Service, clock: Callable[[], float]) -> Engine:
    """No patience, as a Round sees to it that engines do not hold each other up."""
    return Engine(
        service.role.model,
        service.handle,
        max_batch=MAX_BATCH,
        max_tokens=service.row,
        promise=PROMISE,
        prefix_entries=0,
        patience=math.inf,
        clock=clock,
    )
