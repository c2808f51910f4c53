"""Blocks for paged attention: ids, memory that follows them, tensors over them, and errors that change nothing."""

from __future__ import annotations

import array
import copy
import gc
import pickle
import threading

import pytest
import torch

import elastikv
from conftest import settled_usage

LAYERS, BLOCK = 2, (2, 4, 2, 8)  # K/V, tokens, heads, dim


def make(model, num_blocks=64, **options):
    """Blocks of 1/4 page, so that an extent of one page has 4."""
    tokens = model.page_size // 4 // LAYERS // 2 // 2 // 8 // 2
    options.setdefault("extent_bytes", model.page_size)
    return elastikv.BlockPool(model, num_blocks, (2, tokens, 2, 8), LAYERS, torch.bfloat16, **options)


def test_memory_comes_with_the_first_block_and_goes_with_the_last(shared, model, page_size):
    pool = make(model)
    assert pool.block_bytes == pool.block_stride == page_size // 4 and pool.extent_bytes == page_size
    assert shared.global_stats().physical_usage == 0
    first = pool.allocate(5)
    assert first.dtype == torch.int64 and first.device.type == "cpu" and first.tolist() == [0, 1, 2, 3, 4]
    assert shared.global_stats().physical_usage == pool.physical_bytes == 2 * page_size
    assert (pool.held, pool.free_mapped) == (5, 3)
    pool.free(first[:4])
    assert settled_usage(shared, model) == page_size
    assert pool.allocate(1).tolist() == [5]
    pool.free([4, 5])
    assert settled_usage(shared, model) == 0


def test_extents_ahead_are_there_and_go_with_what_is_in_use(shared, model, page_size):
    pool = make(model, 128, ahead_bytes=2 * page_size)
    assert pool.ahead_bytes == 2 * page_size and make(model).ahead_bytes == 0
    assert make(model, ahead_bytes=1).ahead_bytes == page_size
    ids = pool.allocate(64)
    model.drain()
    assert model.stats().parked == 2 * page_size and pool.physical_bytes == 16 * page_size
    created = model.stats().driver_calls["create"].count
    more = pool.allocate(4)
    assert model.stats().driver_calls["create"].count == created
    pool.free(ids)
    pool.free(more)
    assert settled_usage(shared, model) == 0
    with pytest.raises(elastikv.InvalidSize):
        make(model, ahead_bytes=-1)


def test_layers_are_strided_views_of_the_same_blocks(model, device):
    pool = make(model)
    layers = [pool.layer(i) for i in range(LAYERS)]
    ids = pool.allocate(6).to(device)
    for i, layer in enumerate(layers):
        assert layer.shape == (64, *pool.block_shape) and layer.device == torch.device(device)
        assert layer.stride(0) * layer.itemsize == pool.block_stride
        assert layer.data_ptr() - pool.base_address == i * pool.block_bytes // LAYERS
        layer[ids] = torch.arange(6, dtype=torch.bfloat16, device=device).view(-1, 1, 1, 1, 1) + 10 * i
    for i, layer in enumerate(layers):
        for n, block in enumerate(ids.tolist()):
            assert layer[block].eq(10 * i + n).all()
            assert pool.layer(i)[block].data_ptr() == pool.base_address + block * pool.block_stride + (
                i * pool.block_bytes // LAYERS
            )


@pytest.mark.parametrize(
    "pack",
    [
        torch.Tensor.tolist,
        lambda ids: ids,
        lambda ids: ids.to(torch.int32),
        lambda ids: array.array("q", ids.tolist()),
        lambda ids: array.array("i", ids.tolist()),
        lambda ids: memoryview(array.array("q", ids.tolist())),
        lambda ids: iter(ids.tolist()),
    ],
)
def test_ids_in_any_form(model, pack):
    pool = make(model)
    ids = pool.allocate(7)
    pool.touch(pack(ids))
    assert [pool.references(i) for i in range(8)] == [2] * 7 + [0]
    pool.free(pack(ids))
    assert pool.held == 7
    pool.free(pack(ids))
    assert pool.held == 0


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        (torch.zeros(2, dtype=torch.float32), elastikv.InvalidArgument),
        (torch.zeros(4, dtype=torch.int64)[::2], elastikv.InvalidArgument),
        (array.array("d", [0.0]), elastikv.InvalidArgument),
        (b"\0\0\0\0", elastikv.InvalidArgument),
        (["a"], (TypeError, RuntimeError)),
        (3, TypeError),
    ],
)
def test_what_are_no_ids(model, ids, error):
    pool = make(model)
    pool.allocate(1)
    with pytest.raises(error):
        pool.free(ids)
    assert pool.references(0) == 1


def test_errors_change_nothing(model):
    pool = make(model, num_blocks=10)
    ids = pool.allocate(6)
    for wrong in ([0, 0], [0, 6], [0, 10], [0, -1]):
        with pytest.raises(elastikv.InvalidArgument, match=f"block {wrong[-1]}"):
            pool.free(wrong)
    with pytest.raises(elastikv.InvalidArgument, match="touch of block 9"):
        pool.touch([0, 9])
    for n in (5, 11, 2**63):
        with pytest.raises(elastikv.OutOfVirtualMemory, match="blocks"):
            pool.allocate(n)
    for n in (-1, 2**64):
        with pytest.raises(elastikv.InvalidArgument):
            pool.allocate(n)
    with pytest.raises(elastikv.InvalidArgument):
        pool.layer(LAYERS)
    assert pool.held == 6 and [pool.references(i) for i in range(7)] == [1] * 6 + [0]
    pool.free(ids)
    with pytest.raises(elastikv.InvalidArgument, match="free already"):
        pool.free([0])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((0, BLOCK, 1, torch.bfloat16), elastikv.InvalidSize),
        ((2**31, BLOCK, 1, torch.bfloat16), elastikv.InvalidArgument),
        ((1, (), 1, torch.bfloat16), elastikv.InvalidArgument),
        ((1, (2, 0), 1, torch.bfloat16), elastikv.InvalidArgument),
        ((1, BLOCK, 0, torch.bfloat16), elastikv.InvalidArgument),
        ((1, (2**62, 8), 1, torch.bfloat16), elastikv.OutOfVirtualMemory),
        ((2**30, (2**33,), 1, torch.bfloat16), elastikv.OutOfVirtualMemory),
        ((1, BLOCK, 1, torch.qint8), elastikv.InvalidArgument),
        ((1, BLOCK, 1, "bfloat16"), TypeError),
    ],
)
def test_what_can_be_no_pool(model, arguments, error):
    with pytest.raises(error):
        elastikv.BlockPool(model, *arguments)


def test_a_budget_that_runs_dry_in_the_middle_of_a_batch(device, page_size):
    with elastikv.SharedMemoryPool(physical_limit=4 * page_size, device=device, park_limit=0) as shared:
        pool = make(shared.register_model("paged", 1 << 40))
        held = pool.allocate(9)
        assert pool.available() == 7
        with pytest.raises(torch.OutOfMemoryError) as caught:
            pool.allocate(8)
        assert isinstance(caught.value, elastikv.OutOfPhysicalMemory)
        assert pool.held == 9 and pool.available() == 7
        assert len(pool.allocate(7)) == 7
        assert pool.available() == 0
        pool.free(held)


def test_a_batch_gets_what_others_keep_idle(device, page_size):
    with elastikv.SharedMemoryPool(physical_limit=8 * page_size, device=device, park_limit=0) as shared:
        cache, busy = shared.register_model("cache", 1 << 40), shared.register_model("busy", 1 << 40)
        kept, pool, asked = make(cache), make(busy), []
        ids = kept.allocate(20).tolist()  # 5 pages

        def give_up(wanted: int) -> int:
            asked.append(wanted)
            before, wanted = kept.physical_bytes, wanted - cache.stats().retiring
            while ids and before - kept.physical_bytes < wanted:
                kept.free([ids.pop(0)])
            return before - kept.physical_bytes

        handle = cache.on_reclaim(give_up)
        assert pool.available() == 12
        assert len(pool.allocate(24)) == 24  # 6 pages, of which 3 are lacking
        assert asked[0] == 3 * page_size and len(ids) == 8
        times = len(asked)
        handle.remove()
        with pytest.raises(elastikv.OutOfPhysicalMemory):
            pool.allocate(4)
        assert len(asked) == times


def test_what_an_idle_callback_may_not_do(device, page_size, monkeypatch):
    raised = []
    monkeypatch.setattr("sys.unraisablehook", lambda args: raised.append(args.exc_type))
    with elastikv.SharedMemoryPool(physical_limit=2 * page_size, device=device, park_limit=0) as shared:
        model = shared.register_model("model", 1 << 40)
        pool = make(model)

        def fails(wanted: int) -> int:
            raise ValueError(wanted)

        handles = [
            model.on_reclaim(fails),
            model.on_reclaim(lambda wanted: "nothing"),
            model.on_reclaim(lambda wanted: -1),
        ]
        with pytest.raises(elastikv.OutOfPhysicalMemory):
            pool.allocate(12)
        assert raised[:3] == [ValueError, TypeError, TypeError] and pool.held == 0
        with pytest.raises(TypeError, match="callable"):
            model.on_reclaim(3)
        del handles


def test_a_closed_pool_says_so(shared, model):
    with make(model) as pool:
        layer = pool.layer(0)
        pool.allocate(9)
    assert settled_usage(shared, model) == 0
    for use in (lambda: pool.allocate(1), lambda: pool.free([0]), lambda: pool.touch([0]), pool.available):
        with pytest.raises(elastikv.PoolClosed):
            use()
    pool.close()
    assert layer.data_ptr() == pool.base_address


def test_tensors_keep_the_pool(shared, model, page_size):
    pool = make(model)
    layer = pool.layer(1)
    ids = pool.allocate(4)
    layer[ids] = 3
    del pool
    gc.collect()
    assert layer[ids].eq(3).all()
    assert shared.global_stats().physical_usage == page_size
    del layer
    gc.collect()
    assert settled_usage(shared, model) == 0


def test_invariant_6_a_storage_of_blocks_is_never_read_whole(model):
    pool = make(model)
    pool.allocate(1)
    for read in (pickle.dumps, copy.deepcopy, lambda t: t.untyped_storage().clone()):
        with pytest.raises(elastikv.InvalidArgument, match="gaps without memory"):
            read(pool.layer(0))


def test_threads_take_disjoint_blocks(model):
    pool = make(model, num_blocks=256)
    errors: list[str] = []

    def work() -> None:
        for n in range(300):
            ids = pool.allocate(1 + n % 7)
            if any(pool.references(i) != 1 for i in ids.tolist()):
                errors.append("a block was handed out twice")
            pool.free(ids)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and pool.held == 0


@pytest.mark.cuda
def test_invariant_3_pages_stay_until_the_stream_has_finished():
    with elastikv.SharedMemoryPool(physical_limit=64 << 20, device="cuda", park_limit=0) as shared:
        model = shared.register_model("paged", 1 << 40)
        pool = make(model)
        other = torch.cuda.Stream()
        ids = pool.allocate(4)
        device_ids = ids.cuda()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            torch.cuda._sleep(200_000_000)
            pool.layer(0)[device_ids] = 1
            out = pool.layer(0)[device_ids].float().sum()
            pool.free(ids)
        assert pool.held == 0
        taken = pool.allocate(4)  # on the default stream, which is made to wait
        pool.layer(0)[taken.cuda()] = 2
        torch.cuda.synchronize()
        assert out.item() == pool.layer(0)[0].numel() * 4
        assert pool.layer(0)[taken.cuda()].eq(2).all()
        pool.free(taken)
        assert settled_usage(shared, model) == 0
