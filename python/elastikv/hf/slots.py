"""The memory of a cache: one elastic tensor for all layers of a batch of sequences."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

import elastikv
from elastikv.errors import InvalidArgument

if TYPE_CHECKING:
    from elastikv.hf.geometry import KVGeometry


class Slots:
    """Keys and values as one elastic tensor ``[batch, token, layer, 2, head, dim]`` that grows along token.

    A slot is the row of one sequence: ``max_tokens`` addresses, of which only the front that is in use has memory.
    One token's layers lie side by side, so a page serves all layers of its tokens. The tensor comes to be at the
    first write, with as many rows as that write has sequences, and belongs to this object.

    A step is one pass through all layers, in their order. Layer 0 makes room for it; it counts (``length``) once the
    last layer has written. So a step that dies half-way, for want of memory or by an error of the model, leaves the
    length and all tokens before it as they were.

    Not thread-safe.
    """

    def __init__(
        self, geometry: KVGeometry, *, model: elastikv.Model, max_batch: int, max_tokens: int, dtype: torch.dtype | None
    ) -> None:
        self.geometry = geometry
        self.max_batch = max_batch
        self.max_tokens = max_tokens
        self.length = 0  # tokens that every layer holds
        self.kv: torch.Tensor | None = None
        self._model = model
        self._device = torch.device(model.device)
        self._dtype = dtype
        self._next_layer = 0  # the layer that the running step waits for; 0: no step is running
        self._step_tokens = 0  # tokens that each layer of the running step brings
        self._closed = False

    # ---- a step

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> int:
        """Writes one layer's new tokens, ``[batch, head, token, dim]`` each, behind the old; returns the new length."""
        self._check(layer, keys, values)
        end = self.length + keys.shape[2]
        if layer == 0:
            self._reserve(keys.shape[0], end, keys.dtype)
            self._step_tokens = keys.shape[2]
        assert self.kv is not None
        room = self.kv[:, self.length : end, layer]
        room[:, :, 0].copy_(keys.transpose(1, 2))
        room[:, :, 1].copy_(values.transpose(1, 2))
        self._next_layer = (layer + 1) % self.geometry.layers
        if self._next_layer == 0:
            self.length = end
        return end

    def view(self, layer: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of tokens [start, end) as views ``[batch, head, token, dim]`` of the slots; no copy."""
        assert self.kv is not None
        tokens = self.kv[:, start:end, layer]
        return tokens[:, :, 0].transpose(1, 2), tokens[:, :, 1].transpose(1, 2)

    # ---- between steps

    def crop(self, length: int) -> None:
        """Forgets all tokens from ``length`` on, and an unfinished step; gives back the memory behind."""
        if length == 0:
            self.reset()
            return
        self.length = length
        self._next_layer = 0
        if self.kv is not None and self.kv.shape[1] > length:
            # Refused while somebody holds a view of the end: its memory then stays until the next crop or reset.
            with contextlib.suppress(InvalidArgument):
                elastikv.shrink_(self.kv, length)

    def reset(self) -> None:
        """Forgets everything. The tensor is let go, not shrunk: views that are still held stay readable."""
        self.kv = None
        self.length = 0
        self._next_layer = 0

    def close(self) -> None:
        self.reset()
        self._closed = True

    def reorder(self, rows: torch.Tensor) -> None:
        """Row i becomes what row ``rows[i]`` was, in place. One layer is copied aside at a time."""
        self.require_whole_steps()
        if self.kv is None:
            return
        if len(rows) != self.batch:
            raise InvalidArgument(f"reorder_cache got {len(rows)} rows for a batch of {self.batch}")
        rows = rows.to(self._device)
        for layer in range(self.geometry.layers):
            used = self.kv[:, : self.length, layer]
            used.copy_(used.index_select(0, rows))

    def select(self, rows: torch.Tensor) -> None:
        """Replaces the batch by copies of the given rows. Needs the memory of both batches for a moment."""
        self.require_whole_steps()
        if self.kv is None:
            return
        if len(rows) == 0:
            self.reset()
            return
        fresh = self._allocate(len(rows), self.length, self.kv.dtype)
        for target, source in enumerate(rows.tolist()):
            fresh[target].copy_(self.kv[source, : self.length])
        self.kv = fresh

    def copy(self) -> Slots:
        """Slots of their own with the same tokens, charged to the same model."""
        self.require_whole_steps()
        other = Slots(
            self.geometry, model=self._model, max_batch=self.max_batch, max_tokens=self.max_tokens, dtype=self._dtype
        )
        if self.kv is not None:
            other.kv = self._allocate(self.batch, self.length, self.kv.dtype)
            other.kv.copy_(self.kv[:, : self.length])
            other.length = self.length
        other._closed = self._closed
        return other

    def require_whole_steps(self) -> None:
        if self._next_layer != 0:
            raise InvalidArgument(
                f"the last step wrote {self._next_layer} of the cache's {self.geometry.layers} layers: the model "
                "failed half-way, or has fewer layers than the cache. crop(0) forgets that step, reset() everything"
            )

    @property
    def batch(self) -> int:
        """Rows of the batch, 0 before the first write."""
        return 0 if self.kv is None else self.kv.shape[0]

    # ---- inside

    def _reserve(self, batch: int, end: int, dtype: torch.dtype) -> None:
        """Makes memory for tokens [0, end). All or nothing: OutOfPhysicalMemory leaves everything as it was."""
        if self.kv is None:
            self.kv = self._allocate(batch, end, dtype)
        elif end > self.kv.shape[1]:
            elastikv.grow_(self.kv, end)

    def _allocate(self, batch: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        if batch > self.max_batch:
            raise InvalidArgument(f"a batch of {batch} does not fit a cache of max_batch={self.max_batch}")
        one_token = (self.geometry.layers, 2, self.geometry.heads, self.geometry.head_dim)
        # Not an inference tensor, so that both worlds may write to it. No scrubbing: what we hand out, we wrote before.
        with torch.inference_mode(False):
            return elastikv.empty(
                (batch, tokens, *one_token),
                max_shape=(batch, self.max_tokens, *one_token),
                dtype=dtype,
                model=self._model,
                dim=1,
                scrub=False,
            )

    def _check(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Refuses what does not fit, before anything has changed."""
        geometry = self.geometry
        if self._closed:
            raise InvalidArgument("this ElasticCache was closed")
        if keys.ndim != 4 or keys.shape != values.shape or keys.shape[1::2] != (geometry.heads, geometry.head_dim):
            raise InvalidArgument(
                f"the cache was made for keys and values [batch, {geometry.heads}, tokens, {geometry.head_dim}]; "
                f"layer {layer} brought keys {list(keys.shape)} and values {list(values.shape)}"
            )
        if keys.device != self._device or values.device != self._device:
            raise InvalidArgument(f"the cache's pool is on {self._device}, but layer {layer} brought {keys.device}")
        dtype = self._dtype if self.kv is None else self.kv.dtype
        if values.dtype != keys.dtype or keys.dtype != (dtype or keys.dtype):
            raise InvalidArgument(f"the cache holds {dtype}, but layer {layer} brought {keys.dtype}, {values.dtype}")
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            raise InvalidArgument("ElasticCache is written in place: run the model under torch.inference_mode()")
        if layer == 0:
            self.require_whole_steps()
        elif layer != self._next_layer:
            raise InvalidArgument(f"layers write in order: layer {layer} came where {self._next_layer} was due")
        elif keys.shape[2] != self._step_tokens:
            raise InvalidArgument(f"layer 0 brought {self._step_tokens} tokens, layer {layer} {keys.shape[2]}")
        if self.kv is not None and keys.shape[0] != self.batch:
            raise InvalidArgument(f"the cache holds a batch of {self.batch}, but layer {layer} brought {keys.shape[0]}")
        if self.length + keys.shape[2] > self.max_tokens:
            raise InvalidArgument(
                f"{self.length} + {keys.shape[2]} tokens do not fit a cache of max_tokens={self.max_tokens}"
            )
