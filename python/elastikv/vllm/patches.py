"""What comes around functions of vLLM's engine and worker, one wrapper each.

`versions` has which, and of which versions; `scheduler_patches` is for the scheduler. Each takes the original and
returns what stands in its place. All do what the original does, unless an engine of ours is involved.
"""

from __future__ import annotations

import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from elastikv.vllm.engine import Engine, NotSupported, current
from elastikv.vllm.memory import memory_of
from elastikv.vllm.scheduler_patches import SHORT_OF_MEMORY, launched

Function = Callable[..., Any]


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
        elsewhere = int((args[0] if args else options.get("external_weight_memory", 0)) or 0)  # from 0.33 on
        wanted = math.ceil(init_snapshot.total_memory * cache_config.gpu_memory_utilization) - elsewhere
        device = device_of(init_snapshot)
        refused = wanted <= 0 or (init_snapshot.free_memory < wanted and engine and not engine.has_company(device))
        if engine is None or refused:
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
        result = original(self, scheduler_output, *args, **options)
        if engine is not None and engine.scheduler is not None:
            launched(engine.scheduler)
        return result

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
    """vLLM's takes addresses of blocks from the views, which need not lie as it wants them."""

    def init(self: Any, *args: Any, **options: Any) -> None:
        engine = self._elastikv = current()
        if engine is None or engine.memory is None:
            original(self, *args, **options)
        else:
            self.device, self._meta = engine.memory.device, None  # zero_block_ids is ours

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
