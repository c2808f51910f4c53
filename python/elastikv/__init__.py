"""Tensors that grow and shrink in place, and one pool of memory that several models share.

>>> import torch, elastikv
>>> shared = elastikv.SharedMemoryPool(physical_limit=1 << 30, device="cpu")
>>> model = shared.register_model("chat", virtual_capacity=1 << 36)
>>> kv = elastikv.empty((0, 16, 2, 8, 128), max_shape=(131072, 16, 2, 8, 128), dtype=torch.bfloat16, model=model)
>>> elastikv.grow_(kv, 512).shape
torch.Size([512, 16, 2, 8, 128])
"""

from __future__ import annotations

import torch  # before _core, whose symbols it brings

from elastikv._check import check_torch

check_torch(torch.__version__)

from elastikv import errors  # noqa: E402
from elastikv._build_info import VERSION as __version__  # noqa: E402
from elastikv._core import (  # noqa: E402
    DriverCallStats,
    GlobalMemoryStats,
    MemoryStats,
    Model,
    ReleaseGate,
    SharedMemoryPool,
    VirtualMemoryPool,
    devices,
    empty,
    grow_,
    is_elastic,
    model_of,
    prefetch,
    record_stream,
    resident_bytes,
    shrink_,
    zeros,
)
from elastikv.errors import *  # noqa: E402, F403

__all__ = [
    "DriverCallStats",
    "GlobalMemoryStats",
    "MemoryStats",
    "Model",
    "ReleaseGate",
    "SharedMemoryPool",
    "VirtualMemoryPool",
    "__version__",
    "devices",
    "empty",
    "grow_",
    "hf",  # noqa: F405 (loaded when asked for)
    "is_elastic",
    "model_of",
    "prefetch",
    "record_stream",
    "resident_bytes",
    "shrink_",
    "zeros",
    *errors.__all__,
]


def __getattr__(name: str) -> object:
    # transformers takes seconds to import and is optional, so elastikv.hf is loaded when it is asked for.
    if name == "hf":
        import importlib

        return importlib.import_module("elastikv.hf")
    raise AttributeError(f"module 'elastikv' has no attribute '{name}'")
