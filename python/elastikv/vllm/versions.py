"""Which vLLM this is, and what of it is patched: everything that differs from version to version stands here.

All of it is checked before any of it is patched. What a later vLLM has changed is then a clear word, and not a crash
in the middle of serving.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from elastikv.vllm.engine import Engine, NotSupported, current

OLDEST, NEWEST = (0, 20), (0, 25)  # minor versions that were tried

Function = Callable[..., Any]


@dataclass(frozen=True)
class Patch:
    """A function of vLLM and what comes around it. Its parameters must begin as given, and may go on."""

    module: str
    path: str  # of the function in the module
    parameters: tuple[str, ...]
    around: Callable[[Function], Function]
    since: tuple[int, int] = OLDEST
    before: tuple[int, int] = (10**6, 0)

    def applies_to(self, version: tuple[int, int]) -> bool:
        return self.since <= version < self.before

    def owner_and_name(self) -> tuple[Any, str]:
        owner: Any = importlib.import_module(self.module)
        *outer, name = self.path.split(".")
        for each in outer:
            owner = getattr(owner, each)
        return owner, name

    def fault(self) -> str | None:
        """What is not as expected, in words."""
        try:
            owner, name = self.owner_and_name()
            function = inspect.getattr_static(owner, name)
        except (ImportError, AttributeError) as error:
            return f"{self.module}.{self.path} is not there ({error})"
        present = tuple(inspect.signature(function).parameters)
        if present[: len(self.parameters)] != self.parameters:
            return f"{self.module}.{self.path} takes ({', '.join(present)}), not ({', '.join(self.parameters)}, ...)"
        return None

    def apply(self) -> None:
        owner, name = self.owner_and_name()
        original = getattr(owner, name)
        setattr(owner, name, functools.wraps(original)(self.around(original)))


def _argument(function: Function, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return inspect.signature(function).bind(*args, **options).arguments[name]


# --- the engine ---


def _engine_init(original: Function) -> Function:
    def start(self: Any, vllm_config: Any, executor_class: Any, *args: Any, **options: Any) -> None:
        from vllm.platforms import current_platform
        from vllm.v1.executor.uniproc_executor import UniProcExecutor

        if not current_platform.is_cuda():
            raise NotSupported("elastikv's vLLM plugin needs a CUDA device (ELASTIKV_VLLM=0 turns it off)")
        in_process = isinstance(executor_class, type) and issubclass(executor_class, UniProcExecutor)
        engine = Engine.of(vllm_config, in_process)
        with engine.starting():
            original(self, vllm_config, executor_class, *args, **options)
        engine.started()
        self._elastikv = engine

    return start


def _engine_shutdown(original: Function) -> Function:
    def shutdown(self: Any, *args: Any, **options: Any) -> Any:
        try:
            return original(self, *args, **options)
        finally:
            engine = getattr(self, "_elastikv", None)
            if engine is not None:
                engine.close()

    return shutdown


# --- the worker ---


def _request_memory(original: Function) -> Function:
    def request(init_snapshot: Any, cache_config: Any, *args: Any, **options: Any) -> int:
        engine = current()
        wanted = math.ceil(init_snapshot.total_memory * cache_config.gpu_memory_utilization)
        device = _device_of(init_snapshot)
        if engine is None or (init_snapshot.free_memory < wanted and not engine.has_company(device)):
            return int(original(init_snapshot, cache_config, *args, **options))
        return engine.ceiling(wanted, init_snapshot.free_memory)

    return request


def _measure(original: Function) -> Function:
    def measure(self: Any) -> None:
        original(self)
        engine = current()
        if engine is not None:
            others = engine.taken_by_others(_device_of(self))
            self.free_memory += others
            self.cuda_memory -= others
            self.non_torch_memory -= others

    return measure


def _device_of(snapshot: Any) -> Any:
    import torch

    device = getattr(snapshot, "device_", None) or getattr(snapshot, "device", None)
    return torch.device(device) if device is not None else torch.device("cuda", torch.cuda.current_device())


def _determine_memory(original: Function) -> Function:
    def determine(self: Any) -> int:
        import torch

        available = int(original(self))
        engine = current()
        if engine is not None:
            if self.cache_config.kv_cache_memory_bytes:
                engine.hold_other(torch.cuda.max_memory_reserved(self.device))
            else:
                engine.hold_other(self.requested_memory - available)
        return available

    return determine


def _initialize(original: Function) -> Function:
    def initialize(self: Any, *args: Any, **options: Any) -> Any:
        engine = current()
        if engine is None:
            return original(self, *args, **options)
        self._elastikv = engine
        with engine.allocating():
            return original(self, *args, **options)

    return initialize


def _sleep(original: Function) -> Function:
    def sleep(self: Any, *args: Any, **options: Any) -> Any:
        result = original(self, *args, **options)
        engine = getattr(self, "_elastikv", None)
        if engine is not None:
            engine.sleep()
        return result

    return sleep


def _wake_up(original: Function) -> Function:
    def wake_up(self: Any, *args: Any, **options: Any) -> Any:
        engine = getattr(self, "_elastikv", None)
        if engine is not None:
            engine.wake()
        return original(self, *args, **options)

    return wake_up


def _allocate(original: Function) -> Function:
    def allocate(*args: Any, **options: Any) -> Any:
        engine = current()
        if engine is None:
            return original(*args, **options)
        bound = inspect.signature(original).bind(*args, **options).arguments
        device = bound["device"] if "device" in bound else bound["self"].device
        return engine.allocate(bound["kv_cache_config"], device, lambda: original(*args, **options))

    return allocate


def _reshape(original: Function) -> Function:
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


def _zero_blocks(original: Function) -> Function:
    """vLLM's kernel takes a layer's blocks to lie one after the other."""

    def zero(self: Any, block_ids: list[int]) -> None:
        engine = getattr(self, "_elastikv", None) or current()
        if engine is None or engine.memory is None:
            original(self, block_ids)
        else:
            engine.memory.zero(block_ids)

    return zero


def _zeroer_init(original: Function) -> Function:
    def init(self: Any, *args: Any, **options: Any) -> None:
        self._elastikv = current()
        original(self, *args, **options)

    return init


def _fp8_scales(original: Function) -> Function:
    """It would zero whole KV tensors, most of which have no memory; blocks are clean when they come."""

    def init(self: Any) -> None:
        kept, self.kv_caches = self.kv_caches, []
        try:
            original(self)
        finally:
            self.kv_caches = kept

    return init


# --- the scheduler ---


def _manager_init(original: Function) -> Function:
    def init(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        engine = current()
        if engine is not None:
            engine.bind(self.block_pool)

    return init


def _blocks_to_allocate(original: Function) -> Function:
    def count(self: Any, *args: Any, **options: Any) -> int:
        n = int(original(self, *args, **options))
        if n > 0:
            secure = getattr(self.block_pool, "secure", None)
            if secure is not None:
                secure(n, at_once=not options.get("apply_admission_cap", False))
        return n

    return count


def _elastic_pool(scheduler: Any) -> Any:
    pool = getattr(getattr(scheduler, "kv_cache_manager", None), "block_pool", None)
    return pool if getattr(pool, "memory", None) is not None else None


def _schedule(original: Function) -> Function:
    def schedule(self: Any, *args: Any, **options: Any) -> Any:
        pool = _elastic_pool(self)
        if pool is None:
            return original(self, *args, **options)
        with pool.step_lock:
            pool.memory.use_stream()
            try:
                return original(self, *args, **options)
            finally:
                pool.end_step()

    return schedule


def _ends_requests(original: Function) -> Function:
    def end(self: Any, *args: Any, **options: Any) -> Any:
        result = original(self, *args, **options)
        pool = _elastic_pool(self)
        if pool is not None and not self.has_unfinished_requests():
            pool.end_step(idle=True)
        return result

    return end


_V1, _V2 = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.attn_utils"
_CORE, _WORKER = "vllm.v1.engine.core", "vllm.v1.worker.gpu_worker"
_SCHEDULER, _COORDINATOR = "vllm.v1.core.sched.scheduler", "vllm.v1.core.kv_cache_coordinator"

PATCHES = (
    Patch(_CORE, "EngineCore.__init__", ("self", "vllm_config", "executor_class", "log_stats"), _engine_init),
    Patch(_CORE, "EngineCore.shutdown", ("self",), _engine_shutdown),
    Patch(_WORKER, "request_memory", ("init_snapshot", "cache_config"), _request_memory),
    Patch("vllm.utils.mem_utils", "MemorySnapshot.measure", ("self",), _measure),
    Patch(_WORKER, "Worker.determine_available_memory", ("self",), _determine_memory),
    Patch(_WORKER, "Worker.initialize_from_config", ("self", "kv_cache_config"), _initialize),
    Patch(_WORKER, "Worker.sleep", ("self", "level"), _sleep),
    Patch(_WORKER, "Worker.wake_up", ("self", "tags"), _wake_up),
    Patch(_V2, "_allocate_kv_cache", ("kv_cache_config",), _allocate),
    Patch(_V2, "_reshape_kv_cache", (), _reshape),
    Patch(_V1, "GPUModelRunner._allocate_kv_cache_tensors", ("self", "kv_cache_config"), _allocate),
    Patch(_V1, "GPUModelRunner._reshape_kv_cache_tensors", ("self", "kv_cache_raw_tensors"), _reshape),
    Patch(_V1, "GPUModelRunner.init_fp8_kv_scales", ("self",), _fp8_scales),
    Patch("vllm.v1.worker.utils", "KVBlockZeroer.__init__", ("self",), _zeroer_init),
    Patch("vllm.v1.worker.utils", "KVBlockZeroer.zero_block_ids", ("self", "block_ids"), _zero_blocks),
    Patch("vllm.v1.core.kv_cache_manager", "KVCacheManager.__init__", ("self", "kv_cache_config"), _manager_init),
    Patch(
        _COORDINATOR,
        "KVCacheCoordinator.get_num_blocks_to_allocate",
        ("self", "request_id", "num_tokens", "new_computed_blocks"),
        _blocks_to_allocate,
    ),
    Patch(_SCHEDULER, "Scheduler.schedule", ("self",), _schedule),
    Patch(_SCHEDULER, "Scheduler.update_from_output", ("self", "scheduler_output"), _ends_requests),
    Patch(_SCHEDULER, "Scheduler.finish_requests", ("self", "request_ids", "finished_status"), _ends_requests),
)

# What ElasticBlockPool overrides or uses of vLLM's block pool, and how it is called.
POOL = "vllm.v1.core.block_pool"
POOL_METHODS = {
    "__init__": ("self", "num_gpu_blocks", "enable_caching", "hash_block_size"),
    "get_new_blocks": ("self", "num_blocks"),
    "free_blocks": ("self", "ordered_blocks"),
    "touch": ("self", "blocks"),
    "evict_blocks": ("self", "block_ids"),
    "reset_prefix_cache": ("self",),
    "get_num_free_blocks": ("self",),
    "get_usage": ("self",),
    "_maybe_evict_cached_block": ("self", "block"),
}
QUEUE_METHODS = {
    "__init__": ("self", "blocks"),
    "popleft_n": ("self", "n"),
    "append_n": ("self", "blocks"),
    "remove": ("self", "block"),
}


def _checks() -> list[Patch]:
    pool = [Patch(POOL, f"BlockPool.{name}", takes, lambda f: f) for name, takes in POOL_METHODS.items()]
    queue = [
        Patch("vllm.v1.core.kv_cache_utils", f"FreeKVCacheBlockQueue.{name}", takes, lambda f: f)
        for name, takes in QUEUE_METHODS.items()
    ]
    return pool + queue


def version_of(text: str) -> tuple[int, int]:
    """Raises NotSupported for a version that is none, or is not known."""
    try:
        major, minor = (int(part) for part in text.split("+")[0].split(".")[:2])
    except ValueError:
        raise NotSupported(f"elastikv does not know vLLM {text}: it is not a release") from None
    if not OLDEST <= (major, minor) <= NEWEST:
        raise NotSupported(
            f"elastikv's plugin knows vLLM {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}, and this is {text}; "
            "nothing was patched (ELASTIKV_VLLM=0 turns the plugin off)"
        )
    return major, minor


def patch_all() -> None:
    """Patches vLLM, once, or nothing of it. Raises NotSupported."""
    import vllm

    version = version_of(vllm.__version__)
    coordinator = importlib.import_module(_COORDINATOR)
    block_pool = importlib.import_module(POOL)
    if hasattr(block_pool.BlockPool, "bind"):
        return  # done before
    patches = [patch for patch in PATCHES if patch.applies_to(version)]
    faults = [fault for patch in [*patches, *_checks()] if (fault := patch.fault()) is not None]
    if coordinator.BlockPool is not block_pool.BlockPool:
        faults.append(f"{_COORDINATOR}.BlockPool is not vLLM's own")
    if faults:
        raise NotSupported(
            f"elastikv's plugin does not fit this vLLM {vllm.__version__}; nothing was patched: {'; '.join(faults)}"
        )
    from elastikv.vllm.block_pool import ElasticBlockPool

    for patch in patches:
        patch.apply()
    for module in (coordinator, block_pool):
        setattr(module, "BlockPool", ElasticBlockPool)  # noqa: B010
