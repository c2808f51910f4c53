"""Attention over views of exactly the used length: right everywhere, fast where no kernel takes lengths."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn.functional import scaled_dot_product_attention

logger = logging.getLogger("elastikv.hf")


@cache
def note_fallback(reason: str) -> None:
    """Says once why attention runs over views instead of in the flash op."""
    logger.warning("attention 'elastikv' runs over views of exact length: %s", reason)


@dataclass(frozen=True)
class Extras:
    """What some models ask of attention beyond scaling and a window.

    softcap bounds the scores by tanh; bias is added to them, ``[*, head or 1, query, key]``; sinks, ``[head]``, take
    part in the softmax without a value.
    """

    softcap: float | None = None
    bias: torch.Tensor | None = None
    sinks: torch.Tensor | None = None

    def __bool__(self) -> bool:
        return self.softcap is not None or self.bias is not None or self.sinks is not None

    def names(self) -> str:
        """For messages."""
        named = {"a soft cap": self.softcap, "a position bias": self.bias, "attention sinks": self.sinks}
        return " and ".join(name for name, value in named.items() if value is not None)


def visible(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """True where a query sees a key, ``[query, key]``; the last query belongs to the last key."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float | None,
    window: int | None,
    mask: torch.Tensor | None = None,
    causal: bool = True,
    extras: Extras | None = None,
) -> torch.Tensor:
    """Attention ``[batch, query, head, value dim]`` of ``[batch, head, query, dim]`` on ``[batch, KV head, key, ...]``.

    The last query belongs to the last key. mask, if given, is boolean ``[*, *, query, key]`` and says all: causal and
    window then play no part.
    """
    queries, length = query.shape[2], keys.shape[2]
    implicit_causal = False
    if mask is None and causal:
        if window is not None and queries == 1 and length > window:
            keys, values = keys[:, :, -window:], values[:, :, -window:]
            length = window
        if queries > 1:
            if queries == length and (window is None or window >= length) and not extras:
                implicit_causal = True
            else:
                mask = visible(queries, length, window, query.device)
    if extras:
        return _attend_with_extras(query, keys, values, scaling, mask, extras)
    groups = query.shape[1] // keys.shape[1]
    if mask is not None and groups > 1 and query.device.type != "cpu":
        # With a mask, the fused kernels of a GPU serve no grouped queries.
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        groups = 1
    output = scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=implicit_causal, scale=scaling, enable_gqa=groups > 1
    )
    return output.transpose(1, 2)


def _attend_with_extras(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float | None,
    mask: torch.Tensor | None,
    extras: Extras,
) -> torch.Tensor:
    groups = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scores = torch.matmul(query, keys.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if extras.softcap is not None:
        scores = torch.tanh(scores / extras.softcap) * extras.softcap
    if extras.bias is not None:
        scores = scores + extras.bias[..., -keys.shape[2] :]
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if extras.sinks is not None:
        sinks = extras.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)[..., : keys.shape[2]]
    return torch.matmul(weights, values).transpose(1, 2)
