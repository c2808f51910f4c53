"""vLLM's own block pool, cache manager and scheduler on the host backend, plain and over elastic blocks."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Iterator, Sequence

import pytest
import torch

import vllm_without_xgrammar  # noqa: F401

pytest.importorskip("vllm", reason="vLLM is not installed")

import vllm.v1.worker.gpu.attn_utils as runner_v2
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

try:
    from vllm.v1.kv_cache_layout import KVCacheLayout
except ImportError:  # before 0.29
    KVCacheLayout = None
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.utils import AttentionGroup

from elastikv.vllm.block_pool import ElasticBlockPool
from elastikv.vllm.engine import Engine
from elastikv.vllm.memory import KVMemory
from elastikv.vllm.settings import Settings
from elastikv.vllm.versions import patch_all

# xgrammar is taken care of here, for all.
__all__ = [
    "AttentionGroup", "FullAttentionSpec", "GPUModelRunner", "KVCacheConfig", "KVCacheGroupSpec", "KVCacheLayout",
    "KVCacheTensor", "MambaSpec", "runner_v2",
]  # fmt: skip

patch_all()
init_none_hash(sha256)

BLOCK = 16  # tokens
HEADS, HEAD = 1, 8
LAYER_BYTES = 2 * BLOCK * HEADS * HEAD * 2  # K and V, bfloat16: 512
LAYERS = 2
ONE_TENSOR = hasattr(runner_v2, "allocate_kv_cache")  # from vLLM 0.29 on one function makes all views


def spec(window: int | None = None) -> FullAttentionSpec | SlidingWindowSpec:
    shape = {"block_size": BLOCK, "num_kv_heads": HEADS, "head_size": HEAD, "dtype": torch.bfloat16}
    return FullAttentionSpec(**shape) if window is None else SlidingWindowSpec(**shape, sliding_window=window)


def cache_config(num_blocks: int, windows: tuple[int | None, ...] = (None,)) -> KVCacheConfig:
    """A group for each window, of LAYERS layers; layer i of all groups has the same bytes, as vLLM has it."""
    region = LAYER_BYTES * num_blocks
    if ONE_TENSOR:
        layers = [[f"{g}.{i}" for i in range(LAYERS)] for g in range(len(windows))]
        tensors = [KVCacheTensor(LAYERS * region, each, region, LAYER_BYTES) for each in layers]
    else:
        shared = [[f"{g}.{i}" for g in range(len(windows))] for i in range(LAYERS)]
        tensors = [KVCacheTensor(size=region, shared_by=each) for each in shared]
    return KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=tensors,
        kv_cache_groups=[
            KVCacheGroupSpec([f"{g}.{i}" for i in range(LAYERS)], spec(window)) for g, window in enumerate(windows)
        ],
    )


def manager_of(config: KVCacheConfig, max_model_len: int = 8192) -> KVCacheManager:
    options = {"max_model_len": max_model_len, "scheduler_block_size": BLOCK, "hash_block_size": BLOCK}
    known = inspect.signature(KVCacheManager.__init__).parameters  # they differ from version to version
    return KVCacheManager(config, **{name: value for name, value in options.items() if name in known})


def allocate(engine: Engine, config: KVCacheConfig) -> dict[str, torch.Tensor]:
    """As vLLM's runners do: raw tensors, or views."""
    if ONE_TENSOR:
        return runner_v2.allocate_kv_cache(config, torch.device("cpu"), KVCacheLayout.LBNHC)
    return engine.allocate(config, torch.device("cpu"), dict)


@contextlib.contextmanager
def engine_of_layout(pool: str, layout: str) -> Iterator[Engine]:
    """An engine that has not allocated yet, with small extents."""
    made = Engine(Settings(pool=pool, limit=1 << 26, extent=4096, park=0, layout=layout), "chat")
    made.device_bytes = 1 << 26
    yield made
    made.close()


def tables_of(memory: KVMemory, ids: Sequence[int]) -> list[int]:
    """What block tables hold for the elastic pool's blocks."""
    return [memory.arrangement.table_id(block) for block in ids]


class HostEngine:
    """An engine without a worker or a model: its memory, and a cache manager that draws on it."""

    def __init__(self, config: KVCacheConfig, pool: str, name: str = "chat", **settings: object) -> None:
        settings.setdefault("limit", 1 << 30)
        settings.setdefault("park", 0)
        settings.setdefault("extent", 4096)
        settings.setdefault("ahead", 0)
        self.engine = Engine(Settings(pool=pool, **settings), name)
        self.engine.device_bytes = 1 << 30
        with self.engine.starting(), self.engine.allocating():
            self.raw = allocate(self.engine, config)
            self.manager = manager_of(config)
        self.pool: ElasticBlockPool = self.manager.block_pool
        self.memory = self.engine.memory
        assert self.engine.pool is self.pool and self.memory is not None

    def settled(self) -> int:
        """Physical bytes of all extents, once what was freed has gone."""
        self.memory.model.drain()
        return self.memory.model.stats().physical_usage

    def check(self) -> None:
        """The books of both sides agree, and no block is anyone's twice."""
        pool, memory = self.pool, self.memory
        block_of = memory.arrangement.block_of
        cached = [block_of(block.block_id) for block in pool.free_block_queue.in_order()]
        used = [block_of(block.block_id) for block in pool.blocks if block.ref_cnt > 0 and not block.is_null]
        everyone = [0, *cached, *used, *pool.stock]
        assert len(set(everyone)) == len(everyone) == memory.blocks.held
        assert all(memory.blocks.references(block) == 1 for block in everyone)
        assert len(cached) == pool.free_block_queue.num_free_blocks
        assert all(pool.blocks[i].block_hash is not None for i in cached)
        assert pool.in_use() == len(used)
        extents = {block // memory.blocks_per_extent for block in everyone}
        assert memory.physical_bytes == len(extents) * memory.blocks.extent_bytes

    def close(self) -> None:
        self.engine.close()


def request_of(number: int, tokens: list[int]) -> Request:
    return Request(
        request_id=str(number),
        prompt_token_ids=tokens,
        sampling_params=SamplingParams(max_tokens=17),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


def random_prompt(chance: random.Random) -> list[int]:
    """Prompts that share their beginnings often."""
    shared = chance.randrange(4)
    tokens = [shared * 1000 + i for i in range(BLOCK * chance.randrange(0, 12))]
    return tokens + [chance.randrange(10**6) for _ in range(chance.randrange(1, 120))]
