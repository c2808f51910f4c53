"""CPU tensors on a model's memory, in a block."""

from __future__ import annotations

import gc
import os
import threading

import pytest
import torch

import elastikv
import elastikv.torch
from training import losses

MIB = 1 << 20


@pytest.fixture
def shared():
    with elastikv.SharedMemoryPool(physical_limit=64 * MIB, device="cpu") as pool:
        yield pool


@pytest.fixture
def model(shared):
    return shared.register_model("model", virtual_capacity=1 << 34)


def holds(model: elastikv.Model, tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory is the model's."""
    return model.base_address <= tensor.untyped_storage().data_ptr() < model.base_address + model.virtual_capacity


def allocated(model: elastikv.Model) -> int:
    return elastikv.torch.heap_stats(model)["allocated_bytes.all.current"]


def test_what_is_allocated_in_the_block_is_the_models(model):
    with model.use():
        inside = torch.arange(MIB, dtype=torch.int32)
    outside = torch.arange(MIB, dtype=torch.int32)
    assert holds(model, inside) and not holds(model, outside)
    assert torch.equal(inside, outside)
    assert allocated(model) == 4 * MIB
    assert model.stats().physical_usage >= 4 * MIB
    del inside
    assert allocated(model) == 0


def test_of_any_size_and_alignment(model):
    generator = torch.Generator().manual_seed(3)
    with model.use():
        tensors = [torch.full((1 + i * i * 37,), i % 128, dtype=torch.uint8) for i in range(120)]
        assert torch.empty(0).numel() == 0
    assert all(holds(model, tensor) and tensor.data_ptr() % 64 == 0 for tensor in tensors)
    for i in torch.randperm(120, generator=generator).tolist()[:60]:
        tensors[i] = torch.full_like(tensors[i], i % 128)  # outside: the model's is freed
    with model.use():
        more = [torch.full((1 + i * 1001,), 200, dtype=torch.uint8) for i in range(100)]
    for i, tensor in enumerate(tensors):
        assert bool((tensor == i % 128).all())
    assert all(bool((tensor == 200).all()) for tensor in more)


def test_blocks_nest_and_the_innermost_counts(shared, model):
    other = shared.register_model("other", virtual_capacity=1 << 32)
    with model.use():
        first = torch.empty(1000)
        with other.use():
            second = torch.empty(1000)
            with model.use():
                third = torch.empty(1000)
            fourth = torch.empty(1000)
        fifth = torch.empty(1000)
    sixth = torch.empty(1000)
    assert [holds(model, t) for t in (first, second, third, fourth, fifth, sixth)] == [1, 0, 1, 0, 1, 0]
    assert [holds(other, t) for t in (first, second, third, fourth, fifth, sixth)] == [0, 1, 0, 1, 0, 0]


def test_an_exception_leaves_the_block(model):
    with pytest.raises(KeyError), model.use():
        raise KeyError
    assert not holds(model, torch.empty(10))


def test_other_threads_keep_torchs_allocator(model):
    made: list[torch.Tensor] = []
    with model.use():
        thread = threading.Thread(target=lambda: made.append(torch.ones(1000)))
        thread.start()
        thread.join()
        mine = torch.ones(1000)
    assert not holds(model, made[0])
    assert holds(model, mine)
    # Freed by another thread than the one that allocated.
    tensors = [mine]
    del mine
    thread = threading.Thread(target=tensors.clear)
    thread.start()
    thread.join()
    assert allocated(model) == 0


def test_many_threads_in_blocks_at_once(shared):
    models = [shared.register_model(f"model {i}", virtual_capacity=1 << 32) for i in range(4)]
    faults: list[str] = []

    def work(index: int) -> None:
        generator = torch.Generator().manual_seed(index)
        model = models[index % len(models)]
        kept: list[tuple[int, torch.Tensor]] = []
        for step in range(200):
            size = int(torch.randint(1, 20_000, (1,), generator=generator))
            with model.use():
                kept.append((step, torch.full((size,), step, dtype=torch.int32)))
            if not holds(model, kept[-1][1]):
                faults.append(f"step {step} of thread {index} went elsewhere")
            if len(kept) > 10:
                value, tensor = kept.pop(int(torch.randint(0, 10, (1,), generator=generator)))
                if not bool((tensor == value).all()):
                    faults.append(f"step {step} of thread {index} read what others wrote")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    gc.collect()
    assert [allocated(model) for model in models] == [0, 0, 0, 0]


def test_training_is_equal_bit_for_bit(model):
    expected = losses("cpu")
    with model.use():
        assert losses("cpu") == expected
    assert elastikv.torch.heap_stats(model)["allocation.all.allocated"] > 1000
    assert expected[-1] < expected[0]


def test_gradients_on_the_cpu_are_the_models(model):
    with model.use():
        weight = torch.ones(1000, requires_grad=True)
        (weight * 2).sum().backward()
    assert weight.grad is not None
    assert holds(model, weight.grad)


def test_out_of_memory_says_who_holds_what_and_is_got_over(shared, model):
    hoarder = shared.register_model("hoarder", virtual_capacity=1 << 30)
    kept = elastikv.zeros((48 * MIB,), dtype=torch.uint8, model=hoarder)
    with model.use():
        with pytest.raises(torch.OutOfMemoryError, match=r"(?s)Tried to allocate 32\.00 MiB.*hoarder"):
            torch.empty(32 * MIB, dtype=torch.uint8)
        assert elastikv.torch.heap_stats(model)["num_ooms"] == 1
        del kept
        assert holds(model, torch.empty(32 * MIB, dtype=torch.uint8))


def test_idle_memory_gives_way_to_another_model(shared, model):
    with model.use():
        tensor = torch.empty(60 * MIB, dtype=torch.uint8)
    del tensor
    other = shared.register_model("other", virtual_capacity=1 << 30)
    assert elastikv.zeros((60 * MIB,), dtype=torch.uint8, model=other).sum() == 0


def test_statistics_have_torchs_keys(model):
    names = ["allocation", "segment", "active", "inactive_split", "allocated_bytes", "reserved_bytes"]
    names += ["active_bytes", "inactive_split_bytes", "requested_bytes"]
    stats = elastikv.torch.heap_stats(model)
    for name in names:
        for pool in ("all", "small_pool", "large_pool"):
            assert [stats[f"{name}.{pool}.{metric}"] for metric in ("current", "peak", "allocated", "freed")] == [0] * 4
    assert {"num_alloc_retries", "num_ooms", "num_sync_all_streams", "num_device_alloc", "num_device_free"} < set(stats)


def test_peaks(model):
    with model.use():
        large = torch.empty(8 * MIB, dtype=torch.uint8)
        small = torch.empty(1000, dtype=torch.uint8)
        del large
        stats = elastikv.torch.heap_stats(model)
        assert stats["allocated_bytes.large_pool.peak"] == 8 * MIB
        assert stats["allocated_bytes.small_pool.current"] == 1024
        assert stats["requested_bytes.small_pool.current"] == 1000
        assert (stats["allocation.all.allocated"], stats["allocation.all.freed"]) == (2, 1)
        elastikv.torch.reset_peak_stats(model)
        assert elastikv.torch.heap_stats(model)["allocated_bytes.all.peak"] == 1024
    del small


def test_freed_memory_serves_the_next_block_until_the_cache_is_emptied(shared, model):
    with model.use():
        tensor = torch.empty(16 * MIB, dtype=torch.uint8)
    address = tensor.data_ptr()
    del tensor
    assert shared.global_stats().physical_usage >= 16 * MIB
    with model.use():
        assert torch.empty(16 * MIB, dtype=torch.uint8).data_ptr() == address
    elastikv.torch.empty_cache(model)
    assert shared.global_stats().physical_usage == 0


def test_tensors_outlive_the_block_the_model_and_the_pool():
    with elastikv.SharedMemoryPool(physical_limit=64 * MIB, device="cpu") as pool:
        gone = pool.register_model("gone", virtual_capacity=1 << 32)
        with gone.use():
            tensor = torch.arange(MIB)
        pool.unregister_model("gone")
        assert gone.stats().physical_usage >= 8 * MIB
        view = tensor[MIB // 2 :]
    del tensor
    assert torch.equal(view, torch.arange(MIB // 2, MIB))
    del view
    assert gone.stats().physical_usage == 0


def test_a_model_that_is_unregistered_takes_no_more(shared, model):
    with model.use():
        shared.unregister_model("model")
        with pytest.raises(RuntimeError, match="unregistered"):
            torch.empty(10)
    with pytest.raises(elastikv.ModelNotFound), model.use():
        pass
    assert torch.ones(10).sum() == 10


def test_a_block_is_left_by_the_thread_that_entered(model):
    block = model.use()
    block.__enter__()
    caught: list[BaseException] = []

    def leave() -> None:
        try:
            block.__exit__(None, None, None)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    assert [type(error) for error in caught] == [elastikv.InvalidArgument]
    elastikv._core.cpu_block(model).leave()
    assert not holds(model, torch.empty(10))


def test_a_storage_grows_outside_with_torchs_memory(model):
    with model.use():
        tensor = torch.arange(10)
    tensor.resize_(100_000)
    assert not holds(model, tensor)
    assert tensor[:10].tolist() == list(range(10))
    assert allocated(model) == 0


def test_a_forked_child_has_torchs_allocator(model):
    with model.use():
        kept = torch.arange(1000)
        child = os.fork()
        if child == 0:
            made = torch.arange(1000)
            right = not holds(model, made) and torch.equal(made, kept)
            del made, kept
            os._exit(0 if right else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert holds(model, torch.empty(10))
    assert kept.sum() == 999 * 500


def test_a_mem_pool_needs_a_model_on_a_gpu(model):
    taken = elastikv._core.model_slots_taken()
    with pytest.raises(elastikv.InvalidArgument, match="CUDA device"):
        elastikv._core.take_model_slot(model)
    assert elastikv._core.model_slots_taken() == taken
