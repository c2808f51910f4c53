"""VirtualMemoryPool as Python sees it."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import threading

import pytest
import torch

import elastikv


@pytest.fixture
def pool(device, page_size):
    with elastikv.VirtualMemoryPool(64 * page_size, page_size, device, park_limit=0) as pool:
        yield pool


def write(device: str, address: int, value: int, size: int) -> None:
    if device == "cpu":
        ctypes.memset(address, value, size)
    else:
        view(device, address, size).fill_(value)


def view(device: str, address: int, size: int) -> torch.Tensor:
    if device == "cpu":
        return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)

    class Memory:
        def __init__(self) -> None:
            self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}

    return torch.as_tensor(Memory(), device=device)


def test_address_is_base_plus_offset_and_memory_holds_data(pool, device, page_size):
    address = pool.allocate(offset=page_size + 64, size=3 * page_size)
    assert address == pool.base_address + page_size + 64
    write(device, address, 7, 3 * page_size)
    assert view(device, address, 3 * page_size).eq(7).all()
    assert pool.stats().physical_usage == 4 * page_size == pool.physical_memory_usage
    assert pool.stats().live == 3 * page_size
    assert pool.is_mapped(page_size, 4 * page_size)
    assert not pool.is_mapped(0, page_size)


def test_freeing_gives_the_memory_back(pool, page_size):
    pool.allocate(0, 8 * page_size)
    pool.deallocate(0, 8 * page_size)
    pool.drain()
    stats = pool.stats()
    assert stats.physical_usage == stats.mapped_pages == stats.extents == 0
    assert stats.fragmentation_ratio == 0
    assert stats.peak_physical == 8 * page_size


def test_allocations_may_share_a_page(pool, device, page_size):
    first = pool.allocate(0, 100)
    second = pool.allocate(100, 100)
    write(device, first, 1, 100)
    write(device, second, 2, 100)
    assert pool.physical_memory_usage == page_size
    pool.deallocate(0, 100)
    pool.drain()
    assert pool.physical_memory_usage == page_size
    assert view(device, second, 100).eq(2).all()


def test_known_size_costs_one_handle(pool, page_size):
    pool.allocate(0, 32 * page_size)
    calls = pool.stats().driver_calls
    assert [calls[kind].count for kind in ("create", "map", "set_access")] == [1, 1, 1]
    assert pool.stats().extents == 1


def test_parked_memory_is_reused_without_a_driver_call(device, page_size):
    with elastikv.VirtualMemoryPool(64 * page_size, page_size, device, park_limit=64 * page_size) as pool:
        pool.allocate(0, 16 * page_size)
        pool.deallocate(0, 16 * page_size)
        pool.drain()
        assert pool.stats().parked == 16 * page_size
        before = pool.stats().total_driver_calls
        pool.allocate(0, 16 * page_size)
        assert pool.stats().total_driver_calls == before
        assert pool.stats().parked == 0
        pool.deallocate(0, 16 * page_size)
        pool.drain()
        assert pool.trim() == 16 * page_size
        assert pool.physical_memory_usage == 0


def test_compact_gives_idle_pages_back_and_keeps_the_rest(pool, device, page_size):
    address = pool.allocate(0, 8 * page_size)
    write(device, address, 9, 8 * page_size)
    pool.deallocate(2 * page_size, 3 * page_size)
    pool.drain()
    assert pool.stats().stranded == 3 * page_size
    assert pool.stats().fragmentation_ratio == pytest.approx(3 / 8)
    assert pool.compact() == 3 * page_size
    assert pool.physical_memory_usage == 5 * page_size
    assert view(device, address, 2 * page_size).eq(9).all()
    assert view(device, address + 5 * page_size, 3 * page_size).eq(9).all()


def test_prefetch_maps_ahead(pool, page_size):
    pool.prefetch(0, 8 * page_size)
    pool.drain()
    stats = pool.stats()
    assert stats.physical_usage == stats.parked == 8 * page_size
    assert not pool.is_mapped(0, page_size)
    before = pool.stats().driver_calls["map"].count
    pool.allocate(0, 8 * page_size)
    assert pool.stats().driver_calls["map"].count == before


def test_zero_reads_as_zero(device, page_size):
    with elastikv.VirtualMemoryPool(8 * page_size, page_size, device, park_limit=8 * page_size) as pool:
        write(device, pool.allocate(0, page_size), 5, page_size)
        pool.deallocate(0, page_size)
        pool.drain()
        assert view(device, pool.allocate(0, page_size, zero=True), page_size).eq(0).all()


def test_closed_gate_holds_memory_back(pool, page_size):
    gate = elastikv.ReleaseGate()
    pool.allocate(0, page_size)
    pool.deallocate(0, page_size, gate=gate)
    assert pool.stats().retiring == page_size
    with pytest.raises(elastikv.InvalidArgument, match="gate"):
        pool.allocate(0, page_size)
    gate.open()
    pool.drain()
    assert pool.physical_memory_usage == 0


@pytest.mark.parametrize(
    ("offset", "size", "error"),
    [
        (0, 0, elastikv.InvalidSize),
        (0, -1, elastikv.InvalidSize),
        (0, 1 << 64, elastikv.InvalidSize),
        (-1, 1, elastikv.InvalidOffset),
        (1 << 64, 1, elastikv.InvalidOffset),
        (0, (1 << 64) - 1, elastikv.InvalidOffset),
        ((1 << 64) - 1, 1, elastikv.InvalidOffset),
        ((1 << 64) - 4096, 8192, elastikv.InvalidOffset),
    ],
)
@pytest.mark.parametrize("operation", ["allocate", "deallocate", "prefetch"])
def test_bad_ranges_are_refused_and_change_nothing(pool, page_size, operation, offset, size, error):
    pool.allocate(0, page_size)
    with pytest.raises(error) as caught:
        getattr(pool, operation)(offset, size)
    assert isinstance(caught.value, (elastikv.VmmError, ValueError))
    assert isinstance(caught.value, ValueError)
    assert pool.stats().live == page_size
    assert not pool.is_mapped(offset, size)


def test_over_capacity_says_the_numbers(pool, page_size):
    with pytest.raises(elastikv.InvalidOffset) as caught:
        pool.allocate(page_size, 64 * page_size)
    error = caught.value
    assert (error.offset, error.size, error.capacity) == (page_size, 64 * page_size, 64 * page_size)
    assert str(64 * page_size) in str(error)


def test_double_and_half_free(pool, page_size):
    pool.allocate(0, page_size)
    with pytest.raises(elastikv.NotMapped):
        pool.deallocate(0, 2 * page_size)
    pool.deallocate(0, page_size)
    with pytest.raises(elastikv.NotMapped):
        pool.deallocate(0, page_size)
    pool.allocate(0, page_size)
    with pytest.raises(elastikv.AlreadyMapped):
        pool.allocate(page_size - 1, 2)


@pytest.mark.parametrize("page_size", [0, -1, 1, 3000, 4095, 1 << 64])
def test_page_sizes_that_no_device_has(page_size):
    with pytest.raises(elastikv.InvalidPageSize):
        elastikv.VirtualMemoryPool(1 << 20, page_size)


@pytest.mark.parametrize("capacity", [0, -1, 1 << 64])
def test_bad_capacity(capacity):
    with pytest.raises(elastikv.InvalidSize):
        elastikv.VirtualMemoryPool(capacity)


@pytest.mark.parametrize("capacity", [(1 << 64) - 1, 1 << 62])
def test_capacity_beyond_the_address_space(capacity, device):
    with pytest.raises(elastikv.OutOfVirtualMemory) as caught:
        elastikv.VirtualMemoryPool(capacity, device=device)
    assert isinstance(caught.value, MemoryError)


def test_wrong_types():
    pool = elastikv.VirtualMemoryPool(1 << 20)
    for bad in (1.5, "1", None, True):
        with pytest.raises(TypeError, match="must be an integer"):
            pool.allocate(0, bad)


def test_devices_that_are_not_there():
    with pytest.raises(elastikv.DeviceUnavailable, match="cuda:4711"):
        elastikv.VirtualMemoryPool(1 << 30, device="cuda:4711")
    for name in ("gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:0x", ""):
        with pytest.raises(elastikv.InvalidArgument, match="names no device"):
            elastikv.VirtualMemoryPool(1 << 30, device=name)


def test_use_after_close(pool, page_size):
    pool.allocate(0, page_size)
    pool.close()
    pool.close()
    assert pool.physical_memory_usage == 0
    for call in (lambda: pool.allocate(0, 1), lambda: pool.deallocate(0, 1), pool.compact, pool.trim, pool.drain):
        with pytest.raises(elastikv.PoolClosed):
            call()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_refused_and_harms_nothing():
    pool = elastikv.VirtualMemoryPool(1 << 20, 4096, "cpu")
    address = pool.allocate(0, 4096)
    ctypes.memset(address, 3, 4096)
    context = multiprocessing.get_context("fork")

    def child(queue):
        for call in (lambda: pool.deallocate(0, 4096), pool.stats, lambda: pool.physical_memory_usage):
            with pytest.raises(elastikv.PoolClosed, match="forked"):
                call()
        with elastikv.VirtualMemoryPool(1 << 20, 4096, "cpu") as own:  # as the message advises
            ctypes.memset(own.allocate(0, 4096), 4, 4096)
        queue.put("as it should be")

    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == "as it should be"
    process.join()
    assert ctypes.string_at(address, 4096) == b"\3" * 4096
    pool.deallocate(0, 4096)


def test_threads_on_one_pool(pool, device, page_size):
    failures: list[BaseException] = []

    def run(index: int) -> None:
        try:
            for round_ in range(50):
                address = pool.allocate(index * 8 * page_size, 8 * page_size)
                write(device, address, index * 16 + round_ % 16, 8 * page_size)
                assert view(device, address, 8 * page_size).eq(index * 16 + round_ % 16).all()
                pool.deallocate(index * 8 * page_size, 8 * page_size)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    pool.drain()
    assert pool.physical_memory_usage == 0


def resident_bytes_of_process() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_the_hosts_resident_memory_follows():
    size = 256 << 20
    pool = elastikv.VirtualMemoryPool(1 << 34, device="cpu")
    before = resident_bytes_of_process()
    ctypes.memset(pool.allocate(0, size), 1, size)
    grown = resident_bytes_of_process() - before
    assert grown > 0.95 * size
    pool.deallocate(0, size)
    assert resident_bytes_of_process() - before < 0.05 * size
