"""DevicePools: a pool a device, all or none, and peers."""

from __future__ import annotations

import pytest
import torch

import elastikv


def test_pools_by_device(device, page_size):
    with elastikv.DevicePools({device: 8 * page_size}, peers=True, park_limit=0) as pools:
        assert list(pools) == [device] and len(pools) == 1 and device in pools
        assert pools[torch.device(device)] is pools[device]
        models = pools.register_model("chat", 64 * page_size, reserve=2 * page_size, limit=4 * page_size)
        assert list(models) == [device]
        kv = elastikv.empty((3, page_size), (16, page_size), torch.uint8, models[device])
        assert pools[device].global_stats().physical_usage == 3 * page_size
        assert models[device].quota().reserve == 2 * page_size
        with pytest.raises(elastikv.OutOfPhysicalMemory):
            elastikv.grow_(kv, 5)
        pools.unregister_model("chat")
        with pytest.raises(elastikv.ModelNotFound):
            pools.unregister_model("chat")
    with pytest.raises(elastikv.PoolClosed):
        pools[device].register_model("late", page_size)


def test_devices_that_are_not_there(device, page_size):
    with pytest.raises(elastikv.DeviceUnavailable, match=r"cuda:4711.*This machine has cpu"):
        elastikv.DevicePools({device: 8 * page_size, "cuda:4711": 1 << 30})
    with pytest.raises(elastikv.InvalidArgument, match="names no device"):
        elastikv.DevicePools({"gpu": 1 << 30})
    with pytest.raises(elastikv.InvalidArgument, match="no device is named"):
        elastikv.DevicePools({})
    with pytest.raises(elastikv.InvalidArgument, match="there twice"):
        elastikv.DevicePools({device: page_size, torch.device(device): page_size})  # type: ignore[dict-item]
    with elastikv.DevicePools({device: page_size}) as pools:
        with pytest.raises(elastikv.DeviceUnavailable, match=rf"no pool for cuda:9: {device} have one"):
            pools["cuda:9"]
        assert "cuda:9" not in pools


def test_a_model_that_is_there_already_stays_as_it_is(device, page_size):
    with elastikv.DevicePools({device: 8 * page_size}) as pools:
        model = pools[device].register_model("chat", 64 * page_size)
        with pytest.raises(elastikv.ModelAlreadyExists):
            pools.register_model("chat", 64 * page_size)
        assert model.registered


def test_peers_that_are_none(shared, model, page_size):
    shared.allocate_for_model("model", page_size)
    shared.allow_peer(shared.device)  # changes nothing
    other = "cpu" if shared.device != "cpu" else "cuda:0"
    with pytest.raises((elastikv.InvalidArgument, elastikv.DeviceUnavailable)):
        shared.allow_peer(other)
    with pytest.raises(elastikv.InvalidArgument, match="names no device"):
        shared.allow_peer("nothing")
    shared.allocate_for_model("model", page_size)


@pytest.mark.cuda
def test_two_devices_read_each_others_memory_mapped_before_and_after():
    if torch.cuda.device_count() < 2 or not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("needs two GPUs that reach each other's memory")
    page = 2 << 20
    with elastikv.DevicePools({"cuda:0": 16 * page, "cuda:1": 16 * page}) as pools:
        models = pools.register_model("chat", 64 * page)
        tensors = {key: elastikv.empty((1, page), (8, page), torch.uint8, model) for key, model in models.items()}
        pools.allow_peers()
        for kv in tensors.values():
            elastikv.grow_(kv, 4)
        for index, (key, kv) in enumerate(tensors.items()):
            kv.fill_(index + 1)
            torch.cuda.synchronize(key)
            other = torch.device("cuda:1" if key == "cuda:0" else "cuda:0")
            into = torch.empty(kv.shape, dtype=torch.uint8, device=other)
            into.copy_(kv)
            assert into.eq(index + 1).all()
