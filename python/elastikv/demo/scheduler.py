"""Serves jobs of several models from one pool: round robin, one token a job and round, as memory permits."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from elastikv.demo.accounting import Sample, Service, Timeline
from elastikv.demo.decode import next_token
from elastikv.demo.workload import ROUNDS_PER_SECOND, Job
from elastikv.errors import OutOfPhysicalMemory
from elastikv.hf import ElasticCache

if TYPE_CHECKING:
    import elastikv


#: Share of the limit that stays free for the answers of running jobs when another one is started.
HEADROOM = 1 / 16


class Watcher(Protocol):
    """Is told what happens, on the scheduler's thread."""

    def token(self, job: Job) -> None: ...
    def finished(self, job: Job) -> None: ...
    def sampled(self, sample: Sample) -> None: ...


class Scheduler:
    """The clock counts rounds, so a run is the same on a fast and on a slow machine.

    Each round gives every running job one token, then starts waiting jobs in the order of their arrival while their
    prompts fit. How long an answer gets, nobody knows before: when the pool runs dry, OutOfPhysicalMemory leaves a
    job's cache as it was, and the job tries again in the next round. If no job can move, the youngest gives its memory
    back and starts over later, from its prompt: read in as one piece, its answer so far might not lead to the same
    tokens.
    """

    def __init__(
        self, jobs: Sequence[Job], services: Sequence[Service], pool: elastikv.SharedMemoryPool, watcher: Watcher
    ) -> None:
        self.clock = 0
        self.coming = deque(jobs)
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.timeline = Timeline()
        self._services = services
        self._pool = pool
        self._watcher = watcher
        self._dry_rounds = 0

    def run(self) -> None:
        """Until all jobs are done. Raises OutOfPhysicalMemory only if a job does not fit even when it is alone."""
        while self.coming or self.waiting or self.running:
            if not self.waiting and not self.running:
                self.clock = max(self.clock, self.coming[0].arrival)
            self.round()
        self._drain()
        self._sample()  # the end of the picture: everything given back

    def round(self) -> None:
        while self.coming and self.coming[0].arrival <= self.clock:
            self.waiting.append(self.coming.popleft())
        moved = [self._advance(job) for job in list(self.running)]
        started = 0
        while self.waiting and all(moved) and self._start(self.waiting[0]):
            self.waiting.popleft()
            started += 1
        if (self.running or self.waiting) and not any(moved) and not started:
            self._make_way()
        else:
            self._dry_rounds = 0
        if not self.running:
            self._drain()  # a quiet pool is shown as it is, not while the device still gives memory back
        self._sample()
        self.clock += 1

    def _start(self, job: Job) -> bool:
        service = self._services[job.role]
        memory = self._pool.global_stats()
        kept = memory.physical_limit * HEADROOM if self.running else 0
        if len(job.prompt) * service.role.token_bytes + kept > memory.available + memory.parked:
            return False
        job.cache = ElasticCache(service.role.model.config, model=service.handle, max_tokens=service.row)
        self.running.append(job)
        if self._advance(job):
            return True
        self.running.remove(job)
        job.cache = None
        return False

    def _advance(self, job: Job) -> bool:
        """One more token for a running job; False if there is no memory for it now."""
        assert job.cache is not None
        service = self._services[job.role]
        try:
            token = next_token(service.role.model, job.prompt, job.answer, job.cache)
        except OutOfPhysicalMemory:
            job.stalls += 1
            return False
        job.answer.append(token)
        service.tokens += 1
        self._watcher.token(job)
        if len(job.answer) == job.wanted or token in service.role.stop:
            self._release(job)
            service.done += 1
            self._watcher.finished(job)
        return True

    def _release(self, job: Job) -> None:
        assert job.cache is not None
        job.cache.close()
        job.cache = None
        self.running.remove(job)

    def _make_way(self) -> None:
        """Nothing moved for want of memory: first wait for what is on its way back, then send the youngest back."""
        self._dry_rounds += 1
        self._drain()
        if len(self.running) > 1:
            job = self.running[-1]
            self._release(job)
            self._services[job.role].tokens -= len(job.answer)
            job.answer.clear()
            job.restarts += 1
            self.waiting.appendleft(job)
        elif self._dry_rounds > 2:
            job = self.running[0] if self.running else self.waiting[0]
            need = (len(job.prompt) + len(job.answer) + 1) * self._services[job.role].role.token_bytes
            free = self._pool.global_stats().available
            raise OutOfPhysicalMemory(f"request {job.index} is alone and needs {need} bytes, {free} are free")

    def _drain(self) -> None:
        for service in self._services:
            service.handle.drain()

    def _sample(self) -> None:
        lengths: list[list[int]] = [[] for _ in self._services]
        for job in self.running:
            lengths[job.role].append(job.cached_tokens)
        sample = Sample(
            seconds=self.clock / ROUNDS_PER_SECOND,
            models=tuple(service.sample(own) for service, own in zip(self._services, lengths)),
            physical=self._pool.global_stats().physical_usage,
            waiting=len(self.waiting),
        )
        self.timeline.samples.append(sample)
        self._watcher.sampled(sample)
