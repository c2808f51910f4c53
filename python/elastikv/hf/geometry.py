"""What a transformers config says about its KV cache. The one place that knows how transformers versions differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from elastikv.errors import InvalidArgument

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class LayerShape:
    """One token's keys and values in one layer."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int

    @property
    def key_elements(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def elements(self) -> int:
        return self.key_elements + self.value_heads * self.value_dim

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor) -> LayerShape:
        """That of states ``[batch, head, token, dim]``."""
        return cls(keys.shape[1], keys.shape[3], values.shape[1], values.shape[3])


def require_fit(
    layer: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    shapes: Sequence[LayerShape] | None,
    dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    """Raises InvalidArgument for states ``[batch, head, token, dim]`` that a cache of such layers can't hold.

    shapes and dtype: None where the first states decide.
    """
    if shapes is not None:
        if layer >= len(shapes):
            raise InvalidArgument(f"the cache was made for {len(shapes)} layers; there is no layer {layer}")
        shape = shapes[layer]
        if keys.ndim != 4 or values.ndim != 4 or LayerShape.of(keys, values) != shape:
            raise InvalidArgument(
                f"the cache was made for keys and values [batch, {shape.key_heads}, tokens, {shape.key_dim}]; "
                f"layer {layer} brought keys {list(keys.shape)} and values {list(values.shape)}"
            )
    if keys.device != device or values.device != device:
        raise InvalidArgument(f"the cache's pool is on {device}, but layer {layer} brought {keys.device}")
    if values.dtype != keys.dtype or keys.dtype != (dtype or keys.dtype):
        raise InvalidArgument(f"the cache holds {dtype}, but layer {layer} brought {keys.dtype}, {values.dtype}")
    if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
        raise InvalidArgument("ElasticCache is written in place: run the model under torch.inference_mode()")


@dataclass(frozen=True)
class KVGeometry:
    """One token's keys and values in all layers.

    windows has one entry a layer: the number of tokens that a sliding-window layer sees, None for full attention.
    shapes too, or is None where only the first step can tell: latents of MLA, and encoder-decoders, whose
    configs differ from model to model. plain: attention computes with just what the cache holds, windowed or not.
    """

    windows: tuple[int | None, ...]
    shapes: tuple[LayerShape, ...] | None
    plain: bool = True

    @property
    def layers(self) -> int:
        return len(self.windows)

    def layer_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that one token's keys and values take in one layer, on average."""
        return self.token_bytes(dtype) // self.layers

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that one token's keys and values take in all layers."""
        if self.shapes is None:
            raise InvalidArgument("this model's cache shows its shape with the first step only")
        return sum(shape.elements for shape in self.shapes) * dtype.itemsize


def kv_geometry(config: PreTrainedConfig) -> KVGeometry:
    """Reads a model's config, of an encoder-decoder its decoder's.

    Raises InvalidArgument for a model whose cache is not keys and values in every layer. Which layers slide is asked of
    transformers' own DynamicCache: the rules behind it change from version to version.
    """
    text = config.get_text_config(decoder=True)
    windows: list[int | None] = []
    for index, layer in enumerate(DynamicCache(config=text).layers):
        if type(layer) is DynamicLayer:
            windows.append(None)
        elif type(layer) is DynamicSlidingWindowLayer:
            windows.append(int(layer.sliding_window))
        else:
            raise InvalidArgument(
                "ElasticCache holds layers of full or sliding-window attention; "
                f"layer {index} of {type(text).__name__} wants a {type(layer).__name__}"
            )
    if config.is_encoder_decoder:
        count = _decoder_layers(config)
        return KVGeometry(tuple(windows * count)[:count], None, plain=False)
    if len(windows) != text.num_hidden_layers:
        raise InvalidArgument(
            f"ElasticCache needs a cache in every layer; {type(text).__name__} has {text.num_hidden_layers} layers "
            f"but caches for {len(windows)}"
        )
    if getattr(text, "kv_lora_rank", None):
        return KVGeometry(tuple(windows), None, plain=False)
    # A chunk is no window, though the cache treats it as one: what a token sees, only the model's mask says.
    chunked = bool(getattr(text, "attention_chunk_size", None)) and any(window is not None for window in windows)
    shapes = tuple(_shape(text, index) for index in range(len(windows)))
    return KVGeometry(tuple(windows), shapes, plain=not chunked)


def _decoder_layers(config: Any) -> int:
    for name in ("decoder_layers", "num_decoder_layers", "num_hidden_layers"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    raise InvalidArgument(f"{type(config).__name__} does not say how many layers its decoder has")


def _shape(config: Any, index: int) -> LayerShape:
    per_layer = getattr(config, "per_layer_config", None)  # configs whose layers differ
    if per_layer is not None and not isinstance(per_layer, dict):
        config = per_layer[index]

    def first(*names: str) -> int | None:
        for name in names:
            value = getattr(config, name, None)
            if isinstance(value, (list, tuple)):
                value = value[index]
            if value:
                return int(value)
        return None

    query_heads = first("num_attention_heads")
    assert query_heads is not None
    heads = first("num_key_value_heads", "num_kv_heads") or query_heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        heads = 1
    dim = first("head_dim") or config.hidden_size // query_heads
    return LayerShape(heads, dim, heads, dim)
