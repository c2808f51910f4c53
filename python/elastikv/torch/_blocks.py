"""The way in for a block of code: a model's memory pool on a GPU, its heap on the host."""

from __future__ import annotations

import atexit
import contextlib
import threading
import weakref
from collections.abc import Iterator

import torch

from elastikv import _core
from elastikv.errors import InvalidArgument


class _ModelMemPool(torch.cuda.MemPool):
    """A torch.cuda.MemPool whose segments are a model's memory. Holds a handle to the model's slot of entry points."""

    def __init__(self, model: _core.Model) -> None:
        slot = _core.take_model_slot(model)
        try:
            device = torch.device(model.device)
            with torch.cuda.device(device):  # a MemPool is of the device that is current when it is made
                super().__init__(_allocator_of(slot))
        except BaseException:
            _core.release_model_slot(slot)
            raise
        self.model_device = device
        # Segments that torch has not given back yet keep the slot.
        weakref.finalize(self, _core.release_model_slot, slot).atexit = False


_lock = threading.RLock()
_allocators: dict[int, torch._C._cuda_CUDAAllocator] = {}  # by slot; kept, as torch before 2.11 doesn't hold them
_pools: dict[int, tuple[_core.Model, _ModelMemPool]] = {}  # by where the model's addresses begin


def _allocator_of(slot: int) -> torch._C._cuda_CUDAAllocator:
    with _lock:
        if slot not in _allocators:
            _allocators[slot] = torch._C._cuda_customAllocator(*_core.model_entry_points(slot))
        return _allocators[slot]


def _drop_pools(*addresses: int) -> None:
    dropped = []
    with _lock:
        for address in addresses:
            dropped.append(_pools.pop(address, None))
    # They die here, without the lock: torch gives their free segments back.


@atexit.register
def _drop_all_pools() -> None:
    _drop_pools(*_pools)


def mem_pool(model: _core.Model) -> torch.cuda.MemPool:
    """The model's `torch.cuda.MemPool`: what is allocated in it is the model's memory, charged to its share.

    For `torch.cuda.use_mem_pool`, or for graphs, `torch.cuda.graph(graph, pool=mem_pool(model).id)`. torch's own
    allocator cuts up the segments, so its statistics and snapshots cover them. It is the same pool at each call, so
    what was freed in one block is used again in the next, until `empty_cache(model)`.

    Raises InvalidArgument for a model on the CPU, ModelNotFound once it is unregistered, and InvalidArgument while 128
    other models have one.
    """
    with _lock:
        gone = [address for address, (other, _) in _pools.items() if not other.registered]
    _drop_pools(*gone)
    with _lock:
        if model.base_address not in _pools:
            _pools[model.base_address] = (model, _ModelMemPool(model))
        return _pools[model.base_address][1]


@contextlib.contextmanager
def use(model: _core.Model) -> Iterator[None]:
    """What the calling thread allocates on the model's device in the block is the model's memory. Also `model.use()`.

    Blocks nest, the innermost counts. Tensors stay valid after the block, and after the model; their memory is the
    model's until the last view of them is gone, and then serves the next block.

    Other threads keep their allocator. On a GPU that holds for autograd's too, which runs `backward()`: gradients that
    it makes are not the model's. On the CPU autograd runs in the thread that calls it, so they are.

    On a GPU this is `torch.cuda.use_mem_pool(mem_pool(model))`. On the CPU it is a heap on half of the addresses that
    the model has free; see `heap_stats`. A child process forked in the block has torch's allocator.

    torch.OutOfMemoryError says who holds what. Raises ModelNotFound once the model is unregistered.
    """
    if model.device == "cpu":
        block = _core.cpu_block(model)
        block.enter()
        try:
            yield
        finally:
            block.leave()
        return
    pool = mem_pool(model)
    try:
        with torch.cuda.use_mem_pool(pool, device=torch.device(model.device)):
            yield
    except torch.OutOfMemoryError as error:
        if hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(f"In the block of model '{model.name}': {_core.holders_of(model)}")
        raise


def heap_stats(model: _core.Model) -> dict[str, int]:
    """Statistics of what was allocated in the blocks of a CPU model, under the keys of `torch.cuda.memory_stats`.

    All zero before the first block. For a model on a GPU torch has them: `torch.cuda.memory_stats()`, and
    `mem_pool(model).snapshot()`. Raises InvalidArgument for such a model.
    """
    _require_cpu(model)
    return _core.cpu_stats(model)


def reset_peak_stats(model: _core.Model) -> None:
    """Sets the peaks of `heap_stats` to what is current."""
    _require_cpu(model)
    _core.reset_cpu_peaks(model)


def empty_cache(model: _core.Model) -> None:
    """Gives memory that was freed in the model's blocks back, from the cache that serves the next block.

    On a GPU the model's MemPool is dropped: its free segments go back now, others when torch.cuda.empty_cache() is
    called after their last tensor has died. That is called here too. A pool that the caller holds, or is in the block
    of, goes back with its last reference.
    """
    if model.device == "cpu":
        _core.empty_cpu_cache(model)
        return
    _drop_pools(model.base_address)
    torch.cuda.empty_cache()


def _require_cpu(model: _core.Model) -> None:
    if model.device != "cpu":
        raise InvalidArgument(
            f"model '{model.name}' is on {model.device}, where torch counts what is allocated in its blocks: "
            "torch.cuda.memory_stats()"
        )
