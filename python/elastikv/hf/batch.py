"""The sequences of one cache: the first rows of its slots, which take their steps together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import elastikv
from elastikv import _core
from elastikv.errors import InvalidArgument
from elastikv.hf.geometry import LayerShape, require_fit
from elastikv.hf.rearranging import Lineage, rearrange_each, rearrange_even
from elastikv.hf.slots import Slots
from elastikv.hf.step import DecodeStep, EvenStep, RaggedStep

if TYPE_CHECKING:
    from elastikv.distributed import Ranks
    from elastikv.hf.geometry import KVGeometry
    from elastikv.hf.step import Step
    from elastikv.hf.views import Extras


class Batch:
    """Rows 0 to ``size`` - 1 of the slots, all of which have seen ``length`` tokens.

    A step is one pass through all layers, in their order. Layer 0 makes room for it; it counts once the last layer has
    written. So a step that dies half-way, for want of memory or by an error of the model, leaves the length and all
    tokens before it as they were.

    Two ways of writing. `write` takes every token, padding too, as transformers' masks count them. `attend` is for the
    attention function 'elastikv': padding is not stored, so rows are as long as what they hold (``padding`` says how
    many of the tokens seen were none); from then on, only that function can go on with these rows.

    Where the geometry has no shapes, the states of the first step are kept until its last layer, and then laid out.

    Not thread-safe.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        *,
        model: elastikv.Model,
        max_batch: int,
        max_tokens: int,
        dtype: torch.dtype | None,
        ranks: Ranks | None = None,
    ) -> None:
        self.geometry = geometry
        self._last_layer = geometry.layers - 1
        self.length = 0  # tokens that every layer has seen
        self.size = 0  # rows, 0 before the first write
        self.padding: list[int] = []
        self._model = model
        self._dtype = dtype
        self._slots = Slots(geometry, model=model, rows=max_batch, max_tokens=max_tokens, ranks=ranks)
        self._next_layer = 0  # the layer that the running step waits for; 0: no step is running
        self._step_tokens = 0  # tokens that each layer of the running step brings
        self._rows = 0  # rows of the running step, or of the last one
        self._first: list[tuple[torch.Tensor, torch.Tensor]] = []  # states of a first step that tells the shapes
        self._step: Step | None = None
        self._lineage = Lineage()
        self._decode: tuple[int, DecodeStep] | None = None  # with the slots' generation
        self._closed = False

    @property
    def slots(self) -> Slots:
        return self._slots

    @property
    def max_batch(self) -> int:
        return self._slots.rows

    @property
    def max_tokens(self) -> int:
        return self._slots.max_tokens

    @property
    def ragged(self) -> bool:
        return any(self.padding)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the tokens that are held."""
        return sum(self._slots.lengths) * self._slots.token_bytes

    # ---- a step that stores every token

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes one layer's new tokens, ``[batch, head, token, dim]`` each, behind the old; returns views of all."""
        tells_shapes = self.size == 0 and self.geometry.shapes is None
        if layer == 0 or tells_shapes or not self._goes_on(layer, keys):
            self._check(layer, keys, values)
        if layer == 0:
            self._require_even_rows()
            if tells_shapes:
                self._first = []
            else:
                self._prepare(keys)
                self._slots.reserve(range(len(keys)), [keys.shape[2]] * len(keys))
            self._step_tokens, self._rows = keys.shape[2], len(keys)
        end = self.length + keys.shape[2]
        if tells_shapes:
            self._first.append((keys, values))
            if layer == self._last_layer:
                self._lay_out_first()
                keys, values = self.view(layer, 0, end)
        else:
            keys, values = self._put(layer, keys, values, self.length)
        self._wrote(layer, self._rows, end)
        return keys, values

    def view(self, layer: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of tokens [start, end) as views ``[batch, head, token, dim]`` of the slots; no copy."""
        self._require_even_rows()
        if self._slots.tensor is None:
            keys, values = self._first[layer]
            return keys[:, :, start:end], values[:, :, start:end]
        return self._slots.batch_view(layer, 0, self._rows, start, end)

    def _put(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, before: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Checks what it stores, but for the order."""
        slots = self._slots
        try:
            return _core.store_rows(
                slots.keys[layer], slots.values[layer], keys, values, self._rows, slots.pitch, before
            )
        except InvalidArgument:
            self._check(layer, keys, values)  # says it in the words of a cache
            raise

    def _lay_out_first(self) -> None:
        states, self._first = self._first, []
        try:
            keys = states[0][0]
            self._slots.allocate([LayerShape.of(*pair) for pair in states], keys.dtype)
            self._slots.reserve(range(len(keys)), [keys.shape[2]] * len(keys))
            for layer, pair in enumerate(states):
                self._put(layer, *pair, 0)
        except BaseException:
            self._slots.drop()
            self._next_layer = 0
            raise

    # ---- a step of the attention function 'elastikv'

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        padding: torch.Tensor | None,
        scaling: float | None,
        window: int | None,
        extras: Extras | None,
    ) -> torch.Tensor:
        """Stores one layer's new tokens but for the padding, and attends, as Step has it.

        padding: ``[batch, tokens]``, false where a token is none; read with layer 0.
        """
        step = self._step
        if layer == 0 or type(step) is not EvenStep or not self._goes_on(layer, keys):
            self._check(layer, keys, values)
        if layer == 0:
            self._step = step = self._begin(keys, padding)
            self._step_tokens, self._rows = keys.shape[2], len(keys)
        assert step is not None
        output = step.compute(layer, query, keys, values, scaling, window, extras)
        if layer == self._last_layer:
            step.commit()
            if isinstance(step, RaggedStep):
                lost = [step.width - count for count in step.counts]
                self.padding = [before + more for before, more in zip(self.padding or [0] * len(lost), lost)]
            self._step = None
        self._wrote(layer, self._rows, self.length + self._step_tokens, committed=True)
        return output

    def _begin(self, keys: torch.Tensor, padding: torch.Tensor | None) -> Step:
        self._prepare(keys)
        rows, tokens = list(range(len(keys))), keys.shape[2]
        if self.length + tokens > self.max_tokens + min(self.padding, default=0):
            raise InvalidArgument(f"{self.length} + {tokens} tokens do not fit a cache of max_tokens={self.max_tokens}")
        if tokens == 1 and self.length > 0 and not self.ragged:
            return EvenStep(self._slots, len(rows))
        if tokens == 1 and self.length > 0:
            self._slots.reserve(rows, [1] * len(rows))
            step = self._decode[1] if self._decode else None
            if step is None or self._decode != (self._slots.generation, step) or step.rows != rows:
                step = DecodeStep(self._slots, rows, max_key=1)
                self._decode = (self._slots.generation, step)
            step.max_key = max(self._slots.lengths[: len(rows)]) + 1
            step.begin()
            return step
        real = None
        if padding is not None:
            real = padding[:, -tokens:].to(device="cpu", dtype=torch.bool)
            if real.shape != (len(rows), tokens):
                raise InvalidArgument(
                    f"an attention mask {list(padding.shape)} for {len(rows)} rows of {tokens} tokens"
                )
        return RaggedStep(self._slots, rows, [tokens] * len(rows), real=real)

    # ---- between steps

    def crop(self, length: int) -> None:
        """Forgets all tokens from ``length`` on, and an unfinished step; gives back the memory behind."""
        if length == 0:
            self.reset()
            return
        self._abandon_step()
        self.length = length
        self._lineage.cropped(length)
        self.padding = [min(lost, length) for lost in self.padding]
        rows = range(self.size)
        self._slots.crop(rows, [length - (self.padding[row] if self.padding else 0) for row in rows])

    def reset(self) -> None:
        """Forgets everything. Views that are still held stay readable."""
        self._abandon_step()
        self.length = self.size = 0
        self.padding = []
        self._lineage.cropped(0)
        self._slots.reset()

    def close(self) -> None:
        self.reset()
        self._slots.drop()
        self._decode = None
        self._closed = True

    def rearrange(self, sources: torch.Tensor, *, same_size: bool = False) -> None:
        """Row i becomes what row ``sources[i]`` was, in place."""
        self.require_whole_steps()
        if self.size == 0:
            return
        count = len(sources)
        if same_size and count != self.size:
            raise InvalidArgument(f"reorder_cache got {count} rows for a batch of {self.size}")
        if count > self.max_batch:
            raise InvalidArgument(f"a batch of {count} does not fit a cache of max_batch={self.max_batch}")
        if count == 0:
            self.reset()
            return
        origins = sources.tolist()
        if not self.ragged and count == self.size:
            rearrange_even(self._slots, origins, self.length, self._lineage)
            return
        rearrange_each(self._slots, origins, self.size)
        self._lineage.rearranged(origins, self._slots.lengths[:count])
        if self.padding:
            self.padding = [self.padding[source] for source in origins]
        self.size = self._rows = count

    def copy(self) -> Batch:
        """A batch of its own with the same tokens, charged to the same model."""
        self.require_whole_steps()
        other = Batch(
            self.geometry, model=self._model, max_batch=self.max_batch, max_tokens=self.max_tokens, dtype=self._dtype,
            ranks=self._slots.ranks,
        )  # fmt: skip
        if self.size:
            slots, rows = other._slots, range(self.size)
            lengths = self._slots.lengths[: self.size]
            assert self._slots.dtype is not None
            slots.allocate(self._slots.shapes, self._slots.dtype)
            slots.reserve(rows, lengths)
            for layer in range(self.geometry.layers):
                for row in rows:
                    pairs = zip(slots.view(layer, row, 0, lengths[row]), self._slots.view(layer, row, 0, lengths[row]))
                    for target, source in pairs:
                        target.copy_(source)
            slots.set_lengths(rows, lengths)
            other.size = other._rows = self.size
            other.length, other.padding = self.length, list(self.padding)
        other._closed = self._closed
        return other

    def start_rows(self, size: int, dtype: torch.dtype) -> None:
        """Before steps of others write to the slots' first rows: checks the number, and reserves addresses."""
        self.require_whole_steps()
        if self._closed:
            raise InvalidArgument("this ElasticCache was closed")
        if size > self.max_batch:
            raise InvalidArgument(f"a batch of {size} does not fit a cache of max_batch={self.max_batch}")
        if self.size not in (0, size):
            raise InvalidArgument(f"the cache holds a batch of {self.size}, not of {size}")
        if not self.geometry.plain or self.geometry.shapes is None:
            raise InvalidArgument(
                "this model's attention does not compute with what its cache holds: use model.generate"
            )
        if self._slots.tensor is None or (self.size == 0 and self._slots.dtype != dtype):
            self._slots.allocate(self.geometry.shapes, dtype)

    def adopt_rows(self, size: int, length: int) -> None:
        """Steps of others have written to the first rows: they have seen so many tokens, padding among them."""
        lengths = self._slots.lengths[:size]
        self.size = self._rows = size if max(lengths, default=0) else 0
        self.length = max(length, max(lengths, default=0)) if self.size else 0
        self.padding = [self.length - held for held in lengths] if self.size else []

    def require_whole_steps(self) -> None:
        if self._next_layer != 0:
            raise InvalidArgument(
                f"the last step wrote {self._next_layer} of the cache's {self.geometry.layers} layers: the model "
                "failed half-way, or has fewer layers than the cache. crop(0) forgets that step, reset() everything"
            )

    # ---- inside

    def _prepare(self, keys: torch.Tensor) -> None:
        """Addresses for the first states."""
        if self._slots.tensor is None or (self.size == 0 and self._slots.dtype != keys.dtype):
            assert self.geometry.shapes is not None
            self._slots.allocate(self.geometry.shapes, keys.dtype)

    def _wrote(self, layer: int, rows: int, end: int, *, committed: bool = False) -> None:
        self._next_layer = layer + 1
        if layer == self._last_layer:
            self._next_layer = 0
            self.length, self.size = end, rows
            if not committed:
                self._slots.set_lengths(range(rows), [end] * rows)

    def _abandon_step(self) -> None:
        self._next_layer = 0
        self._step = None
        self._first = []

    def _require_even_rows(self) -> None:
        if self.ragged:
            raise InvalidArgument(
                "these rows were written without their padding, by attention 'elastikv', which alone can go on with "
                "them: set_attn_implementation('elastikv'), or reset() the cache"
            )

    def _goes_on(self, layer: int, keys: torch.Tensor) -> bool:
        """Whether these are the running step's next states, as far as order and number go."""
        return layer == self._next_layer and keys.ndim == 4 and keys.shape[2] == self._step_tokens

    def _check(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Refuses what does not fit, before anything has changed."""
        if self._closed:
            raise InvalidArgument("this ElasticCache was closed")
        slots, holds = self._slots, self.size > 0
        require_fit(
            layer, keys, values, shapes=slots.shapes if holds else self.geometry.shapes,
            dtype=slots.dtype if holds else self._dtype, device=slots.device,
        )  # fmt: skip
        if layer == 0:
            self.require_whole_steps()
        elif layer != self._next_layer:
            raise InvalidArgument(f"layers write in order: layer {layer} came where {self._next_layer} was due")
        elif keys.shape[2] != self._step_tokens:
            raise InvalidArgument(f"layer 0 brought {self._step_tokens} tokens, layer {layer} {keys.shape[2]}")
        if self.size and len(keys) != self.size:
            raise InvalidArgument(f"the cache holds a batch of {self.size}, but layer {layer} brought {len(keys)}")
        if len(keys) > self.max_batch:
            raise InvalidArgument(f"a batch of {len(keys)} does not fit a cache of max_batch={self.max_batch}")
        if self.length + keys.shape[2] > self.max_tokens + min(self.padding, default=0):
            raise InvalidArgument(
                f"{self.length} + {keys.shape[2]} tokens do not fit a cache of max_tokens={self.max_tokens}"
            )
