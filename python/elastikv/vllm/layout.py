"""How vLLM's KV tensors lie in elastic blocks: all layers of a block side by side, so that one extent serves them.

vLLM makes its views for itself, over tensors without memory (device `meta`); each is then made again over the blocks,
with the same shape and other strides. So whatever a backend wants of its tensors stays vLLM's affair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

MARK = 1_000_003  # blocks of a stand-in: a prime, so that the dimension of blocks is known by its size
ALIGNMENT = 256  # bytes; what kernels and TMA descriptors may ask of a layer's start


class LayoutNotPossible(ValueError):
    """A view whose blocks can't be taken apart; the message says why."""


class RawTensor(Protocol):
    """vLLM's KVCacheTensor, as far as it matters here."""

    size: int
    shared_by: list[str]


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


def stand_ins(blocks: BlockParts) -> dict[str, torch.Tensor]:
    """What vLLM makes its views over: int8 on device `meta`, MARK blocks for each layer."""
    made = {part: torch.empty(MARK * part.size, dtype=torch.int8, device="meta") for part in blocks.parts.values()}
    return {layer: made[part] for layer, part in blocks.parts.items()}


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
