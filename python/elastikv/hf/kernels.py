"""Which of our own kernels serve a tensor. They are compiled here when that is first asked for a device and dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch

from elastikv import _core
from elastikv.hf.views import logger

_there: set[tuple[object, ...]] = set()  # what is known to be served; a refusal may pass, as of a device that is full
_said: set[str] = set()


def serve(like: torch.Tensor) -> bool:
    """Whether a step's kernels but attention's take tensors of this device and dtype."""
    if like.device.type != "cuda" or like.dtype not in (torch.bfloat16, torch.float16):
        return False
    key = (like.device, like.dtype)
    return key in _there or _settled(key, lambda: _core.why_no_decode_kernels(like), "operators, not our kernels")


def attend(keys: torch.Tensor, values: torch.Tensor, group: int) -> bool:
    """Whether attention's takes one query a row over these windows ``[token, KV head, dim]``, of ``group`` query heads
    a KV head."""
    if keys.device.type != "cuda" or keys.shape != values.shape:
        return False
    if any(side.data_ptr() % 16 or side.stride(0) % 8 or side.stride(1) % 8 for side in (keys, values)):
        return False
    key = (keys.device, keys.dtype, keys.shape[2], group)
    return key in _there or _settled(key, lambda: _core.why_no_decode_attention(keys, keys.shape[2], group), "flash op")


def steps(like: torch.Tensor) -> bool:
    """Whether those of a step's beginning and end do, on this tensor's device."""
    if like.device.type != "cuda":
        return False
    key = (like.device,)
    return key in _there or _settled(key, lambda: _core.why_no_step_kernels(like), "operators, not our kernels")


def _settled(key: tuple[object, ...], why_not: Callable[[], str], instead: str) -> bool:
    if torch.cuda.is_current_stream_capturing():  # a capture may load nothing: what ran before it decides
        return False
    reason = why_not()
    if not reason:
        _there.add(key)
    elif reason not in _said:
        _said.add(reason)
        logger.warning("decoding takes torch's %s: %s", instead, reason)
    return not reason
