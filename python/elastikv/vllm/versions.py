"""Which vLLM this is, and what of it is patched: everything that differs from version to version stands here.

All of it is checked before any of it is patched. What a later vLLM has changed is then a clear word, and not a crash
in the middle of serving.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from elastikv.vllm import patches
from elastikv.vllm import scheduler_patches as scheduler
from elastikv.vllm.engine import NotSupported

OLDEST, NEWEST = (0, 20), (0, 33)  # minor versions that were tried

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


_V1, _V2 = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.attn_utils"
_CORE, _WORKER = "vllm.v1.engine.core", "vllm.v1.worker.gpu_worker"
_ONE_TENSOR = (0, 29)  # the version from which a function makes the KV cache's tensor and all its views
_SCHEDULER, _COORDINATOR = "vllm.v1.core.sched.scheduler", "vllm.v1.core.kv_cache_coordinator"
_COPY = ("kv_caches", "num_blocks", "kv_cache_block_copies")

PATCHES = (
    Patch(_CORE, "EngineCore.__init__", ("self", "vllm_config", "executor_class", "log_stats"), patches.engine_init),
    Patch(_CORE, "EngineCore.shutdown", ("self",), patches.engine_shutdown),
    Patch(_CORE, "EngineCore.step", ("self",), patches.step),
    Patch(_CORE, "EngineCore.step_with_batch_queue", ("self",), patches.step),
    Patch(_CORE, "EngineCore.resume_scheduler", ("self",), patches.resume_scheduler),
    Patch(_WORKER, "request_memory", ("init_snapshot", "cache_config"), patches.request_memory),
    Patch("vllm.utils.mem_utils", "MemorySnapshot.measure", ("self",), patches.measure),
    Patch(_WORKER, "Worker.determine_available_memory", ("self",), patches.determine_memory),
    Patch(_WORKER, "Worker.initialize_from_config", ("self", "kv_cache_config"), patches.initialize),
    Patch(_WORKER, "Worker.execute_model", ("self", "scheduler_output"), patches.execute),
    Patch(_WORKER, "Worker.compile_or_warm_up_model", ("self",), patches.warm_up),
    Patch(_WORKER, "Worker.sleep", ("self", "level"), patches.sleep),
    Patch(_WORKER, "Worker.wake_up", ("self", "tags"), patches.wake_up),
    Patch(_V2, "_allocate_kv_cache", ("kv_cache_config",), patches.allocate, before=_ONE_TENSOR),
    Patch(_V2, "_reshape_kv_cache", (), patches.reshape, before=_ONE_TENSOR),
    Patch(
        _V1,
        "GPUModelRunner._allocate_kv_cache_tensors",
        ("self", "kv_cache_config"),
        patches.allocate,
        before=_ONE_TENSOR,
    ),
    Patch(
        _V1,
        "GPUModelRunner._reshape_kv_cache_tensors",
        ("self", "kv_cache_raw_tensors"),
        patches.reshape,
        before=_ONE_TENSOR,
    ),
    Patch(_V1, "GPUModelRunner.init_fp8_kv_scales", ("self",), patches.fp8_scales, before=_ONE_TENSOR),
    Patch(_V2, "allocate_kv_cache", ("kv_cache_config", "device", "layout"), patches.allocate_views, since=_ONE_TENSOR),
    Patch(_V1, "allocate_kv_cache", ("kv_cache_config", "device", "layout"), patches.allocate_views, since=_ONE_TENSOR),
    Patch(_V1, "copy_kv_cache_blocks_inplace", _COPY, patches.copy_blocks, since=(0, 26)),
    Patch("vllm.v1.worker.gpu.model_runner", "copy_kv_cache_blocks_inplace", _COPY, patches.copy_blocks, since=(0, 26)),
    Patch("vllm.v1.worker.utils", "KVBlockZeroer.__init__", ("self",), patches.zeroer_init),
    Patch("vllm.v1.worker.utils", "KVBlockZeroer.zero_block_ids", ("self", "block_ids"), patches.zero_blocks),
    Patch(
        "vllm.v1.core.kv_cache_manager",
        "KVCacheManager.__init__",
        ("self", "kv_cache_config"),
        scheduler.manager_init,
    ),
    Patch(
        _COORDINATOR,
        "KVCacheCoordinator.get_num_blocks_to_allocate",
        ("self", "request_id", "num_tokens", "new_computed_blocks"),
        scheduler.blocks_to_allocate,
    ),
    Patch(
        _SCHEDULER,
        "Scheduler._free_cow_retained_blocks",
        ("self", "blocks", "fence_seq"),
        scheduler.free_copied,
        since=(0, 26),
    ),
    Patch(_SCHEDULER, "Scheduler.add_request", ("self", "request"), scheduler.announces),
    Patch(_SCHEDULER, "Scheduler.schedule", ("self",), scheduler.schedule),
    Patch(_SCHEDULER, "Scheduler.update_from_output", ("self", "scheduler_output"), scheduler.ends_requests),
    Patch(
        _SCHEDULER,
        "Scheduler.finish_requests",
        ("self", "request_ids", "finished_status"),
        scheduler.ends_requests,
    ),
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
    chosen = [patch for patch in PATCHES if patch.applies_to(version)]
    faults = [fault for patch in [*chosen, *_checks()] if (fault := patch.fault()) is not None]
    if coordinator.BlockPool is not block_pool.BlockPool:
        faults.append(f"{_COORDINATOR}.BlockPool is not vLLM's own")
    if faults:
        raise NotSupported(
            f"elastikv's plugin does not fit this vLLM {vllm.__version__}; nothing was patched: {'; '.join(faults)}"
        )
    from elastikv.vllm.block_pool import ElasticBlockPool

    for patch in chosen:
        patch.apply()
    for module in (coordinator, block_pool):
        setattr(module, "BlockPool", ElasticBlockPool)  # noqa: B010
