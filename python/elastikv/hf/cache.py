"""ElasticCache: a transformers cache whose memory follows its tokens."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

import elastikv
from elastikv.errors import InvalidArgument
from elastikv.hf import attention
from elastikv.hf.batch import Batch
from elastikv.hf.geometry import KVGeometry, kv_geometry

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from elastikv.distributed import Ranks
    from elastikv.hf.decoder import Decoder
    from elastikv.hf.sampling import Sampling
    from elastikv.hf.slots import Slots


class ElasticLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's window onto the batch. Holds no tensor of its own, so nothing keeps memory alive behind our back."""

    is_compileable = False
    is_croppable = True  # all tokens are kept, also those that a sliding window has passed
    supports_early_init = False

    def __init__(self, cache: ElasticCache, index: int, window: int | None) -> None:
        # The base class would store keys, values and is_initialized as attributes: here they follow from the batch.
        self._cache = weakref.ref(cache)
        self.batch = cache._batch
        self.index = index
        self.sliding_window = window
        self.is_sliding = window is not None

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return self.batch.size > 0

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """All cached keys, ``[batch, head, token, dim]``: a view that lives as long as the memory. None if empty."""
        return self.batch.view(self.index, 0, self.batch.length)[0] if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """As keys."""
        return self.batch.view(self.index, 0, self.batch.length)[1] if self.is_initialized else None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the first update knows all that it takes."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the states; returns views of all that the layer's attention sees.

        Under attention 'elastikv' the states come back as they are: the attention function, next in line, stores them.
        """
        cache = self._cache()
        if cache is None:
            return self.write_and_view(key_states, value_states)
        return cache.update(key_states, value_states, self.index)

    def write_and_view(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores every token, and returns views ``[batch, head, token, dim]`` of those that the new ones may see."""
        start = self._first_visible()
        keys, values = self.batch.write(self.index, keys, values)
        return (keys, values) if start == 0 else (keys[:, :, start:], values[:, :, start:])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys that update will return, position of the first of them)."""
        start = self._first_visible()
        return self.batch.length + query_length - start, start

    def get_seq_length(self) -> int:
        return self.batch.length

    def get_max_length(self) -> int:
        return self.batch.max_tokens if self.sliding_window is None else self.sliding_window

    def get_max_cache_shape(self) -> int:
        """The name that transformers used to have for get_max_length."""
        return self.get_max_length()

    def _first_visible(self) -> int:
        """The oldest token that the next one may see: a window of n holds the token itself and n - 1 before it."""
        return 0 if self.sliding_window is None else max(self.batch.length - self.sliding_window + 1, 0)

    # One layer of all layers' pages can't go by itself, so what transformers calls on a layer acts on the whole batch
    # where it is idempotent, and is refused where it is not.

    def reset(self) -> None:
        self.batch.reset()

    def offload(self) -> None:
        """Nothing: layers share their pages, so memory goes and comes for the cache as a whole."""

    def prefetch(self) -> None:
        """As offload."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise InvalidArgument("the layers of an ElasticCache move together: call this on the cache")

    crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _refuse


class ElasticCache(Cache):
    """A KV cache for ``model.generate(..., past_key_values=cache)`` that grows and shrinks in a pool's memory.

    Layout: one elastic tensor ``[batch, token, layer, 2 (key, value), head, dim]`` on the model handle's device. A
    sequence is a row of ``max_tokens`` addresses; only the front that holds tokens has physical memory behind it. New
    tokens are written in place, and attention gets views of exactly the used length: nothing is copied as the cache
    grows, and addresses never change.

    Serves models with full and sliding-window attention; layers may differ in heads. In an encoder-decoder, two of them
    make an EncoderDecoderCache. A sliding layer returns what DynamicCache would, but keeps all tokens, so that crop
    always works. With ``model.set_attn_implementation("elastikv")`` there are no masks, and padding is not stored.

    Args:
        config: the model's config, or what it would say, for models whose configs say it in other words.
        model: a handle from ``SharedMemoryPool.register_model``. All memory is charged to it.
        max_batch: the most sequences. Memory and addresses are taken for the batch that comes, not for this many.
        max_tokens: the most tokens of one sequence, prompt and answer. Costs addresses, not memory.
        dtype: of the keys and values; by default that of the first ones.
        ranks: a `Ranks` of elastikv.distributed, for a tensor-parallel model, whose ranks each hold a cache of their
            share of the heads and make the same calls: their memory grows and shrinks together or not at all.

    Errors: InvalidArgument for what does not fit (batch, tokens, heads, device, dtype), OutOfPhysicalMemory when the
    pool is dry. Either way the cache stays as it was before the step, ready to try again: after an error of the model
    itself, in the middle of a step, call ``crop(0)`` first.

    Not thread-safe. The memory is given back by reset, close, or with the last reference.
    """

    def __init__(
        self,
        config: PreTrainedConfig | KVGeometry,
        *,
        model: elastikv.Model,
        max_batch: int = 1,
        max_tokens: int,
        dtype: torch.dtype | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        if max_batch < 1 or max_tokens < 1:
            raise InvalidArgument(f"max_batch={max_batch} and max_tokens={max_tokens} must be at least 1")
        geometry = config if isinstance(config, KVGeometry) else kv_geometry(config)
        self._config = None if isinstance(config, KVGeometry) else config.get_text_config(decoder=True)
        batch = Batch(geometry, model=model, max_batch=max_batch, max_tokens=max_tokens, dtype=dtype, ranks=ranks)
        self._serve(batch)

    def _serve(self, batch: Batch) -> None:
        self._batch = batch
        self._decoders: dict[Any, Decoder] = {}
        self._writes = False  # whether the attention function stores the running step
        windows = enumerate(batch.geometry.windows)
        super().__init__(layers=[ElasticLayer(self, index, window) for index, window in windows])

    def _attention_writes(self) -> bool:
        """Whether the model's attention function is ours, and takes what the cache holds as it is.

        Asked once a step, as configs take their time to answer.
        """
        implementation = getattr(self._config, "_attn_implementation", None)
        self._writes = implementation == attention.NAME and self._batch.geometry.plain
        return self._writes

    def __deepcopy__(self, memo: dict[int, Any]) -> ElasticCache:
        """A cache of its own with the same tokens, on the same model's memory: how a prefix is used again."""
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other._config = self._config
        other._serve(self._batch.copy())
        return other

    def __repr__(self) -> str:
        batch, size = self._batch, self.resident_bytes
        return f"ElasticCache(batch={batch.size}, tokens={batch.length}/{batch.max_tokens}, {size} bytes)"

    @property
    def slots(self) -> Slots:
        """The rows that hold the sequences, for engines."""
        return self._batch.slots

    def decoder(self, model: Any, *, sampling: Sampling | None = None, capacity: int | None = None) -> Decoder:
        """A decoder of the present batch for the model, or for the model compiled. Kept, with its graphs, by the cache.

        capacity: the most new tokens of a sequence; by default as many as max_tokens leaves room for.
        """
        from elastikv.hf.decoder import Decoder
        from elastikv.hf.sampling import Sampling

        batch, sampling = self._batch, sampling or Sampling()
        if batch.size == 0:
            raise InvalidArgument("the cache is empty: run the prompts first")
        wanted = capacity or max(1, batch.max_tokens + 1 - max(batch.slots.lengths[: batch.size]))
        key = (id(model), batch.size, sampling.kind)
        kept = self._decoders.get(key)
        if kept is None or kept.model is not model or kept.stale or kept.capacity < wanted:
            kept = Decoder(
                model, batch.slots, range(batch.size), sampling=sampling, capacity=1 << (wanted - 1).bit_length()
            )
            self._decoders[key] = kept
        return kept

    @property
    def resident_bytes(self) -> int:
        """Bytes of the cached tokens. The pool maps whole pages for them, and at most an eighth ahead."""
        return self._batch.resident_bytes

    @property
    def max_batch(self) -> int:
        return self._batch.max_batch

    @property
    def max_tokens(self) -> int:
        return self._batch.max_tokens

    @property
    def batch_size(self) -> int:
        """Sequences in the cache, -1 before the first update."""
        return self._batch.size or -1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx >= len(self.layers):
            raise InvalidArgument(f"the cache was made for {len(self.layers)} layers; there is no layer {layer_idx}")
        layer: Any = self.layers[layer_idx]
        if self._writes if layer_idx else self._attention_writes():
            attention.hand_over(layer, key_states)
            return key_states, value_states
        views: tuple[torch.Tensor, torch.Tensor] = layer.write_and_view(key_states, value_states)
        return views

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Nothing: layers share their pages, so memory goes and comes for the cache as a whole."""

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """As offload."""

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
            self._batch.require_whole_steps()
        self._batch.crop(max(self._batch.length + tokens_to_remove, 0))

    def reset(self) -> None:
        """Forgets everything and gives all memory back (views that are held keep it until they die)."""
        self._batch.reset()

    def close(self) -> None:
        """As reset, and for good. May be called twice."""
        self._decoders.clear()
        self._batch.close()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Sequence i becomes what ``beam_idx[i]`` was."""
        self._batch.rearrange(beam_idx, same_size=True)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the given sequences, in the given order: indices or a mask."""
        if self._batch.size:
            self._batch.rearrange(torch.arange(self._batch.size)[torch.as_tensor(indices).cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence, as long as max_batch permits."""
        self._batch.rearrange(torch.arange(self._batch.size).repeat_interleave(repeats))
