"""Tensors that grow and shrink in place, and one pool of memory that several models share.

>>> import torch, elastikv
>>> shared = elastikv.SharedMemoryPool(physical_limit=1 << 30, device="cpu")
>>> model = shared.register_model("chat", virtual_capacity=1 << 36)
>>> kv = elastikv.empty((0, 16, 2, 8, 128), max_shape=(131072, 16, 2, 8, 128), dtype=torch.bfloat16, model=model)
>>> elastikv.grow_(kv, 512).shape
torch.Size([512, 16, 2, 8, 128])
"""

from __future__ import annotations

from pathlib import Path

import torch as _torch  # before _core, whose symbols it brings; `elastikv.torch` is a package of ours

from elastikv._check import check_torch

check_torch(_torch.__version__)

from elastikv import errors  # noqa: E402
from elastikv._build_info import VERSION as __version__  # noqa: E402
from elastikv._core import (  # noqa: E402
    BlockPool,
    Cancellation,
    DriverCallStats,
    GlobalMemoryStats,
    ImportedRange,
    Ledger,
    LedgerClient,
    LedgerStats,
    MemoryStats,
    Model,
    Order,
    PressureHandle,
    Quota,
    RangeExport,
    ReclaimHandle,
    ReleaseGate,
    SharedMemoryPool,
    SlotTensor,
    VirtualMemoryPool,
    devices,
    empty,
    grow_,
    import_,
    is_elastic,
    ledgers,
    model_of,
    prefetch,
    record_stream,
    resident_bytes,
    shrink_,
    spill,
    unspill,
    zeros,
)
from elastikv.device_pools import DevicePools  # noqa: E402
from elastikv.errors import *  # noqa: E402, F403
from elastikv.orders import obey  # noqa: E402

__all__ = [
    "BlockPool",
    "Cancellation",
    "DevicePools",
    "DriverCallStats",
    "GlobalMemoryStats",
    "ImportedRange",
    "Ledger",
    "LedgerClient",
    "LedgerStats",
    "MemoryStats",
    "Model",
    "Order",
    "PressureHandle",
    "ReclaimHandle",
    "Quota",
    "RangeExport",
    "ReleaseGate",
    "SharedMemoryPool",
    "SlotTensor",
    "VirtualMemoryPool",
    "__version__",
    "devices",
    "empty",
    "grow_",
    "hf",  # noqa: F405 (loaded when asked for)
    "import_",
    "is_elastic",
    "ledgers",
    "library_path",
    "model_of",
    "obey",
    "prefetch",
    "record_stream",
    "resident_bytes",
    "shrink_",
    "spill",
    "torch",  # noqa: F405 (loaded when asked for)
    "unspill",
    "zeros",
    *errors.__all__,
]


def library_path() -> str:
    """The path of libelastikv_torch.so, with `elastikv_malloc` and `elastikv_free` for torch's pluggable allocator.

    It needs no Python, only torch's libraries in the process. See `elastikv.torch.pluggable_allocator`.
    """
    return str(Path(__file__).with_name("libelastikv_torch.so"))


def __getattr__(name: str) -> object:
    # Loaded when asked for: hf, as transformers is optional and takes seconds to import, and torch with it.
    if name in ("hf", "torch"):
        import importlib

        return importlib.import_module(f"elastikv.{name}")
    raise AttributeError(f"module 'elastikv' has no attribute '{name}'")
