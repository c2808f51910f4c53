"""Attention over slots as a registered operator, so that a compiled model calls it without a graph break."""

from __future__ import annotations

import torch

from elastikv.hf.step import step_of


# The lengths and the memory would be the honest arguments, but the memory reaches over addresses that have none, and
# compilers copy and fake what they are given. So the step travels by its handle. What the operator writes, the slots,
# no compiled code can see; its place among the other operators follows from its inputs and its output.
@torch.library.custom_op("elastikv::attend", mutates_args=())
def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    step: int,
    layer: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """`Step.attend` of the living step with that handle: ``[row, query, head, value dim]``."""
    output = step_of(step).attend(layer, query, key, value, scaling, window)
    return output.contiguous()


@attend.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    step: int,
    layer: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
