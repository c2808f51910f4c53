"""ElasticCache: a transformers cache whose memory follows its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

import elastikv
from elastikv.errors import InvalidArgument
from elastikv.hf.geometry import kv_geometry
from elastikv.hf.slots import Slots

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class ElasticLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's window onto the slots. Holds no tensor of its own, so nothing keeps memory alive behind our back."""

    is_compileable = False
    is_croppable = True  # all tokens are kept, also those that a sliding window has passed

    def __init__(self, slots: Slots, index: int, window: int | None) -> None:
        # The base class would store keys, values and is_initialized as attributes: here they follow from the slots.
        self._slots = slots
        self._index = index
        self.sliding_window = window
        self.is_sliding = window is not None

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return self._slots.kv is not None

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """All cached keys, ``[batch, head, token, dim]``: a view that lives as long as the memory. None if empty."""
        return self._slots.view(self._index, 0, self._slots.length)[0] if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """As keys."""
        return self._slots.view(self._index, 0, self._slots.length)[1] if self.is_initialized else None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the first update knows all that it takes."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self._first_visible()
        end = self._slots.write(self._index, key_states, value_states)
        return self._slots.view(self._index, start, end)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys that update will return, position of the first of them)."""
        start = self._first_visible()
        return self._slots.length + query_length - start, start

    def get_seq_length(self) -> int:
        return self._slots.length

    def get_max_length(self) -> int:
        return self._slots.max_tokens if self.sliding_window is None else self.sliding_window

    def _first_visible(self) -> int:
        """The oldest token that the next one may see: a window of n holds the token itself and n - 1 before it."""
        return 0 if self.sliding_window is None else max(self._slots.length - self.sliding_window + 1, 0)

    def reset(self) -> None:
        self._slots.reset()


class ElasticCache(Cache):
    """A KV cache for ``model.generate(..., past_key_values=cache)`` that grows and shrinks in a pool's memory.

    Layout: one elastic tensor ``[batch, token, layer, 2 (key, value), head, dim]`` on the model handle's device. A
    sequence is a row of ``max_tokens`` addresses; only the front that holds tokens has physical memory behind it. New
    tokens are written in place, and attention gets views of exactly the used length: nothing is copied as the cache
    grows, and addresses never change.

    Serves decoder-only models with the same number and size of KV heads in every layer, with full and sliding-window
    attention. A sliding layer returns what DynamicCache would, but keeps all tokens, so that crop always works.

    Args:
        config: the model's config.
        model: a handle from ``SharedMemoryPool.register_model``. All memory is charged to it.
        max_batch: the most sequences. Memory and addresses are taken for the batch that comes, not for this many.
        max_tokens: the most tokens of one sequence, prompt and answer. Costs addresses, not memory.
        dtype: of the keys and values; by default that of the first ones.

    Errors: InvalidArgument for what does not fit (batch, tokens, heads, device, dtype), OutOfPhysicalMemory when the
    pool is dry. Either way the cache stays as it was before the step, ready to try again: after an error of the model
    itself, in the middle of a step, call ``crop(0)`` first.

    Not thread-safe. The memory is given back by reset, close, or with the last reference.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        model: elastikv.Model,
        max_batch: int = 1,
        max_tokens: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        if max_batch < 1 or max_tokens < 1:
            raise InvalidArgument(f"max_batch={max_batch} and max_tokens={max_tokens} must be at least 1")
        geometry = kv_geometry(config)
        self._serve(Slots(geometry, model=model, max_batch=max_batch, max_tokens=max_tokens, dtype=dtype))

    def _serve(self, slots: Slots) -> None:
        self._slots = slots
        windows = enumerate(slots.geometry.windows)
        super().__init__(layers=[ElasticLayer(slots, index, window) for index, window in windows])

    def __deepcopy__(self, memo: dict[int, Any]) -> ElasticCache:
        """A cache of its own with the same tokens, on the same model's memory: how a prefix is used again."""
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other._serve(self._slots.copy())
        return other

    def __repr__(self) -> str:
        slots, size = self._slots, self.resident_bytes
        return f"ElasticCache(batch={slots.batch}, tokens={slots.length}/{slots.max_tokens}, {size} bytes)"

    @property
    def resident_bytes(self) -> int:
        """Bytes of the cached tokens. The pool maps whole pages for them, and at most an eighth ahead."""
        return 0 if self._slots.kv is None else elastikv.resident_bytes(self._slots.kv)

    @property
    def max_batch(self) -> int:
        return self._slots.max_batch

    @property
    def max_tokens(self) -> int:
        return self._slots.max_tokens

    @property
    def batch_size(self) -> int:
        """Sequences in the cache, -1 before the first update."""
        return self._slots.batch or -1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx >= len(self.layers):
            raise InvalidArgument(f"the cache was made for {len(self.layers)} layers; there is no layer {layer_idx}")
        layer = self.layers[layer_idx]
        assert isinstance(layer, ElasticLayer)
        return layer.update(key_states, value_states)

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """The name that transformers used to have for get_max_length."""
        return self.get_max_length(layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens and gives their memory back.

        The number is negative, or 0 to forget an unfinished step. Memory stays while somebody holds a view of it.
        """
        if tokens_to_remove > 0:
            raise InvalidArgument(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}")
        if tokens_to_remove < 0:
            self._slots.require_whole_steps()
        self._slots.crop(max(self._slots.length + tokens_to_remove, 0))

    def reset(self) -> None:
        """Forgets everything and gives all memory back (views that are held keep it until they die)."""
        self._slots.reset()

    def close(self) -> None:
        """As reset, and for good. May be called twice."""
        self._slots.close()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Sequence i becomes what ``beam_idx[i]`` was."""
        self._slots.reorder(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the given sequences, in the given order: indices or a mask."""
        if self._slots.batch:
            self._slots.select(torch.arange(self._slots.batch)[torch.as_tensor(indices).cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence, as long as max_batch permits."""
        self._slots.select(torch.arange(self._slots.batch).repeat_interleave(repeats))
