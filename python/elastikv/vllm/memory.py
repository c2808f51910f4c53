"""The KV memory of one engine: elastic blocks, drawn from the ledger that the engines of a device share."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Sequence

import torch

import elastikv
from elastikv.vllm.layout import BlockParts, LayerByLayer, LayoutNotPossible, SideBySide
from elastikv.vllm.settings import Settings

logger = logging.getLogger("vllm.elastikv")

# Of the device, what all engines of a pool may hold together, where nobody says: the rest is for CUDA's own.
DEFAULT_SHARE = 0.95
_NO_MEMORY = (elastikv.OutOfPhysicalMemory, elastikv.OutOfVirtualMemory, elastikv.MappingFailed)


def ledger_name(pool: str, device: torch.device) -> str:
    """A ledger for each device, by the number that the machine gives it, as processes may see different ones."""
    if device.type != "cuda":
        return f"{pool}.{device.type}"
    index = device.index or 0
    visible = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
    name = visible[index] if index < len(visible) else str(index)
    return f"{pool}.cuda{name}" if name.isdigit() else f"{pool}.{name}"


def find_ledger(name: str) -> elastikv.Ledger | None:
    """The ledger, if a process has it open."""
    try:
        ledger = elastikv.Ledger(name)
        return ledger if ledger.stats().processes else None
    except elastikv.LedgerError:
        return None


def _shown(name: str) -> str:
    """As a model's id, of which a ledger keeps 127 bytes: with room for what is said of it."""
    kept = name.encode()[:110].decode(errors="ignore")
    return name if kept == name else f"{kept}..."


_of_storage: weakref.WeakValueDictionary[int, KVMemory] = weakref.WeakValueDictionary()


def memory_of(tensor: torch.Tensor) -> KVMemory | None:
    """The memory that a view lies in; None for torch's own."""
    return _of_storage.get(tensor.untyped_storage().data_ptr())


class KVMemory:
    """Blocks of an engine, of which the first is always there. Not thread safe, but for what is said otherwise.

    Everything else of the engine (weights, activations, graphs) is a reserve in the same ledger, so that no other
    engine counts on that memory.
    """

    def __init__(
        self,
        settings: Settings,
        name: str,
        device: torch.device,
        num_blocks: int,
        layout: BlockParts,
        *,
        device_bytes: int,
        other_bytes: int = 0,
    ) -> None:
        """device_bytes: of the whole device. other_bytes: what the engine holds beside its KV cache.

        Raises what SharedMemoryPool and register_model raise.
        """
        self.name, self.device, self.num_blocks, self.layout = name, device, num_blocks, layout
        self.pool_name = ledger_name(settings.pool, device)
        limit = settings.limit
        if limit is None:
            present = find_ledger(self.pool_name)
            share = int(device_bytes * DEFAULT_SHARE) >> 21 << 21
            limit = present.stats().physical_limit if present is not None else share
        self._shared = elastikv.SharedMemoryPool(limit, str(device), park_limit=settings.park, name=self.pool_name)
        self._other: elastikv.Model | None = None
        self._other_bytes = other_bytes
        if other_bytes:
            page = self._shared.page_size
            whole = -(-other_bytes // page) * page
            self._other = self._shared.register_model(f"{_shown(name)} (weights)", 2 * whole, reserve=other_bytes)
        addresses = 2 * num_blocks * layout.size + (1 << 30)
        self.model = self._shared.register_model(
            _shown(name), addresses, reserve=settings.reserve, priority=settings.priority
        )
        extent = settings.extent
        if extent is None and settings.layout == "layers":
            extent = LayerByLayer.extent_bytes(layout)
        self.blocks = elastikv.BlockPool(
            self.model,
            num_blocks,
            (layout.size,),
            1,
            torch.int8,
            extent_bytes=extent,
            ahead_bytes=settings.ahead,
        )
        self.ceiling = min(num_blocks * self.blocks.block_stride + 2 * self.blocks.extent_bytes, limit)
        self.model.set_quota(limit=self.ceiling)
        self.raw = self.blocks.layer(0)
        _of_storage[self.raw.untyped_storage().data_ptr()] = self
        self.blocks_per_extent = self.blocks.extent_bytes // self.blocks.block_stride
        self.arrangement = self._arranged(settings.layout)
        null = self.blocks.allocate(1)
        assert null.tolist() == [0]
        self.zero([0])  # some kernels read it, and what they make of it must be a number
        self._named: set[int] = set()
        self._stream: torch.cuda.Stream | None = None
        self._idle: elastikv.ReclaimHandle | None = None
        self.asleep = False
        self._owed: list[int] = []  # freed while asleep
        logger.info(
            "KV cache: %d blocks of %.2f MiB, at most %.2f GiB, in pool '%s' (limit %.2f GiB); extents of %.1f MiB, %s",
            num_blocks,
            layout.size / 2**20,
            num_blocks * layout.size / 2**30,
            self.pool_name,
            limit / 2**30,
            self.blocks.extent_bytes / 2**20,
            type(self.arrangement).__name__,
        )

    def _arranged(self, layout: str) -> SideBySide | LayerByLayer:
        if layout == "layers":
            try:
                return LayerByLayer(self.layout, self.raw, self.blocks_per_extent)
            except LayoutNotPossible as error:
                logger.warning("elastikv: layers lie side by side in each block: %s", error)
        return SideBySide(self.layout, self.raw)

    @property
    def physical_bytes(self) -> int:
        """Of the extents that hold a block."""
        return self.blocks.physical_bytes

    @property
    def retiring_bytes(self) -> int:
        """Freed, while work that was enqueued before may still touch it."""
        return self.model.stats().retiring

    def available(self) -> int:
        """How many blocks there is memory for without asking anyone."""
        return self.blocks.available()

    def use_stream(self) -> None:
        """The current stream is the one that the engine computes on; other threads free blocks behind its work."""
        if self._stream is None and self.device.type == "cuda":
            self._stream = torch.cuda.current_stream(self.device)

    def try_allocate(self, n: int) -> list[int]:
        """n blocks, or none where there is no memory. Others on the ledger are asked for what they keep idle."""
        try:
            ids: list[int] = self.blocks.allocate(n, stream=self._stream).tolist()
            return ids
        except _NO_MEMORY as error:
            logger.debug("no memory for %d blocks: %s", n, error)
            return []

    def expect(self, n: int, *, refill: bool = True) -> None:
        """n blocks are about to be asked for: the worker maps what it may of them meanwhile. refill: and a little of
        what is kept ahead."""
        if not self.asleep:
            self.blocks.expect(n, refill=refill)

    def hold_up_to(self, last: int) -> None:
        """All ids up to `last` have memory until let_go(): vLLM's warm-up names blocks that nobody gave it.

        Raises OutOfPhysicalMemory, OutOfVirtualMemory.
        """
        needed = self.arrangement.blocks_under(last)
        while missing := sum(block not in self._named for block in range(1, needed)):
            self._named.update(int(each) for each in self.blocks.allocate(missing).tolist())

    def let_go(self) -> None:
        if self._named:
            self.blocks.free(sorted(self._named))
            self._named.clear()

    def free(self, ids: Sequence[int]) -> None:
        """Their memory goes back once the work that is enqueued now has finished; of what sleeps, after it woke.

        Thread safe, but against pause() and resume().
        """
        if self.asleep:
            self._owed.extend(ids)
            return
        self.blocks.free(ids, streams=None if self._stream is None else [self._stream])

    def zero(self, table_ids: Sequence[int]) -> None:
        """All layers of blocks, in the order of the current stream; of those that are held, as a request may have lost
        its own to another since vLLM named them."""
        held = [each for each in table_ids if self.blocks.references(self.arrangement.block_of(each)) > 0]
        if held:
            self.arrangement.zero(torch.tensor(held, dtype=torch.int64).to(self.device, non_blocking=True))

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """All layers of held blocks to other held ones, (source, target) by table ids, in the order of the current
        stream. All sources are read before a target is written."""
        if pairs:
            ids = torch.tensor([list(pair) for pair in pairs], dtype=torch.int64).to(self.device, non_blocking=True)
            self.arrangement.copy(*ids.unbind(1))

    def on_idle(self, give_up: Callable[[int], int]) -> None:
        """give_up(wanted) is called, on any thread, where somebody lacks memory; it returns the bytes it freed."""
        self._idle = self.model.on_reclaim(give_up)

    def pause(self) -> None:
        """Blocks that are held go to the host, and all memory to others. Raises what Model.pause raises."""
        if not self.asleep:
            self.model.pause()
            self.asleep = True

    def resume(self, timeout: float) -> None:
        """Brings them back, with room that others make within `timeout` seconds. Raises what Model.resume raises."""
        if self.asleep:
            self.model.resume(timeout=timeout)
            self.asleep = False
            owed, self._owed = self._owed, []
            if owed:
                self.free(owed)

    def sleep(self) -> None:
        """Gives back what no block holds, and the promise of memory for what vLLM puts to sleep."""
        self.model.trim()
        if self._other is not None:
            self._other.set_quota(reserve=0)

    def wake(self, timeout: float = 30.0) -> None:
        """Makes room for what vLLM wakes up; its KV memory comes as it is used.

        Raises OutOfPhysicalMemory where others hold the memory and don't give it up in time.
        """
        if self._other is None:
            return
        # Memory that is there for a moment is what makes others give theirs up; the reserve then keeps it free.
        offset = self._shared.allocate_for_model(self._other.name, self._other_bytes, timeout=timeout)
        try:
            self._other.set_quota(reserve=self._other_bytes)
        finally:
            self._shared.deallocate_for_model(self._other.name, offset - self._other.base_address, self._other_bytes)
            self._other.drain()
            self._other.trim()

    def close(self) -> None:
        """Gives everything back, after all of the device's work. The tensors may no longer be read."""
        self._idle = None
        self.model.on_order(None)
        self.blocks.close()
        self._shared.close()
