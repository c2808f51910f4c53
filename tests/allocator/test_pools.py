"""torch.cuda.MemPool on the allocator: what lies in which pool, whose memory serves whom, and when it goes."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import elastikv

MIB = 1 << 20

pytestmark = pytest.mark.needs("pools")


def block(mebibytes: int) -> torch.Tensor:
    return torch.empty(mebibytes * MIB, dtype=torch.uint8, device="cuda")


def segments(pool: Any) -> list[dict[str, Any]]:
    return list(torch.cuda.memory.memory_snapshot(pool.id))


@pytest.fixture
def limited() -> Iterator[Any]:
    """Call it with the bytes that may be allocated beyond what is reserved by then."""
    total = torch.cuda.mem_get_info()[1]
    before = torch.cuda.get_per_process_memory_fraction()

    def limit(more: int) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)

    yield limit
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(before)


def test_the_innermost_pool_gets_what_is_allocated() -> None:
    outer, middle, inner = (torch.cuda.MemPool() for _ in range(3))
    kept = []
    with torch.cuda.use_mem_pool(outer):
        kept.append(block(20))
        with torch.cuda.use_mem_pool(middle):
            kept.append(block(20))
            with torch.cuda.use_mem_pool(inner):
                kept.append(block(20))
            kept.append(block(20))
        kept.append(block(20))
    elsewhere = block(20)
    assert [len(segments(pool)) for pool in (outer, middle, inner)] == [2, 2, 1]
    addresses = {part["address"] for pool in (outer, middle, inner) for part in segments(pool)}
    assert {tensor.data_ptr() for tensor in kept} == addresses and elsewhere.data_ptr() not in addresses


def test_a_pool_that_does_not_split() -> None:
    splits, whole = torch.cuda.MemPool(), torch.cuda.MemPool(no_split=True)
    kept = []
    for pool in (splits, whole):
        with torch.cuda.use_mem_pool(pool):
            kept += [block(4), block(4)]
    assert len(segments(splits)) == 1 and len(segments(whole)) == 2
    assert all(len(part["blocks"]) == 1 for part in segments(whole))
    assert len(segments(splits)[0]["blocks"]) == 3


def test_segments_from_another_allocator() -> None:
    """Small blocks share its segments; they go back to it with the pool, or with the last tensor."""
    functions = torch.cuda.memory.CUDAPluggableAllocator(elastikv.library_path(), "elastikv_malloc", "elastikv_free")
    allocated = lambda: elastikv._core.entry_points_stats(0)["allocated_bytes.all.current"]  # noqa: E731
    with torch.cuda.use_mem_pool(torch.cuda.MemPool(functions.allocator())):
        first = block(1)
    before = allocated() - 2 * MIB  # the first use makes what it needs
    del first
    gc.collect()
    torch.cuda.empty_cache()
    assert allocated() == before
    pool = torch.cuda.MemPool(functions.allocator())
    assert pool.use_count() == 1
    with torch.cuda.use_mem_pool(pool):
        kept = [block(1)]
        assert pool.use_count() == 2 and len(pool.snapshot()) == 1
        kept.append(block(1))
        assert len(pool.snapshot()) == 1
        kept.append(block(1))
        assert len(pool.snapshot()) == 2
    assert pool.use_count() == 1 and allocated() == before + 4 * MIB
    for number, tensor in enumerate(kept):
        tensor.fill_(number)
    del tensor, pool
    assert [int(tensor.float().mean()) for tensor in kept] == [0, 1, 2]
    kept.clear()
    gc.collect()
    torch.cuda.empty_cache()
    assert allocated() == before


def test_who_is_short_takes_from_a_pool_that_lends(limited: Any) -> None:
    keeps, lends = torch.cuda.MemPool(), torch.cuda.MemPool(use_on_oom=True)
    limited(80 * MIB)
    with torch.cuda.use_mem_pool(keeps):
        first = block(40)
    with torch.cuda.use_mem_pool(lends):
        second = block(40)
    lent = second.data_ptr()
    with pytest.raises(torch.OutOfMemoryError):
        block(40)
    del first, second
    third = block(30)
    assert third.data_ptr() == lent
    with pytest.raises(torch.OutOfMemoryError):
        block(30)
    del third
    with torch.cuda.use_mem_pool(lends):
        assert block(20).data_ptr() == lent


def test_a_pool_that_is_gone_lends_nothing(limited: Any) -> None:
    limited(40 * MIB)
    for _ in range(10):
        gone = torch.cuda.MemPool(use_on_oom=True)
        with torch.cuda.use_mem_pool(gone):
            block(40)
        del gone
    lends = torch.cuda.MemPool(use_on_oom=True)
    with torch.cuda.use_mem_pool(lends):
        block(40)
    first, second = block(20), block(20)
    assert {part["address"] for part in segments(lends)} == {first.data_ptr()}
    assert second.data_ptr() == first.data_ptr() + 20 * MIB


def in_threads(run: Any, arguments: list[Any]) -> None:
    failures: list[BaseException] = []

    def guarded(argument: Any) -> None:
        try:
            run(argument)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and not any(thread.is_alive() for thread in threads)


def test_emptying_the_cache_leaves_pools_in_use_alone() -> None:
    pools = [torch.cuda.MemPool() for _ in range(4)]
    assert len({pool.id for pool in pools}) == 4

    def use(pool: Any) -> None:
        with torch.cuda.use_mem_pool(pool):
            torch.randn(4, device="cuda")
            torch.cuda.empty_cache()

    in_threads(use, pools)
    assert [len(segments(pool)) for pool in pools] == [1] * 4


def test_a_pool_is_its_threads_alone() -> None:
    pool, inside, done = torch.cuda.MemPool(), threading.Event(), threading.Event()
    seen: list[Any] = []

    def use(role: str) -> None:
        if role == "pool":
            with torch.cuda.use_mem_pool(pool):
                block(1)
                inside.set()
                assert done.wait(30)
        else:
            assert inside.wait(30)
            kept = block(1)
            seen.extend(torch.cuda.memory._snapshot()["segments"])
            del kept
            done.set()

    def active(parts: list[Any], of: tuple[int, int]) -> int:
        return sum(part["active_size"] for part in parts if tuple(part["segment_pool_id"]) == of)

    earlier = active(torch.cuda.memory._snapshot()["segments"], (0, 0))
    before = block(1)
    in_threads(use, ["pool", "default"])
    assert active(seen, (0, 0)) - earlier == 2 * MIB and active(seen, tuple(pool.id)) == 0
    del before
