"""vLLM's block pool over elastic blocks.

What differs from vLLM's own: which ids are handed out is the elastic pool's choice, so that extents empty; the free
queue has cached blocks only, oldest first, and these keep their memory; a free block without a hash has given its
memory back. Where memory is ample the same prefixes hit, and the same of them are evicted, as without it.

Memory is promised before it is counted on: vLLM asks how many blocks are free, and crashes if it then can't have them.
So what a request needs is secured where vLLM computes it (`secure`), and what is not used of that goes back at the end
of the step.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

from elastikv.vllm.memory import KVMemory

STOCK = 16  # blocks that are fetched from the elastic pool at once, and kept from step to step
PATIENCE = 0.02  # seconds that a request of others waits for a step of ours
GIVEN_AT_ONCE = 8  # a share of what is cached, so that an engine whose load rises need not ask for each prompt
ASK_AGAIN = 0.1  # seconds before others are asked again, once they had nothing to give


@contextlib.contextmanager
def taken_from_outside(step_lock: Any) -> Iterator[bool]:
    """Whether the lock was free in time. Within a step of the same thread it never is."""
    taken = not step_lock._is_owned() and step_lock.acquire(timeout=PATIENCE)
    try:
        yield taken
    finally:
        if taken:
            step_lock.release()


class CachedQueue(FreeKVCacheBlockQueue):  # type: ignore[misc]
    """Free blocks that are cached, oldest first."""

    def remove_all(self, blocks: Iterable[KVCacheBlock]) -> None:
        for block in blocks:
            self.remove(block)

    def in_order(self) -> Iterator[KVCacheBlock]:
        block = self.fake_free_list_head.next_free_block
        while block is not None and block is not self.fake_free_list_tail:
            following = block.next_free_block
            yield block
            block = following


class ElasticBlockPool(BlockPool):  # type: ignore[misc]
    """Thread safe against `give_up`; like vLLM's own it has one user otherwise. Without memory it is vLLM's own."""

    is_elastic = True  # whoever else has a pool of this interface, such as a test's

    memory: KVMemory | None = None
    free_block_queue: FreeKVCacheBlockQueue
    # What get_num_free_blocks() answers, as it is asked for every request of a step: None where it must be counted.
    # No promise: what is promised is secured.
    _can_be_had: int | None = None

    def bind(self, memory: KVMemory, prefix_cache: int | None = None) -> None:
        """From now on blocks are the memory's. prefix_cache: bytes of cached blocks to keep at most; None: any."""
        if memory.num_blocks != self.num_gpu_blocks:
            raise ValueError(f"{self.num_gpu_blocks} blocks were planned, but there are {memory.num_blocks}")
        if self.free_block_queue.num_free_blocks != self.num_gpu_blocks - 1:
            raise ValueError("a manager of this model takes blocks for good at its start, which elastikv can't serve")
        # Held while the scheduler makes a step, in which blocks that it has found must not go. Reentrant.
        self.step_lock: Any = threading.RLock()
        self._keep = prefix_cache
        self.stock: deque[int] = deque()  # numbers of blocks that are held for the next requests
        self._refused = self._short = False
        self._ask_again = 0.0
        self._counting_ids = False
        self._copied: list[KVCacheBlock] = []
        self._block_of = memory.arrangement.block_of
        for number, block in enumerate(self.blocks):  # out of vLLM's queue, and named as block tables have them
            block.prev_free_block = block.next_free_block = None
            block.block_id = memory.arrangement.table_id(number)
        self.free_block_queue = CachedQueue([])
        self.memory = memory
        memory.on_idle(self.give_up)

    # --- promises ---

    def secure(self, n: int, *, at_once: bool = True) -> None:
        """Gets memory for n blocks before vLLM asks how many it may count on.

        at_once: they are about to be taken; else memory that nobody else has is enough.
        """
        if self.memory is None or n >= self.num_gpu_blocks:  # so vLLM says that a request does not fit this step
            return
        if n <= self._secured() and not self._refused:
            return
        with self.step_lock:
            if self._refused:
                self._refused, self._can_be_had = False, None
            lacking = n - self._secured()
            if lacking <= 0:
                return
            available = self.memory.available()
            self._can_be_had = self._secured() + available
            if lacking <= available and not at_once:
                return
            may_ask = lacking <= available or time.monotonic() >= self._ask_again
            if may_ask and self._fetch(max(lacking, min(STOCK, available))):
                return
            self._refused = self._short = True
            self._can_be_had = self._secured()
            if may_ask:
                self._ask_again = time.monotonic() + ASK_AGAIN

    def expect(self, n: int) -> None:
        """The next step may ask for n blocks, 0 for an ordinary step."""
        if self.memory is not None:
            self.memory.expect(n + STOCK if n > 0 else 0)

    def prepare(self, n: int) -> None:
        """The next step is likely to take n blocks: they are fetched, as far as there is memory that nobody has."""
        if self.memory is not None and n > len(self.stock):
            with self.step_lock:
                if not self.memory.asleep:
                    self._restock(n - len(self.stock))

    def _secured(self) -> int:
        secured: int = len(self.stock) + self.free_block_queue.num_free_blocks
        return secured

    def get_num_free_blocks(self) -> int:
        """How many blocks can be had now: cached ones, and free ones that there is memory for."""
        known = self._can_be_had
        if known is not None:
            return known
        if self.memory is None:
            return int(super().get_num_free_blocks())
        if self._counting_ids:
            return int(self.num_gpu_blocks) - 1 - self.in_use()
        self._can_be_had = known = self._secured() + self.memory.available()
        return known

    def in_use(self) -> int:
        """Blocks that a request holds."""
        assert self.memory is not None
        return self.memory.blocks.held - 1 - self._secured()

    def get_usage(self) -> float:
        """Blocks in use, of all that there are addresses for."""
        if self.memory is None:
            return float(super().get_usage())
        return self.in_use() / max(1, int(self.num_gpu_blocks) - 1)

    # --- blocks ---

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        if self.memory is None:
            return list(super().get_new_blocks(num_blocks))
        with self.step_lock:
            stock = self.stock
            if num_blocks <= len(stock):
                blocks = [self.blocks[stock.popleft()] for _ in range(num_blocks)]
            else:
                blocks = self._take(num_blocks)
            if self._can_be_had is not None:
                self._can_be_had -= num_blocks
            for block in blocks:
                assert block.ref_cnt == 0
                block.ref_cnt = 1
            if self.metrics_collector:
                for block in blocks:
                    self.metrics_collector.on_block_allocated(block)
            return blocks

    def _take(self, n: int) -> list[KVCacheBlock]:
        """Fresh blocks as far as there is memory that nobody has, then the oldest cached ones. All or none."""
        assert self.memory is not None
        if len(self.stock) < n and self._can_be_had != self._secured():  # else there was none just now
            self._restock(n - len(self.stock))
        lacking = n - len(self.stock)
        if lacking > self.free_block_queue.num_free_blocks:
            raise ValueError(f"Cannot get {n} free blocks from the pool")
        fresh = [self.blocks[self.stock.popleft()] for _ in range(min(n, len(self.stock)))]
        if lacking > 0:
            oldest = self.free_block_queue.popleft_n(lacking)
            for block in oldest:
                self._maybe_evict_cached_block(block)
            fresh += oldest
        return fresh

    def _restock(self, needed: int) -> None:
        assert self.memory is not None
        n = min(max(needed, STOCK), self.memory.available())
        if n > 0:
            self._fetch(n)

    def _fetch(self, n: int) -> list[int]:
        assert self.memory is not None
        ids = self.memory.try_allocate(n)
        self.stock.extend(ids)
        self._can_be_had = None
        return ids

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock], *args: Any, **options: Any) -> None:
        if self.memory is None:
            super().free_blocks(ordered_blocks, *args, **options)
            return
        with self.step_lock:
            cached: list[KVCacheBlock] = []
            gone: list[KVCacheBlock] = []
            for block in ordered_blocks:
                block.ref_cnt -= 1
                if block.ref_cnt == 0 and not block.is_null:
                    (gone if block.block_hash is None else cached).append(block)
            self.free_block_queue.append_n(cached)
            self._can_be_had = None
            if gone:
                self._give_back(gone)
            if cached and not self.memory.asleep and self._too_many() > 0:  # asleep, nothing would count as freed
                self._return_stock()  # or it would count for what is evicted
                while (over := self._too_many()) > 0 and self._evict(over) > 0:
                    pass  # extents that had free blocks, too, count for more than what was cached on them

    def _cached_bytes(self) -> int:
        assert self.memory is not None
        return int(self.free_block_queue.num_free_blocks) * int(self.memory.blocks.block_stride)

    def _too_many(self) -> int:
        """Bytes of cached blocks beyond those that are to be kept."""
        return 0 if self._keep is None else max(0, self._cached_bytes() - self._keep)

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        if self.memory is None:
            super().touch(blocks)
            return
        with self.step_lock:
            super().touch(blocks)
            self._can_be_had = None

    def evict_blocks(self, block_ids: set[int]) -> None:
        if self.memory is None:
            super().evict_blocks(block_ids)
            return
        numbers = {self._block_of(each) for each in block_ids}
        with self.step_lock:
            super().evict_blocks(numbers)
            gone = [self.blocks[i] for i in numbers if self._is_cached_free(self.blocks[i])]
            self.free_block_queue.remove_all(gone)
            self._give_back(gone)
            self._can_be_had = None

    def reset_prefix_cache(self) -> bool:
        if self.memory is None:
            return bool(super().reset_prefix_cache())
        with self.step_lock:
            self.release_copied()
            self._counting_ids, self._can_be_had = True, None
            try:
                done = bool(super().reset_prefix_cache())
            finally:
                self._counting_ids = False
            if done:
                gone = list(self.free_block_queue.in_order())
                self.free_block_queue.remove_all(gone)
                self._give_back(gone)
                self._can_be_had = None
            return done

    # --- what goes back ---

    def keep_for_copies(self, blocks: Iterable[KVCacheBlock]) -> None:
        """To be freed once the copies from and to them, which the step under way plans, are enqueued."""
        with self.step_lock:
            self._copied.extend(blocks)

    def release_copied(self) -> None:
        if self._copied:
            with self.step_lock:
                copied, self._copied = self._copied, []
                self.free_blocks(copied)

    def _return_stock(self) -> None:
        if self.stock:
            assert self.memory is not None
            self.memory.free(list(self.stock))
            self.stock.clear()

    def _give_back(self, blocks: Sequence[KVCacheBlock]) -> None:
        assert self.memory is not None
        self.memory.free([self._block_of(block.block_id) for block in blocks])

    def end_step(self, *, idle: bool = False) -> bool:
        """What was secured and not used goes back, but for a few blocks while there is work.

        Whether a request was refused memory in this step.
        """
        if self.memory is None:
            return False
        with self.step_lock:
            if idle:
                self.release_copied()
            self._refused, self._can_be_had = False, None
            extra = [self.stock.pop() for _ in range(len(self.stock) - (0 if idle else STOCK))]
            if extra:
                self.memory.free(extra)
            if idle:
                self.memory.expect(0, refill=False)
            short, self._short = self._short, False
            return short

    def give_up(self, wanted: int) -> int:
        """Gives cached blocks back, oldest first, until `wanted` bytes are free; returns how many are.

        Who lacks memory waits for our work on what he gets, so an eighth of what is cached goes at the least: then he
        need not wait as often. Called from any thread; in the middle of a step there is nothing to give. What was freed
        before and waits for the device is on its way, and not given up twice.
        """
        assert self.memory is not None
        if self.memory.asleep:
            return 0
        with taken_from_outside(self.step_lock) as taken:
            wanted -= self.memory.retiring_bytes
            return self._evict(max(wanted, self._cached_bytes() // GIVEN_AT_ONCE)) if taken and wanted > 0 else 0

    def _evict(self, wanted: int) -> int:
        """By extents, in the order of their oldest blocks: only those that nobody uses, as others would not go."""
        assert self.memory is not None
        memory, before = self.memory, self.memory.physical_bytes
        self._return_stock()
        seen: set[int] = set()
        per_extent = memory.blocks_per_extent
        for block in list(self.free_block_queue.in_order()):
            extent = self._block_of(block.block_id) // per_extent
            if before - memory.physical_bytes >= wanted:
                break
            if extent in seen or block.ref_cnt > 0:
                continue
            seen.add(extent)
            beside = self.blocks[extent * per_extent : (extent + 1) * per_extent]
            if any(each.ref_cnt > 0 or each.is_null for each in beside):
                continue
            gone = [each for each in beside if self._is_cached_free(each)]
            for each in gone:
                self._maybe_evict_cached_block(each)
            self.free_block_queue.remove_all(gone)
            self._give_back(gone)
        self._can_be_had = None
        return max(0, before - memory.physical_bytes)

    def _is_cached_free(self, block: KVCacheBlock) -> bool:
        return block.next_free_block is not None and block.ref_cnt == 0
