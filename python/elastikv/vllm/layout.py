"""How vLLM's KV tensors lie in elastic blocks, all layers of a block on the same extent, so that one serves them.

There are two ways. `SideBySide` has all layers of a block next to each other: extents can be as small as a page.
`LayerByLayer` has the blocks of an extent in chunks, one a layer, so that a kernel sees in its layer what it would
see in plain vLLM: blocks as far apart as they are long, and a chunk's worth of them on the same pages. Ids then count
chunks of all layers, and most of them name nothing in a given layer; block tables hold 32 bits, so there are enough.

vLLM makes its views for itself, over tensors without memory (device `meta`); each is then made again over the blocks,
with the same shape and other strides. So whatever a backend wants of its tensors stays vLLM's affair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

MARK = 1_000_003  # blocks of a stand-in: a prime, so that the dimension of blocks is known by its size
ALIGNMENT = 256  # bytes; what kernels and TMA descriptors may ask of a layer's start
CHUNK = 2 << 20  # bytes of a layer that lie together: a page of the device
LARGEST_EXTENT = 32 << 20  # an idle engine holds one, beside what is parked


class LayoutNotPossible(ValueError):
    """A view whose blocks can't be taken apart; the message says why."""


class RawTensor(Protocol):
    """vLLM's KVCacheTensor, as far as it matters here."""

    size: int
    shared_by: list[str]


class PlacedLayers(Protocol):
    """The same from vLLM 0.29 on: layers of one allocation, whose bytes of a block begin at
    ``offset + layer * layer_stride + block * block_stride``."""

    layers: list[str]
    layer_stride: int
    block_stride: int
    offset: int


@dataclass(frozen=True)
class Part:
    """The place of some layers in a block, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True)
class BlockParts:
    """One block of all layers."""

    size: int
    parts: Mapping[str, Part]  # by layer; layers that share a tensor share a part


def parts_of(num_blocks: int, tensors: Sequence[RawTensor]) -> BlockParts:
    """The parts of a block, for tensors that vLLM would have made one after the other.

    Raises LayoutNotPossible where a tensor is not as many equal blocks.
    """
    parts: dict[str, Part] = {}
    end = 0
    packed = {int(getattr(tensor, "block_stride", 0) or 0) for tensor in tensors}
    for tensor in tensors:
        size, rest = divmod(tensor.size, num_blocks)
        if rest:
            raise LayoutNotPossible(f"a KV tensor of {tensor.size} bytes is not {num_blocks} blocks of one size")
        if packed != {0}:  # vLLM lays the layers side by side itself, and its views start where each begins
            if packed != {size}:
                raise LayoutNotPossible("some KV tensors are packed, and some are not")
            part, end = Part(0, size), size
        else:
            part = Part(end, size)
            end += -(-size // ALIGNMENT) * ALIGNMENT
        parts.update(dict.fromkeys(tensor.shared_by, part))
    return BlockParts(end, parts)


def parts_of_placed(num_blocks: int, placed: Sequence[PlacedLayers], page_of: Callable[[str], int]) -> BlockParts:
    """The same for layers of one allocation. page_of: a layer's bytes of a block.

    Raises LayoutNotPossible where a layer's blocks do not begin as far into each of them.
    """
    parts: dict[str, Part] = {}
    end = 0
    for each in placed:
        for number, layer in enumerate(each.layers):
            page, begin = page_of(layer), each.offset + number * each.layer_stride
            if each.block_stride == page:  # the layer's blocks lie one after the other, behind those of others
                begin, rest = divmod(begin, num_blocks)
                if rest:
                    raise LayoutNotPossible(f"the blocks of '{layer}' don't lie behind {num_blocks} of other layers")
            elif begin + page > each.block_stride:
                raise LayoutNotPossible(f"'{layer}' has {page} bytes of a block from {begin} of {each.block_stride} on")
            if begin % ALIGNMENT:
                raise LayoutNotPossible(f"'{layer}' begins {begin} bytes into a block, not a multiple of {ALIGNMENT}")
            parts[layer] = Part(begin, page)
            end = max(end, begin + page)
    return BlockParts(-(-end // ALIGNMENT) * ALIGNMENT, parts)


class SideBySide:
    """Blocks of all layers, one after the other. Ids in block tables are the elastic pool's own."""

    def __init__(self, layout: BlockParts, raw: torch.Tensor) -> None:
        """raw: int8 [num_blocks, bytes of all layers], with its stride."""
        self._layout, self._raw = layout, raw

    def blocks_of(self, layer: str) -> tuple[torch.Tensor, Part]:
        """int8 [ids, bytes], and what of a block is the layer's."""
        return self._raw, self._layout.parts[layer]

    def table_id(self, block: int) -> int:
        """What block tables hold for the elastic pool's block."""
        return block

    def block_of(self, table_id: int) -> int:
        return table_id

    def blocks_under(self, last: int) -> int:
        """How many of the first blocks must be held, so that ids up to `last` have memory in all layers."""
        return last + 1

    def zero(self, table_ids: torch.Tensor) -> None:
        self._raw.index_fill_(0, table_ids, 0)

    def copy(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """All layers of blocks, by table ids; all sources are read before a target is written."""
        for part in set(self._layout.parts.values()):  # one by one, as all layers of many blocks are gigabytes
            layer = self._raw[:, part.offset : part.offset + part.size]
            layer.index_copy_(0, targets, layer.index_select(0, sources))


class LayerByLayer:
    """Extents of as many chunks as there are parts, each with the blocks of its layers one after the other."""

    @staticmethod
    def extent_bytes(layout: BlockParts) -> int:
        """For chunks of CHUNK bytes, or smaller ones where that makes extents too large to lie idle."""
        part = min(part.size for part in layout.parts.values())
        blocks = max(1, CHUNK // part)
        while blocks > 1 and blocks * layout.size > LARGEST_EXTENT:
            blocks //= 2
        return blocks * layout.size

    def __init__(self, layout: BlockParts, raw: torch.Tensor, blocks_per_extent: int) -> None:
        """raw: as of SideBySide, on storage of whole extents. Raises LayoutNotPossible."""
        parts = sorted(set(layout.parts.values()), key=lambda part: part.offset)
        size = parts[0].size
        if any(part.size != size for part in parts) or len(parts) * size != layout.size:
            raise LayoutNotPossible("layers can lie one by one only where all have the same bytes of a block")
        if raw.stride(0) != layout.size:
            raise LayoutNotPossible(f"blocks of {layout.size} bytes have gaps: they are {raw.stride(0)} bytes apart")
        self._parts = {layer: parts.index(part) for layer, part in layout.parts.items()}
        self._size, self._count, self._per = size, len(parts), blocks_per_extent
        storage = raw.untyped_storage()
        self._ids = storage.nbytes() // size - (self._count - 1) * self._per
        self._blocks, self._chunk = raw.shape[0], self._per * size
        if self._ids >= 2**31:
            raise LayoutNotPossible(f"{self._ids} ids do not fit the 32 bits of block tables")
        self._memory = torch.empty(0, dtype=torch.int8, device=raw.device).set_(storage, 0, (storage.nbytes(),), (1,))

    def blocks_of(self, layer: str) -> tuple[torch.Tensor, Part]:
        begin = self._parts[layer] * self._chunk
        return self._memory.as_strided((self._ids, self._size), (self._size, 1), begin), Part(0, self._size)

    def table_id(self, block: int) -> int:
        extent, at = divmod(block, self._per)
        return extent * self._per * self._count + at

    def block_of(self, table_id: int) -> int:
        extent, at = divmod(table_id, self._per * self._count)
        return extent * self._per + at

    def blocks_under(self, last: int) -> int:
        """These ids are vLLM's own choice, and fall into all layers' chunks."""
        end = (self._count - 1) * self._chunk + (last + 1) * self._size
        return min(self._blocks, -(-end // (self._count * self._chunk)) * self._per)

    def zero(self, table_ids: torch.Tensor) -> None:
        self._by_id().index_fill_(0, table_ids, 0)

    def copy(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        for layer in self._by_id().unbind(1):
            layer.index_copy_(0, targets, layer.index_select(0, sources))

    def _by_id(self) -> torch.Tensor:
        """int8 [ids, layers, bytes]; ids of held blocks have memory in all layers."""
        return self._memory.as_strided((self._ids, self._count, self._size), (self._size, self._chunk, 1))


def stand_ins(blocks: BlockParts) -> dict[str, torch.Tensor]:
    """What vLLM makes its views over: int8 on device `meta`, MARK blocks for each layer."""
    made = {part: torch.empty(MARK * part.size, dtype=torch.int8, device="meta") for part in blocks.parts.values()}
    return {layer: made[part] for layer, part in blocks.parts.items()}


def specs_of(config: Any) -> dict[str, Any]:
    """vLLM's specs by layer. Raises LayoutNotPossible where a cache is more than blocks of the same bytes."""
    specs: dict[str, Any] = {}
    for group in config.kv_cache_groups:
        each = getattr(group.kv_cache_spec, "kv_cache_specs", None)  # of layers that differ
        specs.update(each or dict.fromkeys(group.layer_names, group.kv_cache_spec))
    for layer, spec in specs.items():
        if not getattr(spec, "has_layer_views", True):
            raise LayoutNotPossible(f"'{layer}' has no tensor of its own")
        if getattr(getattr(spec, "kv_quant_mode", None), "is_per_token_head", False):
            raise LayoutNotPossible(
                f"'{layer}' has scales for each token and head, which are set for all blocks at once"
            )
    if any(getattr(tensor, "host_resident", False) for tensor in config.kv_cache_tensors):
        raise LayoutNotPossible("some KV tensors lie in host memory")
    return specs


def require_stride(layer: str, view: torch.Tensor, spec: Any) -> None:
    """Raises LayoutNotPossible where blocks lie further apart than the layer's kernels can be told."""
    ask = getattr(spec, "get_block_stride_alignment", None)
    alignment = int((ask() if ask else getattr(spec, "block_stride_alignment", None)) or 1)
    if "MLA" in type(spec).__name__:  # some kernels see rows of tokens, with all layers' between two blocks
        alignment = math.lcm(alignment, int(spec.page_size_bytes) // int(spec.block_size))
    apart = view.stride(0) * view.element_size()
    if apart % alignment:
        raise LayoutNotPossible(f"the blocks of '{layer}' lie {apart} bytes apart, not a multiple of {alignment}")


def stand_in_config(config: Any, pages: Mapping[str, int]) -> Any:
    """The config for stand-ins: each layer has MARK blocks, from the beginning of the allocation on."""
    size = MARK * max(pages.values())
    tensors = [
        replace(tensor, size=size, layers=[layer], layer_stride=size, block_stride=pages[layer], offset=0)
        for tensor in config.kv_cache_tensors
        for layer in tensor.layers
    ]
    return replace(config, num_blocks=MARK, kv_cache_tensors=tensors)


def place(view: torch.Tensor, part: Part, blocks: torch.Tensor) -> torch.Tensor:
    """vLLM's view of a stand-in, for the true number of blocks and over their memory.

    blocks: int8 [num_blocks, bytes of all layers], with its stride. A kernel may cut blocks into several, which
    then lie apart. Raises LayoutNotPossible.
    """
    item, sizes, strides = view.element_size(), list(view.shape), list(view.stride())
    dims = [dim for dim, size in enumerate(sizes) if size and size % MARK == 0]
    if len(dims) != 1:
        raise LayoutNotPossible(f"a view of shape {tuple(sizes)} has no dimension of blocks")
    dim = dims[0]
    cut, stride = sizes[dim] // MARK, blocks.stride(0)
    if stride % (cut * item) or part.offset % (cut * item) or blocks.storage_offset() % item:
        raise LayoutNotPossible(f"blocks {stride} bytes apart can't be cut into {cut}, of items of {item} bytes")
    sizes[dim] = blocks.shape[0] * cut
    _fold_outer(sizes, strides, dim)
    begin = view.storage_offset() * item
    inner = sum((size - 1) * step for at, (size, step) in enumerate(zip(sizes, strides)) if at != dim)
    if begin + (inner + 1) * item > part.size // cut:
        raise LayoutNotPossible(f"a view of shape {tuple(sizes)} reaches beyond its part of {part.size} bytes")
    strides[dim] = stride // cut // item
    offset = (blocks.storage_offset() + part.offset // cut + begin) // item
    return torch.empty(0, dtype=view.dtype, device=blocks.device).set_(blocks.untyped_storage(), offset, sizes, strides)


def _fold_outer(sizes: list[int], strides: list[int], block_dim: int) -> None:
    """Dimensions outside of the blocks, such as K and V, move into the block, outside of what is in it."""
    outer = [dim for dim in range(len(sizes)) if dim != block_dim and strides[dim] > strides[block_dim]]
    step = strides[block_dim]
    for dim in sorted(outer, key=lambda dim: strides[dim]):
        strides[dim] = step
        step *= sizes[dim]
