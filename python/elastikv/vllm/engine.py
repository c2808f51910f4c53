"""One vLLM engine and its memory, from the planning of the cache to the end."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

import elastikv
from elastikv.vllm.layout import (
    BlockParts,
    LayoutNotPossible,
    parts_of,
    parts_of_placed,
    place,
    require_stride,
    specs_of,
    stand_in_config,
    stand_ins,
)
from elastikv.vllm.memory import KVMemory, find_ledger, ledger_name
from elastikv.vllm.settings import Settings

logger = logging.getLogger("vllm.elastikv")

CONTEXT_BYTES = 512 << 20  # of a CUDA context and its modules, which no profile of vLLM counts
_current = threading.local()


class NotSupported(RuntimeError):
    """What was asked of vLLM does not go with elastic memory; the message says what would."""


def current() -> Engine | None:
    """The engine that this thread starts."""
    return getattr(_current, "engine", None)


class Engine:
    """Where worker and scheduler meet: both run in one process, and start on one thread. Not thread safe."""

    def __init__(self, settings: Settings, name: str) -> None:
        self.settings, self.name = settings, name
        self.memory: KVMemory | None = None
        self.pool: Any = None  # the ElasticBlockPool that is bound to it
        self.other_bytes = 0
        self.device_bytes: int | None = None
        self.sleeper: Any = None  # see there; once there is a core
        self.scheduler: Any = None  # likewise
        self._allocating = False
        self._plain: Callable[[], dict[str, torch.Tensor]] | None = None

    @classmethod
    def of(cls, vllm_config: Any, in_process: bool) -> Engine:
        """Raises NotSupported, and ValueError for a bad setting."""
        parallel = vllm_config.parallel_config
        if parallel.world_size > 1 or not in_process:
            raise NotSupported(
                "elastikv's plugin serves engines whose worker runs in the engine's own process: tensor and pipeline "
                f"parallel size 1, not {parallel.tensor_parallel_size} and {parallel.pipeline_parallel_size}, and the "
                "default executor (ELASTIKV_VLLM=0 turns the plugin off)"
            )
        if parallel.data_parallel_size > 1:
            raise NotSupported(
                f"elastikv's plugin serves one data-parallel rank, not {parallel.data_parallel_size}: start an engine "
                "a rank, which may share a GPU (ELASTIKV_VLLM=0 turns the plugin off)"
            )
        if vllm_config.kv_transfer_config is not None:
            raise NotSupported("elastikv's plugin does not go with KV connectors yet (ELASTIKV_VLLM=0 turns it off)")
        settings = Settings.read(vllm_config.additional_config)
        if settings.layout == "layers" and getattr(vllm_config.model_config, "enable_return_routed_experts", False):
            raise NotSupported(
                "vLLM counts routed experts by block ids, which elastikv's layout 'layers' spreads: "
                "ELASTIKV_VLLM_LAYOUT=blocks goes with it"
            )
        served = vllm_config.model_config.served_model_name or vllm_config.model_config.model
        name = settings.name or (served if isinstance(served, str) else served[0])
        return cls(settings, name.rstrip("/").split("/")[-1] if name.startswith("/") else name)

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """What this thread plans and allocates meanwhile is this engine's."""
        before = current()
        _current.engine = self
        try:
            yield
        finally:
            _current.engine = before

    # --- how large it may be ---

    def taken_by_others(self, device: torch.device) -> int:
        """Bytes of KV cache that other engines of the pool hold now. They come and go, and are nobody's for good."""
        ledger = find_ledger(ledger_name(self.settings.pool, device))
        return ledger.stats().charged if ledger is not None else 0

    def has_company(self, device: torch.device) -> bool:
        """Whether other engines of the pool run on the device."""
        return find_ledger(ledger_name(self.settings.pool, device)) is not None

    def hold_other(self, size: int) -> None:
        """Bytes that the engine holds beside its KV cache, by vLLM's profile."""
        self.other_bytes = max(0, size) + CONTEXT_BYTES

    def ceiling(self, wanted: int, free: int) -> int:
        """Bytes that the engine may take in all: gpu_memory_utilization's, as far as others' weights allow."""
        if free < wanted:
            logger.info(
                "others hold memory of the device: %.2f of the %.2f GiB that gpu_memory_utilization allows can be had",
                free / 2**30,
                wanted / 2**30,
            )
        return min(free, wanted)

    # --- its tensors ---

    @contextlib.contextmanager
    def allocating(self) -> Iterator[None]:
        """KV tensors of profiling runs are torch's own; those that are made within this are elastic."""
        self._allocating = True
        try:
            yield
        finally:
            self._allocating = False

    def allocate(
        self, config: Any, device: torch.device, plain: Callable[[], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Stand-ins for vLLM's raw tensors by layer, once there are blocks; `plain` makes torch's own."""
        if not self._allocating or not config.kv_cache_tensors:
            return plain()
        self._plain = plain
        try:
            specs_of(config)
            layout = parts_of(config.num_blocks, config.kv_cache_tensors)
        except LayoutNotPossible as error:
            return self._fall_back(error)
        self._make_memory(config.num_blocks, device, layout)
        return stand_ins(layout)

    def allocate_views(
        self, config: Any, device: torch.device, plain: Callable[[Any, torch.device], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """The same from vLLM 0.29 on, where one function makes tensor and views: views over blocks.

        plain: makes vLLM's, of a config on a device.
        """
        if not self._allocating or not config.kv_cache_tensors:
            return plain(config, device)
        self._plain = lambda: plain(config, device)
        try:
            specs = specs_of(config)
            pages = {layer: int(spec.page_size_bytes) for layer, spec in specs.items()}
            layout = parts_of_placed(config.num_blocks, config.kv_cache_tensors, pages.__getitem__)
            self._make_memory(config.num_blocks, device, layout)
            views = plain(stand_in_config(config, pages), torch.device("meta"))
            assert self.memory is not None
            placed = {}
            for layer, view in views.items():
                blocks, part = self.memory.arrangement.blocks_of(layer)
                placed[layer] = place(view, part, blocks)
                require_stride(layer, placed[layer], specs[layer])
            return placed
        except LayoutNotPossible as error:
            return self._fall_back(error)

    def _make_memory(self, num_blocks: int, device: torch.device, layout: BlockParts) -> None:
        self.close()
        total = self.device_bytes or torch.cuda.get_device_properties(device).total_memory
        try:
            self.memory = KVMemory(
                self.settings,
                self.name,
                device,
                num_blocks,
                layout,
                device_bytes=total,
                other_bytes=self.other_bytes if self.settings.other is None else self.settings.other,
            )
        except elastikv.InvalidArgument as error:
            raise NotSupported(f"elastikv: '{self.name}' finds no place in its pool: {error}") from error

    def place(
        self,
        views: Mapping[str, Any],
        raw: Mapping[str, torch.Tensor],
        again: Callable[[dict[str, torch.Tensor]], dict[str, Any]],
    ) -> dict[str, Any]:
        """vLLM's views over stand-ins as views over blocks; `again` makes vLLM's over other raw tensors."""
        memory = self.memory
        if memory is None or not any(tensor.is_meta for tensor in raw.values()):
            return dict(views)
        placed: dict[int, Any] = {}  # by view, as layers may share one
        try:
            for layer, view in views.items():
                if id(view) not in placed:
                    blocks, part = memory.arrangement.blocks_of(layer)
                    many = isinstance(view, (list, tuple))
                    each = [place(one, part, blocks) for one in (view if many else [view])]
                    placed[id(view)] = each if many else each[0]
        except LayoutNotPossible as error:
            return again(self._fall_back(error))
        return {layer: placed[id(view)] for layer, view in views.items()}

    def _fall_back(self, error: LayoutNotPossible) -> dict[str, torch.Tensor]:
        logger.warning("elastikv can't serve this model's KV cache, so it is vLLM's own and of fixed size: %s", error)
        self.close()
        assert self._plain is not None
        return self._plain()

    # --- its blocks ---

    def warm_up(self, blocks: Iterable[int]) -> None:
        """Until there is a scheduler, vLLM runs requests of its own, with blocks of its own choice."""
        if self.memory is not None and self.pool is None:
            self.memory.hold_up_to(max(blocks, default=0))

    def warmed_up(self) -> None:
        if self.memory is not None:
            self.memory.let_go()

    def bind(self, pool: Any) -> None:
        """The scheduler's block pool takes its blocks from the memory."""
        if self.memory is not None and self.pool is None and hasattr(pool, "bind"):
            pool.bind(self.memory, self.settings.prefix_cache)
            self.pool = pool

    def started(self, core: Any = None) -> None:
        """Raises NotSupported where the scheduler did not take the memory that the worker has."""
        if self.memory is not None and self.pool is None:
            raise NotSupported("elastikv: this scheduler has no block pool of vLLM's (ELASTIKV_VLLM=0 turns it off)")
        if self.memory is not None and core is not None:
            from elastikv.vllm.sleeper import Sleeper

            self.sleeper, self.scheduler = Sleeper(core, self.memory), core.scheduler

    # --- sleep, wake, end ---

    def sleep(self) -> None:
        """No block is needed any more: cached ones go. vLLM has reset its prefix cache, or does so after waking."""
        if self.memory is None:
            return
        if self.pool is not None:
            self.pool.end_step(idle=True)
            self.pool.reset_prefix_cache()
        self.memory.sleep()

    def wake(self) -> None:
        if self.memory is not None:
            self.memory.wake()

    def close(self) -> None:
        memory, self.memory = self.memory, None
        if memory is not None:
            memory.close()
