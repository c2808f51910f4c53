"""Tensors in pool memory on their way to other processes, by torch.multiprocessing.

torch sends a CUDA tensor as a handle that its allocator makes and the receiver's allocator opens. Ours makes handles of
its own, so a receiver needs it in front of torch's. What is sent says so: unpickling it imports this module there,
which is all that a receiver must have installed.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing.reductions as reductions

from elastikv import _core

_Reduced = tuple[Callable[..., torch.Tensor], tuple[Any, ...]]


def _open(rebuild: Callable[..., torch.Tensor], arguments: tuple[Any, ...]) -> torch.Tensor:
    """In the receiver: torch's own rebuilding, once handles of ours can be opened."""
    _core.accept_handles()
    return rebuild(*arguments)


def _reduce(tensor: torch.Tensor) -> _Reduced:
    reduced: _Reduced = reductions.reduce_tensor(tensor)  # type: ignore[no-untyped-call]
    return (_open, reduced) if tensor.is_cuda else reduced


def _register(reduce: Callable[[torch.Tensor], _Reduced]) -> None:
    kinds: list[type] = [*torch._tensor_classes, torch.Tensor, torch.nn.Parameter]
    for kind in kinds:
        ForkingPickler.register(kind, reduce)


def start_sending() -> None:
    """From now on tensors are sent with word of who can open them."""
    _register(_reduce)


def stop_sending() -> None:
    """Tensors are sent as torch does."""
    _register(reductions.reduce_tensor)
