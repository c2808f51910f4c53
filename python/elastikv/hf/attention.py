"""The attention function `elastikv`, and the mask function beside it: no masks, lengths come from the cache.

`register` makes both known to transformers, so that ``model.set_attn_implementation("elastikv")`` finds them. That
happens with the first import of anything from elastikv.hf: nobody else pays for it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from elastikv.errors import InvalidArgument
from elastikv.hf import custom_op, views
from elastikv.hf.step import step_of
from elastikv.hf.views import Extras

if TYPE_CHECKING:
    from elastikv.hf.cache import ElasticLayer

NAME = "elastikv"
NO_EXTRAS = Extras()


def register() -> None:
    """Makes the functions known to transformers, as importing anything from elastikv.hf does. May be called again."""
    AttentionInterface.register(NAME, elastikv_attention)
    AttentionMaskInterface.register(NAME, elastikv_mask)


# ---- from the cache to the attention function


class _Handover(threading.local):
    """The layer whose new keys are on their way to the attention function of the same thread."""

    layer: ElasticLayer | None = None
    key: torch.Tensor | None = None


_handover = _Handover()


def hand_over(layer: ElasticLayer, key: torch.Tensor) -> None:
    """From update: the attention function is to write this layer's states, which it knows by their keys."""
    _handover.layer, _handover.key = layer, key


def _take(key: torch.Tensor) -> ElasticLayer | None:
    layer, expected = _handover.layer, _handover.key
    _handover.layer = _handover.key = None
    if layer is not None and key is not expected:
        raise InvalidArgument(
            "this model changes its keys between the cache and the attention function, which 'elastikv' does not "
            "serve: use ElasticCache with set_attn_implementation('sdpa')"
        )
    return layer


# ---- the two functions


def elastikv_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """What the attention function is to know: the padding, ``[batch, tokens]``, or nothing.

    For anything but causal attention, with a sliding window or without, the mask that SDPA would get.
    """
    chunked = local_size is not None and local_size == getattr(config, "attention_chunk_size", None)
    if allow_is_causal_skip and (mask_function is causal_mask_function or (local_size is not None and not chunked)):
        return attention_mask
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        config=config,
        **kwargs,
    )


def elastikv_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    elastikv: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention ``[batch, query, head, dim]`` of new queries on what the cache holds and the new keys and values.

    elastikv is the handle of a step that the caller runs himself, as the decoder does. Without it the states come from
    an ElasticCache's update, or are plain ones. Raises InvalidArgument where the model asks for dropout.
    """
    if dropout:
        raise InvalidArgument("attention 'elastikv' is for inference: call model.eval()")
    plain = softcap is None and position_bias is None and s_aux is None
    extras = NO_EXTRAS if plain else Extras(softcap, position_bias, s_aux)
    if elastikv is not None:
        layer: int = module.layer_idx  # type: ignore[assignment]
        if not extras and torch.compiler.is_compiling():
            return custom_op.attend(query, key, value, elastikv, layer, scaling, sliding_window), None
        output = step_of(elastikv).attend(layer, query, key, value, scaling, sliding_window, extras or None)
        return output, None
    taken = _take(key)
    if taken is not None:
        if attention_mask is not None and attention_mask.ndim == 4:
            views.note_fallback("the model brings a mask of its own")
            keys, values = taken.write_and_view(key, value)
            mask, extras = _as_boolean(attention_mask, query, extras)
            return _views(module, query, keys, values, mask, scaling, sliding_window, is_causal, extras), None
        return taken.batch.attend(
            taken.index, query, key, value, attention_mask, scaling, sliding_window, None if plain else extras
        ), None
    mask, extras = _as_boolean(_four_dimensional(module, query, key, attention_mask, sliding_window, is_causal),
                               query, extras)  # fmt: skip
    return _views(module, query, key, value, mask, scaling, sliding_window, is_causal, extras), None


def _views(
    module: torch.nn.Module,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    window: int | None,
    is_causal: bool | None,
    extras: Extras,
) -> torch.Tensor:
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    return views.attend(
        query, keys, values, scaling=scaling, window=window, mask=mask, causal=causal, extras=extras or None
    ).contiguous()


def _four_dimensional(
    module: torch.nn.Module,
    query: torch.Tensor,
    keys: torch.Tensor,
    mask: torch.Tensor | None,
    window: int | None,
    is_causal: bool | None,
) -> torch.Tensor | None:
    """The padding as a full mask, for states that no ElasticCache holds."""
    if mask is None or mask.ndim != 2:
        return mask
    seen = mask[:, -keys.shape[2] :].to(torch.bool)[:, None, None, :]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if not causal:
        return seen
    allowed = views.visible(query.shape[2], keys.shape[2], window, query.device) & seen
    # A row of padding sees itself, or its softmax would be of nothing.
    own = torch.arange(keys.shape[2] - query.shape[2], keys.shape[2], device=query.device)
    return allowed | (own[:, None] == torch.arange(keys.shape[2], device=query.device))


def _as_boolean(mask: torch.Tensor | None, query: torch.Tensor, extras: Extras) -> tuple[torch.Tensor | None, Extras]:
    """A mask that is added becomes a bias; what is left is boolean or None."""
    if mask is None or mask.dtype == torch.bool:
        return mask, extras
    bias = mask if extras.bias is None else mask + extras.bias
    return torch.ones((), dtype=torch.bool, device=query.device), Extras(extras.softcap, bias, extras.sinks)


register()
