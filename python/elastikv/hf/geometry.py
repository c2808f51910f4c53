"""What a transformers config says about its KV cache. The one place that knows how transformers versions differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from elastikv.errors import InvalidArgument

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class KVGeometry:
    """The shape of one token's keys and values: the same in every layer.

    windows has one entry a layer: the number of tokens that a sliding-window layer sees, None for full attention.
    """

    heads: int
    head_dim: int
    windows: tuple[int | None, ...]

    @property
    def layers(self) -> int:
        return len(self.windows)

    def layer_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that one token's keys and values take in one layer."""
        return 2 * self.heads * self.head_dim * dtype.itemsize

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that one token's keys and values take in all layers."""
        return self.layers * self.layer_bytes(dtype)


def kv_geometry(config: PreTrainedConfig) -> KVGeometry:
    """Reads a decoder-only model's config. Raises InvalidArgument for a model whose cache is not plain keys and values.

    Which layers slide is asked of transformers' own DynamicCache: the rules behind it change from version to version.
    """
    if config.is_encoder_decoder:
        raise InvalidArgument(f"ElasticCache serves decoder-only models; {type(config).__name__} has an encoder")
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
    if len(windows) != text.num_hidden_layers:
        raise InvalidArgument(
            f"ElasticCache needs a cache in every layer; {type(text).__name__} has {text.num_hidden_layers} layers "
            f"but caches for {len(windows)}"
        )
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return KVGeometry(heads=heads, head_dim=head_dim, windows=tuple(windows))
