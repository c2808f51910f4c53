"""Statistics, snapshots, running out, giving back."""

from __future__ import annotations

import pickle

import pytest
import torch

import elastikv
from conftest import GIB, LIMIT, held

MIB = 1 << 20


@pytest.mark.needs("statistics")
def test_statistics_follow_allocations() -> None:
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    x = torch.empty(100 * MIB, dtype=torch.uint8, device="cuda")
    y = torch.empty(1000, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_allocated() - start == 100 * MIB + 1024
    assert torch.cuda.memory_reserved() >= torch.cuda.memory_allocated()
    del x
    assert torch.cuda.memory_allocated() - start == 1024
    assert torch.cuda.max_memory_allocated() - start == 100 * MIB + 1024
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() - start == 1024
    torch.cuda.reset_accumulated_memory_stats()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == 0
    del y
    assert torch.cuda.memory_stats()["allocation.all.freed"] == 1


@pytest.mark.needs("statistics")
def test_the_snapshot_agrees_with_the_statistics() -> None:
    kept = [torch.empty(n, device="cuda") for n in (1, 1000, 300_000, 5_000_000)]
    for n in (10, 200_000, 4_000_000):
        torch.empty(n, device="cuda")
    stats = torch.cuda.memory_stats()
    segments = torch.cuda.memory_snapshot()
    blocks = [block for segment in segments for block in segment["blocks"]]
    assert sum(segment["total_size"] for segment in segments) == stats["reserved_bytes.all.current"]
    assert len(segments) == stats["segment.all.current"]
    allocated = [block for block in blocks if block["state"] == "active_allocated"]
    assert sum(block["size"] for block in allocated) == stats["allocated_bytes.all.current"]
    assert len(allocated) == stats["allocation.all.current"]
    split = [
        block
        for segment in segments
        for block in segment["blocks"]
        if block["state"] == "inactive" and len(segment["blocks"]) > 1
    ]
    assert sum(block["size"] for block in split) == stats["inactive_split_bytes.all.current"]
    for tensor in kept:
        (mine,) = [block for block in allocated if block["address"] == tensor.data_ptr()]
        assert mine["requested_size"] == tensor.nbytes


@pytest.mark.needs("statistics")
def test_history_and_torchs_visualiser() -> None:
    torch.cuda.memory._record_memory_history(max_entries=1000, stacks="python")
    try:
        x = torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
        address = x.data_ptr()
        del x
        snapshot = torch.cuda.memory._snapshot()
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    (trace,) = [each for each in snapshot["device_traces"] if each]
    mine = [entry["action"] for entry in trace if entry["addr"] == address and entry["size"] == 3 * MIB]
    assert mine == ["alloc", "free_requested", "free_completed"]
    (allocation,) = [entry for entry in trace if entry["addr"] == address and entry["action"] == "alloc"]
    assert any("test_memory" in frame["filename"] for frame in allocation["frames"])
    from torch.cuda import _memory_viz

    assert "<html" in _memory_viz.trace_plot(snapshot).lower()
    assert pickle.loads(pickle.dumps(snapshot))["segments"] == snapshot["segments"]


def test_out_of_memory_and_recovery(way: str, pool: elastikv.SharedMemoryPool | None) -> None:
    kept: list[torch.Tensor] = []

    def fill() -> None:
        for _ in range(LIMIT // GIB + 8):
            kept.append(torch.empty(GIB, dtype=torch.uint8, device="cuda").fill_(len(kept)))

    with pytest.raises(torch.OutOfMemoryError) as failure:
        fill()
    if pool is not None and way != "mem_pool":  # there torch writes the text
        assert "Tried to allocate 1024.00 MiB" in str(failure.value)  # as torch writes it
        assert "retiring" in str(failure.value)  # who holds what
    assert len(kept) >= LIMIT // GIB - 2
    assert all(int(tensor[0]) == number for number, tensor in enumerate(kept))
    half = len(kept) // 2
    del kept[half:]
    again = torch.empty(GIB, dtype=torch.uint8, device="cuda").fill_(77)
    assert bool((again == 77).all())
    assert all(int(tensor[-1]) == number for number, tensor in enumerate(kept))


def test_a_size_beyond_all_memory_is_out_of_memory() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 55, dtype=torch.uint8, device="cuda")
    assert int(torch.ones(10, device="cuda").sum()) == 10


@pytest.mark.needs("release")
def test_another_shape_fits_where_many_blocks_were(pool: elastikv.SharedMemoryPool | None) -> None:
    """What is cached is given up, whatever its shape, before memory runs out."""
    for piece in (LIMIT // 64, LIMIT // 5, LIMIT // 16, LIMIT // 3):
        count = LIMIT * 8 // 10 // piece
        kept = [torch.empty(piece, dtype=torch.uint8, device="cuda") for _ in range(count)]
        del kept
    assert held(pool) <= LIMIT


@pytest.mark.needs("release")
def test_empty_cache_gives_the_memory_to_the_driver(way: str) -> None:
    if way == "pluggable":
        pytest.skip("torch has no empty_cache for pluggable allocators")
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    x = torch.empty(4 * GIB, dtype=torch.uint8, device="cuda").fill_(1)
    y = torch.empty(1000, device="cuda")
    del x
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] <= before - 4 * GIB
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] >= before - 64 * MIB
    del y


@pytest.mark.needs("fraction")
def test_memory_fraction(way: str) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    before = torch.cuda.get_per_process_memory_fraction()
    torch.cuda.set_per_process_memory_fraction(2 * GIB / total)
    try:
        fits = torch.empty(GIB, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
        del fits
    finally:
        torch.cuda.set_per_process_memory_fraction(before if way == "native" else 1.0)


@pytest.mark.needs("statistics")
def test_raw_memory_is_not_cached_while_caching_is_off() -> None:
    stream = torch.cuda.current_stream().cuda_stream

    def requested() -> int:
        return int(torch.cuda.memory_stats()["requested_bytes.all.allocated"])

    before = requested()
    torch.cuda.caching_allocator_enable(False)
    try:
        pointer = torch._C._cuda_cudaCachingAllocator_raw_alloc(MIB, stream)
        assert pointer != 0
        assert requested() == before
        torch._C._cuda_cudaCachingAllocator_raw_delete(pointer)
    finally:
        torch.cuda.caching_allocator_enable(True)
    pointer = torch._C._cuda_cudaCachingAllocator_raw_alloc(MIB, stream)
    assert requested() == before + MIB
    torch._C._cuda_cudaCachingAllocator_raw_delete(pointer)
