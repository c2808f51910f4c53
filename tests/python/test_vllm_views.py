"""vLLM's views of its one KV tensor, from 0.29 on, over elastic blocks: the same shapes, and nobody over another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")

import vllm_engine  # noqa: F401, I001 (takes care of xgrammar)
import vllm.v1.worker.gpu.model_runner as runner_2
import vllm.v1.worker.gpu_model_runner as runner_1
from vllm.v1.kv_cache_interface import KVQuantMode
from vllm.v1.worker.utils import KVBlockZeroer
from elastikv.vllm.layout import LayoutNotPossible, parts_of_placed
from elastikv.vllm.patches import copy_blocks
from vllm_engine import (
    BLOCK,
    LAYER_BYTES,
    LAYERS,
    ONE_TENSOR,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheLayout,
    KVCacheTensor,
    MambaSpec,
    cache_config,
    engine_of_layout,
    runner_v2,
    tables_of,
)

pytestmark = pytest.mark.skipif(not ONE_TENSOR, reason="test_vllm_layout is for vLLM before 0.29")

BLOCKS = 24
CPU = torch.device("cpu")
LAYOUTS = ("LBNHC", "LBHNC", "BLNHC", "BLHNC")


@pytest.fixture(params=["blocks", "layers"])
def engine(request):
    with engine_of_layout("test-views", request.param) as made:
        yield made


def config_of(layout: str, windows=(None,), heads: int = 1) -> KVCacheConfig:
    """As vLLM plans it: layers outside of the blocks, or blocks outside of the layers."""
    config = cache_config(BLOCKS, windows)
    page = LAYER_BYTES * heads
    strides = (page, LAYERS * page) if layout.startswith("B") else (page * BLOCKS, page)
    for group in config.kv_cache_groups:
        group.kv_cache_spec = replace(group.kv_cache_spec, num_kv_heads=heads)
    tensors = [replace(each, size=LAYERS * page * BLOCKS, layer_stride=strides[0], block_stride=strides[1])
               for each in config.kv_cache_tensors]  # fmt: skip
    return replace(config, kv_cache_tensors=tensors)


def views_of(config: KVCacheConfig, layout: str, kernel_block: int | None = None) -> dict[str, torch.Tensor]:
    kernel_blocks = None if kernel_block is None else [kernel_block] * len(config.kv_cache_groups)
    return runner_v2.allocate_kv_cache(config, CPU, KVCacheLayout[layout], kernel_blocks)


def elastic_views_of(engine, *arguments) -> dict[str, torch.Tensor]:
    with engine.starting(), engine.allocating():
        return views_of(*arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel_block", [BLOCK, BLOCK // 2])
@pytest.mark.parametrize("windows", [(None,), (None, 32)])
@pytest.mark.parametrize("heads", [1, 2])
def test_views_are_vllms_over_our_blocks(engine, layout, kernel_block, windows, heads):
    config, cut = config_of(layout, windows, heads), BLOCK // kernel_block
    if cut > 1 and layout.startswith("B"):
        pytest.skip("vLLM does not cut blocks that lie outside of the layers")
    plain = views_of(config, layout, kernel_block)
    views = elastic_views_of(engine, config, layout, kernel_block)
    memory = engine.memory
    assert memory.blocks.held == 1 and memory.layout.size == LAYERS * LAYER_BYTES * heads
    assert views.keys() == plain.keys()
    ids = memory.try_allocate(10)
    memory.raw[ids] = 0
    tables = tables_of(memory, ids)
    for layer, view in views.items():
        assert view.shape[1:] == plain[layer].shape[1:] and view.dtype == plain[layer].dtype
        assert view.stride()[1:] == plain[layer].stride()[1:]
        assert view.shape[0] > max(tables) * cut
        assert view.untyped_storage().data_ptr() == memory.blocks.base_address
    layers = [f"0.{i}" for i in range(LAYERS)]
    wanted = {(layer, block, part): 100 * number + 10 * at + part for number, layer in enumerate(layers)
              for at, block in enumerate(tables) for part in range(cut)}  # fmt: skip
    for (layer, block, part), value in wanted.items():
        views[layer][block * cut + part].fill_(value)
    for (layer, block, part), value in wanted.items():  # nobody wrote over another
        assert views[layer][block * cut + part].eq(torch.tensor(value, dtype=views[layer].dtype)).all()
    if len(windows) > 1:
        assert all(views[f"0.{i}"].data_ptr() == views[f"1.{i}"].data_ptr() for i in range(LAYERS))
    memory.zero(tables[:5])
    for (layer, block, part), value in wanted.items():
        zeroed = block in tables[:5] or value == 0
        assert views[layer][block * cut + part].eq(0).all() == zeroed


def test_states_of_recurrent_layers_are_pages(engine):
    shapes, dtypes = ((4, 6), (3, 5)), (torch.float32, torch.bfloat16)
    config = config_of("LBNHC")
    spec = MambaSpec(block_size=BLOCK, shapes=shapes, dtypes=dtypes, page_size_padded=LAYER_BYTES)
    config.kv_cache_groups[0].kv_cache_spec = spec
    views = elastic_views_of(engine, config, "LBNHC")
    tables = tables_of(engine.memory, engine.memory.try_allocate(5))
    for number, view in enumerate(views.values()):
        view[tables] = number + 1
    for number, view in enumerate(views.values()):
        held = view[tables]  # a view as a whole reaches where no memory is, and could not even be printed
        assert held[0].nbytes == 4 * 4 * 6 + 2 * 3 * 5 and held.eq(number + 1).all()


def test_layers_of_different_sizes_lie_side_by_side(engine):
    """Each in a tensor of its own, behind the other in a block."""
    config = config_of("LBNHC")
    small, large = (FullAttentionSpec(block_size=BLOCK, num_kv_heads=heads, head_size=8, dtype=torch.bfloat16)
                    for heads in (1, 2))  # fmt: skip
    size = 3 * LAYER_BYTES * BLOCKS
    config = replace(
        config,
        kv_cache_tensors=[
            KVCacheTensor(size, ["small"], LAYER_BYTES * BLOCKS, LAYER_BYTES),
            KVCacheTensor(size, ["large"], 2 * LAYER_BYTES * BLOCKS, 2 * LAYER_BYTES, offset=LAYER_BYTES * BLOCKS),
        ],
        kv_cache_groups=[KVCacheGroupSpec(["small"], small), KVCacheGroupSpec(["large"], large)],
    )
    views = elastic_views_of(engine, config, "LBNHC")
    assert engine.memory.layout.size == 3 * LAYER_BYTES
    tables = engine.memory.try_allocate(8)
    for value, name in ((3, "small"), (4, "large")):
        views[name][tables] = value
    assert views["small"][tables].eq(3).all() and views["large"][tables].eq(4).all()


@pytest.mark.parametrize("layout", ["LBNHC", "BLNHC"])
def test_blocks_are_copied_in_all_layers(engine, layout):
    """As vLLM's runners ask for it, where a request goes on with a part of another's block."""
    config = config_of(layout)
    views = elastic_views_of(engine, config, layout, BLOCK)
    tables = tables_of(engine.memory, engine.memory.try_allocate(6))
    for number, view in enumerate(views.values()):
        for at, block in enumerate(tables):
            view[block] = 10 * number + at
    for module in (runner_1, runner_2):
        module.copy_kv_cache_blocks_inplace(views.values(), BLOCKS, [])
    runner_1.copy_kv_cache_blocks_inplace(views.values(), BLOCKS, [(tables[0], tables[3]), (tables[1], tables[0])])
    runner_2.copy_kv_cache_blocks_inplace(views.values(), BLOCKS, [(tables[2], tables[5])])
    for number, view in enumerate(views.values()):
        held = view[tables].flatten(1)
        assert held[:, 0].tolist() == [10 * number + at for at in (1, 1, 2, 0, 4, 2)]
        assert held.eq(held[:, :1]).all()
    called, plain = [], views_of(config, layout, BLOCK)
    copy_blocks(lambda *arguments: called.append(arguments))(plain.values(), BLOCKS, [(1, 2)])
    assert called == [(list(plain.values()), BLOCKS, [(1, 2)])]  # of torch's own tensors vLLM copies


def test_zeroing_needs_nothing_of_the_views(engine):
    config = config_of("LBNHC")
    views = elastic_views_of(engine, config, "LBNHC", BLOCK)
    with engine.starting():
        zeroer = KVBlockZeroer(CPU, [], [BLOCK], {}, BLOCKS)
    tables = tables_of(engine.memory, engine.memory.try_allocate(3))
    for view in views.values():
        view[tables] = 7
    zeroer.zero_block_ids(tables[:2])
    for view in views.values():
        assert view[tables[:2]].eq(0).all() and view[tables[2:]].eq(7).all()


def test_caches_that_are_more_than_blocks_are_vllms_own(engine):
    """Scales for each token are set for all blocks at once; some kernels ask how far apart blocks lie."""
    config = config_of("LBNHC")
    spec = config.kv_cache_groups[0].kv_cache_spec
    quantized = KVQuantMode(next(mode for mode in KVQuantMode if mode.is_per_token_head))
    odd_ones = [replace(spec, kv_quant_mode=quantized)]
    if hasattr(spec, "block_stride_alignment"):
        odd_ones.append(replace(spec, block_stride_alignment=3 * 512))
    for odd in odd_ones:
        page = odd.page_size_bytes
        tensors = [replace(each, size=LAYERS * page * BLOCKS, layer_stride=page * BLOCKS, block_stride=page)
                   for each in config.kv_cache_tensors]  # fmt: skip
        other = replace(config, kv_cache_tensors=tensors, kv_cache_groups=[KVCacheGroupSpec(["0.0", "0.1"], odd)])
        views = elastic_views_of(engine, other, "LBNHC")
        assert engine.memory is None and all(not view.is_meta for view in views.values())


def test_profiling_runs_have_tensors_of_their_own(engine):
    with engine.starting():
        views = views_of(config_of("LBNHC"), "LBNHC")
    assert engine.memory is None and all(not view.is_meta for view in views.values())


def test_a_layout_that_forbids_it_falls_back(engine, monkeypatch):
    """Heads outside of the layers: a block of a layer is then in as many pieces as it has heads."""
    warnings = []
    monkeypatch.setattr("elastikv.vllm.engine.logger.warning", lambda text, *args: warnings.append(text % args))
    config = config_of("BHLNC", heads=2)
    half = LAYER_BYTES
    tensors = [replace(each, layer_stride=half, block_stride=2 * LAYERS * half) for each in config.kv_cache_tensors]
    config = replace(config, kv_cache_tensors=tensors)
    plain = views_of(config, "BHLNC")
    views = elastic_views_of(engine, config, "BHLNC")
    assert engine.memory is None
    assert all(not view.is_meta and view.shape == plain[layer].shape for layer, view in views.items())
    assert all(view.stride() == plain[layer].stride() for layer, view in views.items())
    assert any("vLLM's own and of fixed size" in text for text in warnings)


def test_what_does_not_lie_in_blocks_is_told():
    def placed(**changes):
        return [KVCacheTensor(**{"size": 0, "layers": ["a", "b"], "layer_stride": 512 * 24, "block_stride": 512,
                                 "offset": 0, **changes})]  # fmt: skip

    assert parts_of_placed(24, placed(), lambda _: 512).size == 1024
    with pytest.raises(LayoutNotPossible, match="don't lie behind 25"):
        parts_of_placed(25, placed(), lambda _: 512)
    with pytest.raises(LayoutNotPossible, match="from 512 of 1000 on"):
        parts_of_placed(24, placed(layer_stride=512, block_stride=1000), lambda _: 512)
    with pytest.raises(LayoutNotPossible, match="begins 100 bytes into a block"):
        parts_of_placed(24, placed(offset=100, layer_stride=512, block_stride=2048), lambda _: 512)
