"""SharedMemoryPool as Python sees it."""

from __future__ import annotations

import pytest
import torch

import elastikv
from conftest import settled_usage


def test_each_allocation_has_a_place_of_its_own(shared, model, page_size):
    first = shared.allocate_for_model("model", page_size)
    second = shared.allocate_for_model("model", page_size)
    assert first != second
    assert shared.global_stats().physical_usage == 2 * page_size
    assert shared.get_model_stats("model").physical_usage == 2 * page_size


def test_unaligned_free_refunds_all_of_it(shared, model, page_size):
    address = shared.allocate_for_model("model", 2 * page_size)
    offset = address - model.base_address
    shared.deallocate_for_model("model", offset, 100)
    shared.deallocate_for_model("model", offset + 100, 2 * page_size - 100)
    assert settled_usage(shared, model) == 0


def test_limit_holds_over_models(shared, model, page_size):
    other = shared.register_model("other", 4096 * page_size)
    shared.allocate_for_model("model", 40 * page_size)
    with pytest.raises(elastikv.OutOfPhysicalMemory) as caught:
        shared.allocate_for_model("other", 25 * page_size)
    error = caught.value
    assert isinstance(error, torch.OutOfMemoryError) and isinstance(error, MemoryError)
    assert (error.requested, error.available) == (25 * page_size, 24 * page_size)
    assert "'model'" in str(error) and "'other'" in str(error)
    assert other.stats().physical_usage == 0
    shared.allocate_for_model("other", 24 * page_size)
    assert shared.global_stats().available == 0


def test_parked_memory_of_one_model_serves_another(device, page_size):
    limit = 16 * page_size
    with elastikv.SharedMemoryPool(limit, device, park_limit=limit) as shared:
        idle = shared.register_model("idle", 64 * page_size)
        busy = shared.register_model("busy", 64 * page_size)
        address = shared.allocate_for_model("idle", limit)
        shared.deallocate_for_model("idle", address - idle.base_address, limit)
        idle.drain()
        assert shared.global_stats().parked == limit
        shared.allocate_for_model("busy", limit)
        assert idle.stats().physical_usage == 0
        assert shared.global_stats().physical_usage == limit
        # On a device it comes as it is, mapped anew; the host's is released, as the system hands out zeros.
        assert busy.stats().received == (0 if device == "cpu" else limit)


@pytest.mark.parametrize("rounds", [6])
def test_memory_that_changes_hands_holds_zeros(device, rounds):
    """Extents of 16 MiB and more, which go from model to model as they are."""
    size = 64 << 20
    with elastikv.SharedMemoryPool(size, device, park_limit=size) as shared:
        models = [shared.register_model(name, 1 << 30) for name in ("one", "two")]
        for number in range(rounds):
            model = models[number % 2]
            parts = [elastikv.empty((part << 20,), (part << 20,), torch.uint8, model) for part in (16, 48)]
            assert all(int((part == 0).sum()) == len(part) for part in parts)
            for part in parts:
                part.fill_(number + 1)
            del part
            while parts:
                del parts[0]
                model.drain()  # so that the smaller one has been idle for longer, and goes first
        assert models[1].stats().received == (0 if device == "cpu" else size * rounds // 2)


def test_names(shared, model):
    with pytest.raises(elastikv.ModelAlreadyExists, match="'model'"):
        shared.register_model("model", 1 << 30)
    with pytest.raises(elastikv.InvalidArgument):
        shared.register_model("", 1 << 30)
    for call in (
        lambda: shared.allocate_for_model("nobody", 1),
        lambda: shared.deallocate_for_model("nobody", 0, 1),
        lambda: shared.unregister_model("nobody"),
        lambda: shared.model("nobody"),
    ):
        with pytest.raises(elastikv.ModelNotFound, match="'nobody'") as caught:
            call()
        assert isinstance(caught.value, KeyError)
        assert not str(caught.value).startswith('"')
    assert shared.get_model_stats("nobody") is None
    assert shared.models() == ["model"]
    assert shared.global_stats().num_models == 1


@pytest.mark.parametrize("size", [0, -1, 1 << 64])
def test_bad_sizes(shared, model, size):
    with pytest.raises(elastikv.InvalidSize):
        shared.allocate_for_model("model", size)
    with pytest.raises(elastikv.InvalidSize):
        shared.deallocate_for_model("model", 0, size)
    with pytest.raises(elastikv.InvalidSize):
        shared.register_model("another", size)
    assert shared.models() == ["model"]


def test_sizes_near_the_end_of_64_bits(shared, model):
    with pytest.raises(elastikv.OutOfVirtualMemory):
        shared.allocate_for_model("model", (1 << 64) - 1)
    with pytest.raises(elastikv.InvalidOffset):
        shared.deallocate_for_model("model", (1 << 64) - 1, 2)
    with pytest.raises(elastikv.OutOfVirtualMemory):
        shared.register_model("huge", (1 << 64) - 1)


def test_limit_below_one_page(device, page_size):
    with pytest.raises(elastikv.InvalidArgument, match="below one page"):
        elastikv.SharedMemoryPool(page_size - 1, device)


def test_limit_above_the_device(device):
    with pytest.raises(elastikv.InvalidArgument, match="is above what"):
        elastikv.SharedMemoryPool(1 << 50, device)


def test_double_free(shared, model, page_size):
    offset = shared.allocate_for_model("model", page_size) - model.base_address
    shared.deallocate_for_model("model", offset, page_size)
    with pytest.raises(elastikv.NotMapped):
        shared.deallocate_for_model("model", offset, page_size)


def test_a_tensors_memory_is_not_for_deallocate(shared, model, page_size):
    tensor = elastikv.empty((page_size,), (page_size,), torch.uint8, model)
    with pytest.raises(elastikv.NotMapped):
        shared.deallocate_for_model("model", tensor.data_ptr() - model.base_address, page_size)


def test_unregister_frees_and_the_name_is_free_again(shared, model, page_size):
    shared.allocate_for_model("model", 4 * page_size)
    shared.unregister_model("model")
    assert settled_usage(shared, model) == 0
    with pytest.raises(elastikv.ModelNotFound):
        shared.allocate_for_model("model", 1)
    again = shared.register_model("model", 64 * page_size)
    assert again.registered and not model.registered
    shared.allocate_for_model("model", page_size)


def test_use_after_close(shared, model, page_size):
    shared.allocate_for_model("model", page_size)
    shared.close()
    for call in (lambda: shared.allocate_for_model("model", 1), lambda: shared.register_model("new", 1 << 20)):
        with pytest.raises(elastikv.PoolClosed):
            call()
    assert settled_usage(shared, model) == 0


def test_nothing_stays_parked_for_a_model_that_is_gone(device, page_size):
    shared = elastikv.SharedMemoryPool(8 * page_size, device, park_limit=8 * page_size)
    model = shared.register_model("model", 64 * page_size)
    shared.allocate_for_model("model", 4 * page_size)
    tensor = elastikv.empty((page_size,), (page_size,), torch.uint8, model)
    shared.unregister_model("model")
    assert settled_usage(shared, model) == page_size
    del tensor
    assert settled_usage(shared, model) == 0


def test_devices_by_torchs_name(device):
    with elastikv.SharedMemoryPool(1 << 24, torch.device(device)) as shared:
        assert shared.device == device
