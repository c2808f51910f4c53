"""A model's torch.cuda.MemPool. What torch asks of any allocator is in tests/allocator; here is what is its alone."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

import elastikv
import elastikv.torch
from training import losses

pytestmark = pytest.mark.cuda

MIB = 1 << 20


@pytest.fixture
def shared():
    with elastikv.SharedMemoryPool(physical_limit=512 * MIB, device="cuda:0", park_limit=0) as pool:
        yield pool


@pytest.fixture
def model(shared):
    made = shared.register_model("model", virtual_capacity=1 << 40)
    yield made
    gc.collect()
    elastikv.torch.empty_cache(made)
    assert elastikv._core.model_slot_bytes(made) == 0


def holds(model: elastikv.Model, tensor: torch.Tensor) -> bool:
    return model.base_address <= tensor.data_ptr() < model.base_address + model.virtual_capacity


def test_only_what_is_allocated_in_the_block_is_the_models(shared, model):
    before = torch.cuda.memory_allocated()
    with model.use():
        inside = torch.arange(4 * MIB, device="cuda")
    outside = torch.arange(4 * MIB, device="cuda")
    assert holds(model, inside) and not holds(model, outside)
    assert torch.equal(inside, outside)
    assert torch.cuda.memory_allocated() - before == 2 * 32 * MIB  # torch counts both
    assert model.stats().physical_usage >= 32 * MIB


def test_memory_is_used_again_by_the_next_block_and_given_back_by_empty_cache(shared, model):
    with model.use():
        address = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda").data_ptr()
    with model.use():
        assert torch.empty(64 * MIB, dtype=torch.uint8, device="cuda").data_ptr() == address
    assert elastikv.torch.mem_pool(model) is elastikv.torch.mem_pool(model)
    assert shared.global_stats().physical_usage >= 64 * MIB
    elastikv.torch.empty_cache(model)
    model.drain()
    assert shared.global_stats().physical_usage == 0
    assert elastikv._core.model_slots_taken() == 0


def test_tensors_outlive_the_pool_and_the_model(shared, model):
    with model.use():
        tensor = torch.arange(4 * MIB, device="cuda")
    elastikv.torch.empty_cache(model)
    shared.unregister_model("model")
    assert tensor.sum().item() == 4 * MIB * (4 * MIB - 1) // 2
    assert elastikv._core.model_slot_bytes(model) >= 32 * MIB
    del tensor
    torch.cuda.empty_cache()
    assert elastikv._core.model_slots_taken() == 0
    with pytest.raises(elastikv.ModelNotFound), model.use():
        pass


def test_blocks_nest(shared, model):
    other = shared.register_model("other", virtual_capacity=1 << 40)
    with model.use():
        first = torch.empty(MIB, device="cuda")
        with other.use():
            second = torch.empty(MIB, device="cuda")
        third = torch.empty(MIB, device="cuda")
    assert [holds(model, t) for t in (first, second, third)] == [True, False, True]
    assert holds(other, second)
    del second
    elastikv.torch.empty_cache(other)


def test_a_thread_in_its_own_block(shared, model):
    other = shared.register_model("other", virtual_capacity=1 << 40)
    made: list[torch.Tensor] = []
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with other.use():
            made.append(torch.full((MIB,), 2.0, device="cuda"))
            entered.set()
            leave.wait(60)

    with model.use():
        thread = threading.Thread(target=work)
        thread.start()
        entered.wait(60)
        mine = torch.full((MIB,), 1.0, device="cuda")
        leave.set()
        thread.join()
    assert holds(model, mine) and holds(other, made[0])
    assert (mine.sum().item(), made[0].sum().item()) == (MIB, 2 * MIB)
    made.clear()
    elastikv.torch.empty_cache(other)


def test_out_of_memory_is_torchs_and_is_got_over(shared, model):
    hoarder = shared.register_model("hoarder", virtual_capacity=1 << 40)
    kept = elastikv.zeros((400 * MIB,), dtype=torch.uint8, model=hoarder)
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 200\.00 MiB") as caught, model.use():
        torch.empty(200 * MIB, dtype=torch.uint8, device="cuda")
    if hasattr(caught.value, "__notes__"):
        assert any("hoarder" in note for note in caught.value.__notes__)
    del kept
    hoarder.drain()
    with model.use():
        assert holds(model, torch.zeros(200 * MIB, dtype=torch.uint8, device="cuda"))


def test_segments_are_free_once_the_work_on_them_is_done(shared, model):
    """Memory that torch gives back while a kernel writes to it goes to nobody before the kernel is done."""
    with model.use():
        tensor = torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")
        torch.cuda._sleep(200_000_000)
        tensor.fill_(1)
        del tensor
    elastikv.torch.empty_cache(model)
    other = shared.register_model("other", virtual_capacity=1 << 40)
    assert elastikv.zeros((400 * MIB,), dtype=torch.uint8, model=other).sum().item() == 0


def test_a_graph_in_the_models_pool(shared, model):
    static = torch.ones(MIB, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        (static * 2).sum()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=elastikv.torch.mem_pool(model).id):
        product = static * 2 + 1
    assert holds(model, product)
    others = [torch.full((MIB,), -1.0, device="cuda") for _ in range(20)]
    static.fill_(3)
    graph.replay()
    assert product.sum().item() == 7 * MIB
    assert all(bool((other == -1).all()) for other in others)
    del graph, product


def test_training_is_equal_bit_for_bit(model):
    expected = losses("cuda")
    with model.use():
        assert losses("cuda") == expected


def test_a_slot_serves_one_model_after_another(shared):
    for index in range(2 * 128):
        model = shared.register_model(f"model {index}", virtual_capacity=1 << 30)
        with model.use():
            assert torch.ones(1000, device="cuda").sum().item() == 1000
        elastikv.torch.empty_cache(model)
        shared.unregister_model(model.name)
    assert elastikv._core.model_slots_taken() == 0


def test_all_slots_taken_is_said_in_words(shared):
    models = [shared.register_model(f"model {index}", virtual_capacity=1 << 30) for index in range(129)]
    for model in models[:128]:
        elastikv.torch.mem_pool(model)
    with pytest.raises(elastikv.InvalidArgument, match="all 128 models"):
        elastikv.torch.mem_pool(models[128])
    elastikv.torch.empty_cache(models[0])
    assert elastikv.torch.mem_pool(models[128]) is not None
    for model in models[1:]:
        elastikv.torch.empty_cache(model)
    assert elastikv._core.model_slots_taken() == 0
