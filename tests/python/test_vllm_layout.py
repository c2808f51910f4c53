"""vLLM's KV tensors over elastic blocks: its own reshaping, in both model runners, and what lies where.

test_vllm_views has the same for vLLM from 0.29 on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.model_executor.layers.mamba.abstract import MambaBase

from elastikv.vllm.layout import MARK, BlockParts, LayerByLayer, LayoutNotPossible, Part, parts_of, place, stand_ins
from elastikv.vllm.versions import version_of
from vllm_engine import (
    BLOCK,
    HEAD,
    HEADS,
    LAYER_BYTES,
    LAYERS,
    AttentionGroup,
    GPUModelRunner,
    MambaSpec,
    cache_config,
    engine_of_layout,
    runner_v2,
    tables_of,
)

# Its runners are called as this version has them.
pytestmark = pytest.mark.skipif(
    not (0, 25) <= version_of(vllm.__version__) < (0, 29),
    reason="vLLM's runners are different before 0.25 and from 0.29",
)
BLOCKS = 24


def backend(kv_first: bool = False, heads_first: bool = False) -> type:
    """As vLLM's attention back ends lay out their tensors."""

    class Backend:
        @staticmethod
        def get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str="auto"):
            front = (2, num_blocks) if kv_first else (num_blocks, 2)
            return (*front, block_size, num_kv_heads, head_size)

        @classmethod
        def get_kv_cache_block_dim(cls, *args, **options):
            return 1 if kv_first else 0

        @staticmethod
        def get_kv_cache_stride_order():
            return (0, 1, 3, 2, 4) if heads_first else (0, 1, 2, 3, 4)

    return Backend


@pytest.fixture(params=["blocks", "layers"])
def engine(request):
    with engine_of_layout("test-layout", request.param) as made:
        yield made


def without(shape, dim):
    return [size for at, size in enumerate(shape) if at != dim]


def views_by_runner_2(engine, config, backend, kernel_block):
    groups = [
        AttentionGroup(backend, group.layer_names, group.kv_cache_spec, i)
        for i, group in enumerate(config.kv_cache_groups)
    ]
    raw = runner_v2._allocate_kv_cache(config, {}, torch.device("cpu"))
    return runner_v2._reshape_kv_cache(groups, raw, "auto", [kernel_block] * len(groups), {}, config)


def views_by_runner_1(engine, config, backend, kernel_block):
    groups = [
        [AttentionGroup(backend, group.layer_names, group.kv_cache_spec, i)]
        for i, group in enumerate(config.kv_cache_groups)
    ]
    runner = SimpleNamespace(
        device=torch.device("cpu"),
        kv_cache_config=config,
        attn_groups=groups,
        runner_only_attn_layers=set(),
        cache_config=SimpleNamespace(cache_dtype="auto"),
    )
    for name in ("_kv_cache_spec_attn_group_iterator", "_has_mixed_attention_kv_layout"):
        setattr(runner, name, getattr(GPUModelRunner, name).__get__(runner))
    raw = GPUModelRunner._allocate_kv_cache_tensors(runner, config)
    return GPUModelRunner._reshape_kv_cache_tensors(runner, raw, [kernel_block] * len(groups))


RUNNERS = pytest.mark.parametrize("make_views", [views_by_runner_1, views_by_runner_2])


@RUNNERS
@pytest.mark.parametrize("kv_first", [False, True])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("kernel_block", [BLOCK, BLOCK // 2])
@pytest.mark.parametrize("windows", [(None,), (None, 32)])
def test_views_are_vllms_over_our_blocks(engine, make_views, kv_first, heads_first, kernel_block, windows):
    config, kind = cache_config(BLOCKS, windows), backend(kv_first, heads_first)
    plain = make_views(engine, config, kind, kernel_block)
    with engine.starting(), engine.allocating():
        views = make_views(engine, config, kind, kernel_block)
    memory = engine.memory
    assert memory.blocks.held == 1
    assert memory.layout.size == LAYERS * LAYER_BYTES
    block_dim, cut = int(kv_first), BLOCK // kernel_block
    assert views.keys() == plain.keys()
    ids = memory.try_allocate(10)
    memory.raw[ids] = 0
    tables = tables_of(memory, ids)
    for layer, view in views.items():
        assert without(view.shape, block_dim) == without(plain[layer].shape, block_dim)
        assert view.shape[block_dim] > max(tables) * cut and view.dtype == torch.bfloat16
        assert view.untyped_storage().data_ptr() == memory.blocks.base_address
    layers = [f"0.{i}" for i in range(LAYERS)]
    for number, layer in enumerate(layers):
        for block in tables:
            for part in range(cut):
                views[layer].select(block_dim, block * cut + part).fill_(1000 * number + 10 * block + part)
    for number, layer in enumerate(layers):  # nobody wrote over another
        for block in tables:
            for part in range(cut):
                one = views[layer].select(block_dim, block * cut + part)
                assert one.shape == (2, kernel_block, HEADS, HEAD)
                assert one.eq(torch.tensor(1000 * number + 10 * block + part, dtype=torch.bfloat16)).all()
    if engine.settings.layout == "blocks":
        spread = memory.raw[ids].view(len(ids), -1, 2).any(dim=-1).sum(dim=1)  # all bytes of a block are its layers'
        assert (spread >= LAYERS * LAYER_BYTES // 2 - cut * LAYER_BYTES // 2).all()
    else:
        assert all(views[layer].stride(block_dim) == LAYER_BYTES // 2 // cut for layer in layers)
    if len(windows) > 1:
        assert views["0.0"].data_ptr() == views["1.0"].data_ptr()
    memory.zero(tables[:5])
    for layer in layers:
        for block in [0, *tables[:5]]:
            assert views[layer].select(block_dim, block * cut).eq(0).all()
        for number, block in enumerate(tables):
            assert views[layer].select(block_dim, block * cut + cut - 1).any() or number < 5 or layer == "0.0"


def test_states_of_recurrent_layers(engine):
    """Mamba's lie one after the other in a block: a list a layer, or pages, which the layer takes apart."""
    shapes, dtypes = ((4, 6), (3, 5)), (torch.float32, torch.bfloat16)
    spec = MambaSpec(block_size=BLOCK, shapes=shapes, dtypes=dtypes, page_size_padded=LAYER_BYTES)
    config = cache_config(BLOCKS)
    config.kv_cache_groups[0].kv_cache_spec = spec
    with engine.starting(), engine.allocating():
        views = views_by_runner_2(engine, config, backend(), BLOCK)
    ids = tables_of(engine.memory, engine.memory.try_allocate(5))

    class Layer(MambaBase):
        mamba_type = None
        get_state_shape, get_state_dtype = (lambda self: shapes), (lambda self: dtypes)

    states = []
    for view in views.values():
        if isinstance(view, torch.Tensor):
            layer = Layer()
            layer.bind_kv_cache(view)
            view = layer.kv_cache
        states.append(view)
    assert [[tuple(one.shape[1:]) for one in view] for view in states] == [list(shapes)] * LAYERS
    for n, view in enumerate(states):
        for i, one in enumerate(view):
            one[ids] = n + 2 * i
    for n, view in enumerate(states):
        for i, one in enumerate(view):
            assert one[ids].eq(n + 2 * i).all()


def test_zeroing_reaches_the_blocks_that_are_named(engine):
    with engine.starting(), engine.allocating():
        views = views_by_runner_2(engine, cache_config(BLOCKS), backend(), BLOCK)
    memory = engine.memory
    ids = tables_of(memory, memory.try_allocate(6))
    for view in views.values():
        view[ids] = 7
    memory.zero(ids[2:4])
    for view in views.values():
        assert view[ids[2:4]].eq(0).all() and not view[ids[:2]].eq(0).any() and not view[ids[4:]].eq(0).any()


def test_profiling_runs_have_tensors_of_their_own(engine):
    with engine.starting():
        views = views_by_runner_2(engine, cache_config(4), backend(), BLOCK)
    assert engine.memory is None and all(view.is_contiguous() for view in views.values())


@RUNNERS
def test_a_layout_that_forbids_it_falls_back(engine, make_views, monkeypatch):
    """Blocks of 1000 bytes can't be cut by a kernel that wants 3 of each."""
    warnings = []
    monkeypatch.setattr("elastikv.vllm.engine.logger.warning", lambda text, *args: warnings.append(text % args))

    class Odd(backend()):
        @staticmethod
        def get_kv_cache_shape(num_blocks, *args, **options):
            return (num_blocks // 3, 3, LAYER_BYTES // 2)

        @staticmethod
        def get_kv_cache_stride_order():
            return (1, 0, 2)

    config = cache_config(BLOCKS)
    monkeypatch.setattr("elastikv.vllm.layout.MARK", 3 * 1_000_003)
    with engine.starting(), engine.allocating():
        views = make_views(engine, config, Odd, BLOCK)
    assert engine.memory is None
    assert all(not view.is_meta and view.shape == (BLOCKS // 3, 3, LAYER_BYTES // 2) for view in views.values())
    assert len(warnings) == 1 and "vLLM's own and of fixed size" in warnings[0]


def test_parts_of_packed_tensors():
    """vLLM's own packing: one backing tensor, offsets in a block."""
    config = cache_config(BLOCKS)
    for i, tensor in enumerate(config.kv_cache_tensors):
        tensor.size, tensor.block_stride, tensor.offset = (
            LAYER_BYTES * LAYERS * BLOCKS,
            LAYER_BYTES * LAYERS,
            i * LAYER_BYTES,
        )
    parts = parts_of(BLOCKS, config.kv_cache_tensors)
    assert parts.size == LAYERS * LAYER_BYTES and set(parts.parts.values()) == {Part(0, parts.size)}
    config.kv_cache_tensors[0].block_stride = 0
    with pytest.raises(LayoutNotPossible, match="packed"):
        parts_of(BLOCKS, config.kv_cache_tensors)
    config = cache_config(BLOCKS)
    with pytest.raises(LayoutNotPossible, match="blocks of one size"):
        parts_of(BLOCKS - 1, config.kv_cache_tensors)


def test_views_that_can_not_be_placed():
    blocks = torch.zeros(BLOCKS, 1024, dtype=torch.int8)
    raw = stand_ins(parts_of(BLOCKS, cache_config(BLOCKS).kv_cache_tensors))["0.0"].view(torch.bfloat16)
    with pytest.raises(LayoutNotPossible, match="no dimension of blocks"):
        place(raw[:256], Part(0, 512), blocks)
    with pytest.raises(LayoutNotPossible, match="reaches beyond"):
        place(raw.view(MARK, -1), Part(0, 256), blocks)
    with pytest.raises(LayoutNotPossible, match="can't be cut"):
        place(raw.view(MARK * 256), Part(0, 512), torch.zeros(BLOCKS, 1000, dtype=torch.int8))


def test_layers_one_by_one_need_equal_layers():
    raw = torch.zeros(8, 768, dtype=torch.int8)
    unequal = BlockParts(768, {"0": Part(0, 512), "1": Part(512, 256)})
    with pytest.raises(LayoutNotPossible, match="the same bytes"):
        LayerByLayer(unequal, raw, 4)
    equal = BlockParts(768, {"0": Part(0, 256), "1": Part(256, 256), "2": Part(512, 256), "3": Part(512, 256)})
    with pytest.raises(LayoutNotPossible, match="1024 bytes apart"):
        LayerByLayer(equal, torch.zeros(8, 1024, dtype=torch.int8)[:, :768], 4)
    made = LayerByLayer(equal, raw, 4)
    assert [made.table_id(block) for block in range(8)] == [0, 1, 2, 3, 12, 13, 14, 15]
    assert [made.block_of(made.table_id(block)) for block in range(8)] == list(range(8))
    assert [made.blocks_under(last) for last in (0, 3, 4, 15, 16, 100)] == [4, 4, 8, 8, 8, 8]
    blocks = [made.blocks_of(layer)[0] for layer in "0123"]
    assert blocks[2].data_ptr() == blocks[3].data_ptr() == raw.data_ptr() + 2 * 4 * 256
    assert all(each.shape == (16, 256) for each in blocks)
    # As many blocks as fill a page of the device with one layer's, and fewer where that makes an extent too large.
    model = BlockParts(16 << 16, {str(layer): Part(layer << 16, 1 << 16) for layer in range(16)})
    assert LayerByLayer.extent_bytes(model) == 32 << 20
    large = BlockParts(80 << 16, {str(layer): Part(layer << 16, 1 << 16) for layer in range(80)})
    assert LayerByLayer.extent_bytes(large) == 4 * large.size
