"""torch's stock flash op over rows at a fixed stride, with the lengths in device memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

LARGEST_HEAD = 256
#: The op takes the places of rows as int32.
MOST_TOKENS = (1 << 31) - 1


@cache
def takes_lengths() -> bool:
    """Whether this torch's flash op has ``seqused_k``: lengths that are read on the device."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    return any(argument.name == "seqused_k" for argument in schema.arguments)


def _op() -> Any:
    return torch.ops.aten._flash_attention_forward.default


@cache
def why_not(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> str:
    """Why the op can't serve such heads; empty if it can."""
    if device.type != "cuda":
        return f"it runs on CUDA, not on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16, not in {dtype}"
    if key_dim != value_dim:
        return f"keys of {key_dim} and values of {value_dim} differ in size"
    if key_dim % 8 != 0 or key_dim > LARGEST_HEAD:
        return f"heads must be a multiple of 8 up to {LARGEST_HEAD}, not {key_dim}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0"
    return "" if takes_lengths() else "this torch's flash attention takes no lengths; 2.11 does"


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    lengths: torch.Tensor,
    max_query: int,
    max_key: int,
    scaling: float | None,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention of ragged rows, ``[all queries, head, dim]``.

    query: ``[all queries, head, dim]``, row i from query_starts[i] to query_starts[i + 1]. keys and values: windows
    ``[tokens, KV head, dim]``, row i from key_starts[i] on, lengths[i] tokens of it, the last of which belongs to the
    row's last query. The starts are int32 [rows + 1], lengths int32 [rows], all on the device; max_query and max_key
    are upper bounds, and part of what the op costs. Nothing beyond the lengths is touched. Waits for nothing.
    """
    heads = query.shape[1]
    # The op spreads one query's keys over the GPU only where several query heads share a KV head. So that it does, a
    # query of its own KV head comes twice; the copy rides along in the same tile.
    doubled = max_query == 1 and heads == keys.shape[1] and window is None
    if doubled:
        query = query.repeat_interleave(2, dim=1)
    output: torch.Tensor = _op()(
        query,
        keys,
        values,
        query_starts,
        key_starts,
        max_query,
        max_key,
        0.0,
        max_query > 1,
        False,
        scale=scaling,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
        seqused_k=lengths,
    )[0]
    return output[:, ::2] if doubled else output
