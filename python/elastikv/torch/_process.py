"""The ways in for a whole process: the installed allocator, and torch's pluggable one."""

from __future__ import annotations

import ctypes

import torch

from elastikv import _core, library_path
from elastikv.errors import InvalidArgument
from elastikv.torch import _ipc


def install(pool: _core.SharedMemoryPool, name: str = "torch", largest_extent: int | None = None) -> None:
    """Puts all that torch allocates on the pool's GPU into the pool, as its client `name`.

    It may come before or after CUDA is initialised: what torch's own allocator handed out before goes back there. Other
    devices keep torch's allocator. All of torch.cuda's memory functions, graphs, `torch.compile`, `record_stream` and
    torch.multiprocessing work as they do without; a process that receives tensors needs elastikv, but no pool.

    largest_extent: bytes, rounded up to pages. Memory goes back to the pool an extent at a time, once none of it is in
    use: with small extents less idle memory is held, and each costs driver calls while the memory grows. None, the
    default, makes extents as large as what they were made for, up to one percent of the memory that is still free.

    Raises InvalidArgument for a pool on the CPU, or while another is installed for the device; ModelAlreadyExists where
    the pool has a client of that name.
    """
    _core.install_allocator(pool, name, largest_extent=largest_extent)
    _ipc.start_sending()


def uninstall() -> None:
    """Puts torch's own allocator back. Tensors that are alive stay valid; their memory goes back to the pool."""
    _core.uninstall_allocator()
    _ipc.stop_sending()


# torch's names for the hooks of a pluggable allocator, and ours. torch spells two of its setters without "_fn".
_HOOKS = {
    "set_init_fn": "elastikv_init",
    "set_reset_fn": "elastikv_reset",
    "set_memory_fraction_fn": "elastikv_memory_fraction",
    "set_base_alloc_fn": "elastikv_base_alloc",
    "set_record_stream_fn": "elastikv_record_stream",
    "set_begin_allocate_to_pool": "elastikv_begin_allocate_to_pool",
    "set_end_allocate_to_pool_fn": "elastikv_end_allocate_to_pool",
    "set_release_pool": "elastikv_release_pool",
}


def pluggable_allocator(
    pool: _core.SharedMemoryPool | None = None, name: str = "torch"
) -> torch.cuda.memory.CUDAPluggableAllocator:
    """The C entry points with every hook that torch has for them, for `torch.cuda.memory.change_current_allocator`.

    >>> torch.cuda.memory.change_current_allocator(elastikv.torch.pluggable_allocator())  # doctest: +SKIP

    With a pool, the pool's device is served from it, as its client `name`, until the process ends. Without one, and for
    other devices, memory comes from a pool of the whole device, made at the first allocation; the environment
    variable ELASTIKV_PHYSICAL_LIMIT, read then, sets another limit: bytes, or a share such as 0.9.

    torch takes such an allocator only before its own has been used, keeps it until the process ends, and has neither
    statistics nor snapshots for it; `install` has both. `CUDAPluggableAllocator(elastikv.library_path(),
    "elastikv_malloc", "elastikv_free")` is the same without the hooks: then `empty_cache` and `record_stream` do
    nothing, and graphs can't be captured.

    Raises InvalidArgument for a pool on the CPU, and where the device is served from another pool already.
    """
    if pool is not None:
        if not pool.device.startswith("cuda"):
            raise InvalidArgument(f"the pool is on {pool.device}; a pluggable allocator needs one on a CUDA device")
        _core.serve_entry_points(pool, name)
    path = library_path()
    allocator = torch.cuda.memory.CUDAPluggableAllocator(path, "elastikv_malloc", "elastikv_free")
    library = ctypes.CDLL(path)
    for setter, symbol in _HOOKS.items():
        address = ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value
        getattr(allocator._allocator, setter)(address)
    return allocator
