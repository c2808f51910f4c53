"""What comes around functions of vLLM, one wrapper each; `versions` has which, and of which versions.

Each takes the original and returns what stands in its place. All do what the original does, unless an engine of ours is
involved.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from elastikv.vllm.engine import Engine, NotSupported, current
from elastikv.vllm.memory import memory_of

Function = Callable[..., Any]
WAITING_LOOKED_AT = 64  # requests that may start in the next step
SHORT_OF_MEMORY = 0.002  # seconds to the next step where no request has memory


# --- the engine ---


def engine_init(original: Function) -> Function:
    def start(self: Any, vllm_config: Any, executor_class: Any, *args: Any, **options: Any) -> None:
        from vllm.platforms import current_platform
        from vllm.v1.executor.uniproc_executor import UniProcExecutor

        if not current_platform.is_cuda():
            raise NotSupported("elastikv's vLLM plugin needs a CUDA device (ELASTIKV_VLLM=0 turns it off)")
        in_process = isinstance(executor_class, type) and issubclass(executor_class, UniProcExecutor)
        engine = Engine.of(vllm_config, in_process)
        with engine.starting():
            original(self, vllm_config, executor_class, *args, **options)
        engine.started(self)
        self._elastikv = engine

    return start


def engine_shutdown(original: Function) -> Function:
    def shutdown(self: Any, *args: Any, **options: Any) -> Any:
        try:
            return original(self, *args, **options)
        finally:
            engine = getattr(self, "_elastikv", None)
            if engine is not None:
                engine.close()

    return shutdown


def step(original: Function) -> Function:
    """Between two of them the engine may fall asleep."""

    def step(self: Any, *args: Any, **options: Any) -> Any:
        engine = getattr(self, "_elastikv", None)
        sleeper = None if engine is None else engine.sleeper
        if sleeper is None:
            return original(self, *args, **options)
        with sleeper.between_steps:
            result = original(self, *args, **options)
        if sleeper.asleep:
            time.sleep(SHORT_OF_MEMORY)  # whoever drives the engine by itself would come back at once
        return result

    return step


def resume_scheduler(original: Function) -> Function:
    def resume(self: Any, *args: Any, **options: Any) -> Any:
        engine = getattr(self, "_elastikv", None)
        if engine is not None and engine.sleeper is not None:
            engine.sleeper.wake_up(resume=False)
        return original(self, *args, **options)

    return resume


# --- the worker ---


def request_memory(original: Function) -> Function:
    def request(init_snapshot: Any, cache_config: Any, *args: Any, **options: Any) -> int:
        engine = current()
        wanted = math.ceil(init_snapshot.total_memory * cache_config.gpu_memory_utilization)
        device = device_of(init_snapshot)
        if engine is None or (init_snapshot.free_memory < wanted and not engine.has_company(device)):
            return int(original(init_snapshot, cache_config, *args, **options))
        return engine.ceiling(wanted, init_snapshot.free_memory)

    return request


def measure(original: Function) -> Function:
    def measure(self: Any) -> None:
        original(self)
        engine = current()
        if engine is not None:
            others = engine.taken_by_others(device_of(self))
            self.free_memory += others
            self.cuda_memory -= others
            self.non_torch_memory -= others

    return measure


def device_of(snapshot: Any) -> Any:
    device = getattr(snapshot, "device_", None) or getattr(snapshot, "device", None)
    return torch.device(device) if device is not None else torch.device("cuda", torch.cuda.current_device())


def determine_memory(original: Function) -> Function:
    def determine(self: Any) -> int:
        available = int(original(self))
        engine = current()
        if engine is not None:
            if self.cache_config.kv_cache_memory_bytes:
                engine.hold_other(torch.cuda.max_memory_reserved(self.device))
            else:
                engine.hold_other(self.requested_memory - available)
        return available

    return determine


def initialize(original: Function) -> Function:
    def initialize(self: Any, *args: Any, **options: Any) -> Any:
        engine = current()
        if engine is None:
            return original(self, *args, **options)
        self._elastikv = engine
        with engine.allocating():
            return original(self, *args, **options)

    return initialize


def execute(original: Function) -> Function:
    def execute(self: Any, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        engine = getattr(self, "_elastikv", None)
        if engine is not None and engine.pool is None:
            engine.warm_up(blocks_named(scheduler_output))
        return original(self, scheduler_output, *args, **options)

    return execute


def blocks_named(scheduler_output: Any) -> Iterator[int]:
    for request in scheduler_output.scheduled_new_reqs:
        yield from itertools.chain.from_iterable(request.block_ids)
    for groups in scheduler_output.scheduled_cached_reqs.new_block_ids:
        yield from itertools.chain.from_iterable(groups or ())


def warm_up(original: Function) -> Function:
    def warm_up(self: Any, *args: Any, **options: Any) -> Any:
        try:
            return original(self, *args, **options)
        finally:
            engine = getattr(self, "_elastikv", None)
            if engine is not None:
                engine.warmed_up()

    return warm_up


def sleep(original: Function) -> Function:
    def sleep(self: Any, *args: Any, **options: Any) -> Any:
        result = original(self, *args, **options)
        engine = getattr(self, "_elastikv", None)
        if engine is not None:
            engine.sleep()
        return result

    return sleep


def wake_up(original: Function) -> Function:
    def wake_up(self: Any, *args: Any, **options: Any) -> Any:
        engine = getattr(self, "_elastikv", None)
        if engine is not None:
            engine.wake()
        return original(self, *args, **options)

    return wake_up


def allocate(original: Function) -> Function:
    def allocate(*args: Any, **options: Any) -> Any:
        engine = current()
        if engine is None:
            return original(*args, **options)
        bound = inspect.signature(original).bind(*args, **options).arguments
        device = bound["device"] if "device" in bound else bound["self"].device
        return engine.allocate(bound["kv_cache_config"], device, lambda: original(*args, **options))

    return allocate


def allocate_views(original: Function) -> Function:
    def allocate(kv_cache_config: Any, device: Any, *args: Any, **options: Any) -> Any:
        def plain(config: Any, device: Any) -> Any:
            return original(config, device, *args, **options)

        engine = current()
        return (
            plain(kv_cache_config, device) if engine is None else engine.allocate_views(kv_cache_config, device, plain)
        )

    return allocate


def reshape(original: Function) -> Function:
    def reshape(*args: Any, **options: Any) -> Any:
        engine = current()
        views = original(*args, **options)
        if engine is None:
            return views
        bound = inspect.signature(original).bind(*args, **options)

        def again(raw: dict[str, Any]) -> Any:
            bound.arguments["kv_cache_raw_tensors"] = raw
            return original(*bound.args, **bound.kwargs)

        return engine.place(views, bound.arguments["kv_cache_raw_tensors"], again)

    return reshape


def zero_blocks(original: Function) -> Function:
    """vLLM's kernel takes a layer's blocks to lie one after the other."""

    def zero(self: Any, block_ids: list[int]) -> None:
        engine = getattr(self, "_elastikv", None) or current()
        if engine is None or engine.memory is None:
            original(self, block_ids)
        else:
            engine.memory.zero(block_ids)

    return zero


def copy_blocks(original: Function) -> Function:
    """vLLM's takes a layer's view to have a row a block, or all of its storage to be of blocks."""

    def copy(kv_caches: Any, num_blocks: int, kv_cache_block_copies: Any, *args: Any, **options: Any) -> None:
        caches = list(kv_caches)
        first = caches[0] if caches else None
        memory = None if first is None else memory_of(first[0] if isinstance(first, (list, tuple)) else first)
        if memory is None:
            original(caches, num_blocks, kv_cache_block_copies, *args, **options)
        else:
            memory.copy(kv_cache_block_copies)

    return copy


def zeroer_init(original: Function) -> Function:
    def init(self: Any, *args: Any, **options: Any) -> None:
        self._elastikv = current()
        original(self, *args, **options)

    return init


def fp8_scales(original: Function) -> Function:
    """It would zero whole KV tensors, most of which have no memory; blocks are clean when they come."""

    def init(self: Any) -> None:
        kept, self.kv_caches = self.kv_caches, []
        try:
            original(self)
        finally:
            self.kv_caches = kept

    return init


# --- the scheduler ---


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
        coordinator.block_pool.secure(n, at_once=not to_admit)

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
        f"    if n > 0 and n > len(self.block_pool.stock):\n"
        f"        secure(self, n, {to_admit})\n"
        f"    return n\n",
        made,
    )
    return cast("Function", made["count"])


def elastic_pool(scheduler: Any) -> Any:
    pool = getattr(getattr(scheduler, "kv_cache_manager", None), "block_pool", None)
    return pool if getattr(pool, "memory", None) is not None else None


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


@contextlib.contextmanager
def nothing_if_asleep(scheduler: Any, memory: Any) -> Iterator[None]:
    """vLLM's own pauses let running requests go on."""
    if not memory.asleep:
        yield
        return
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
            try:
                with nothing_if_asleep(self, pool.memory):
                    planned = original(self, *args, **options)
            finally:
                short = pool.end_step()
            pool.expect(upcoming_blocks(self))
        if short and planned.total_num_scheduled_tokens == 0:
            time.sleep(SHORT_OF_MEMORY)  # all of it is in others' use, and the engine would come back at once
        return planned

    return schedule


def ends_requests(original: Function) -> Function:
    def end(self: Any, *args: Any, **options: Any) -> Any:
        result = original(self, *args, **options)
        pool = elastic_pool(self)
        if pool is not None and not self.has_unfinished_requests():
            pool.end_step(idle=True)
        return result

    return end
