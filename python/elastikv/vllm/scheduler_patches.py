"""What comes around functions of vLLM's scheduler and its cache manager, as `patches` has it for the rest."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

from elastikv.vllm.engine import current

Function = Callable[..., Any]
WAITING_LOOKED_AT = 64  # requests that may start in the next step
SHORT_OF_MEMORY = 0.002  # seconds to the next step where no request has memory


def manager_init(original: Function) -> Function:
    def init(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        engine = current()
        if engine is not None:
            engine.bind(self.block_pool)

    return init


def blocks_to_allocate(original: Function) -> Function:
    """Called for every request of a step, so it is made with the original's own parameters: to collect and to pass on
    *args and **options takes a microsecond, and a step has hundreds of requests. What the stock has is secured."""

    def secure(coordinator: Any, n: int, to_admit: bool) -> None:
        elastic = getattr(coordinator.block_pool, "secure", None)
        if elastic is not None:
            elastic(n, at_once=not to_admit)

    parameters = inspect.signature(original).parameters
    made: dict[str, Any] = {"original": original, "secure": secure}
    takes: list[str] = []
    passes: list[str] = []
    for name, each in parameters.items():
        star = "*" if each.kind is each.VAR_POSITIONAL else "**" if each.kind is each.VAR_KEYWORD else ""
        if each.kind is each.KEYWORD_ONLY and not any(other.startswith("*") for other in takes):
            takes.append("*")
        if each.default is not each.empty:
            made[f"default_of_{name}"] = each.default
        takes.append(f"{star}{name}" + (f"=default_of_{name}" if each.default is not each.empty else ""))
        passes.append(f"{name}={name}" if each.kind is each.KEYWORD_ONLY else f"{star}{name}")
    to_admit = "apply_admission_cap" if "apply_admission_cap" in parameters else "False"
    exec(
        f"def count({', '.join(takes)}):\n"
        f"    n = original({', '.join(passes)})\n"
        f"    if n > 0 and n > len(getattr(self.block_pool, 'stock', ())):\n"
        f"        secure(self, n, {to_admit})\n"
        f"    return n\n",
        made,
    )
    return cast("Function", made["count"])


def elastic_pool(scheduler: Any) -> Any:
    """The scheduler's block pool, if it is ours and has memory of ours."""
    pool: Any = getattr(getattr(scheduler, "kv_cache_manager", None), "block_pool", None)
    return pool if getattr(type(pool), "is_elastic", False) and pool.memory is not None else None


def upcoming_blocks(scheduler: Any) -> int:
    """How many blocks the next step may ask for, if it computes prompts: these, begun or waiting, and answers."""
    most, tokens = int(scheduler.max_num_scheduled_tokens), 0
    begun = scheduler.running[-1:]  # only the last one's prompt can be in parts
    for request in itertools.chain(begun, itertools.islice(scheduler.waiting, WAITING_LOOKED_AT)):
        tokens += max(0, request.num_tokens - request.num_computed_tokens)
        if tokens >= most:
            break
    if tokens == 0:
        return 0
    tokens = min(tokens, most) + len(scheduler.running)  # answers grow by one each
    return -(-tokens // int(scheduler.block_size)) * len(scheduler.kv_cache_config.kv_cache_groups)


def growing_blocks(scheduler: Any) -> int:
    """How many blocks the answers under way take in the next step, by a token each."""
    size = int(scheduler.block_size)
    full: int = sum(request.num_computed_tokens % size == 0 for request in scheduler.running)
    return full * len(scheduler.kv_cache_config.kv_cache_groups)


def launched(scheduler: Any) -> None:
    """The planned step is enqueued: what the next one needs is made ready while the device computes, which takes
    longer. Before, each microsecond would hold up the step."""
    pool = elastic_pool(scheduler)
    if pool is None:
        return
    upcoming = upcoming_blocks(scheduler)
    if upcoming == 0:  # else the worker maps what comes, and this thread would do it itself
        pool.prepare(growing_blocks(scheduler))
    pool.expect(upcoming)


def announces(original: Function) -> Function:
    """An idle engine's first step has no step before it in which its memory could be made ready: it is while requests
    come in."""

    def add(self: Any, *args: Any, **options: Any) -> Any:
        result = original(self, *args, **options)
        pool = elastic_pool(self)
        if pool is not None and not self.running:
            pool.expect(upcoming_blocks(self))
        return result

    return add


@contextlib.contextmanager
def nothing_planned(scheduler: Any) -> Iterator[None]:
    """vLLM's own pauses let running requests go on."""
    state = scheduler.pause_state
    scheduler.set_pause_state(type(state).PAUSED_ALL)
    try:
        yield
    finally:
        scheduler.set_pause_state(state)


def schedule(original: Function) -> Function:
    def schedule(self: Any, *args: Any, **options: Any) -> Any:
        pool = elastic_pool(self)
        if pool is None:
            return original(self, *args, **options)
        short = False
        with pool.step_lock:
            pool.memory.use_stream()
            pool.release_copied()  # the last step's copies are enqueued
            try:
                with nothing_planned(self) if pool.memory.asleep else contextlib.nullcontext():
                    planned = original(self, *args, **options)
            finally:
                short = pool.end_step()
        if short and planned.total_num_scheduled_tokens == 0:
            time.sleep(SHORT_OF_MEMORY)  # all of it is in others' use, and the engine would come back at once
        return planned

    return schedule


def free_copied(original: Function) -> Function:
    """What a block is copied from and to would be freed before the copy is enqueued."""

    def free(self: Any, blocks: Any, *args: Any, **options: Any) -> None:
        pool = elastic_pool(self)
        if pool is None:
            original(self, blocks, *args, **options)
        else:
            pool.keep_for_copies(blocks)

    return free


def ends_requests(original: Function) -> Function:
    def end(self: Any, *args: Any, **options: Any) -> Any:
        pool = elastic_pool(self)
        if pool is None:
            return original(self, *args, **options)
        with pool.step_lock:  # with drafts blocks come into the prefix cache here, and others may ask for cached ones
            result = original(self, *args, **options)
            if not self.has_unfinished_requests():
                pool.end_step(idle=True)
        return result

    return end
