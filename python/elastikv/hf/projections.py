"""Projections of one input as one: several small matrices are read slower than one of their size."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch.nn.functional import linear

#: What an attention projects its input with, and what a gated MLP does.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class JoinedProjections:
    """A model's projections of one input read their weights in one go, from now until `undo`, or within it.

    These are an attention's query, key and value, and a gated MLP's gate and up.

    The weights come to lie side by side, each still the parameter that it was, a view now: the model holds no more
    memory than before, but for one layer's share while that one is moved. Values are the same to its roundings.
    What is not made of plain Linear layers of one input, or is quantized, hooked or offloaded, stays as it is.
    What is cast, moved or replaced later runs by itself from then on, but a compiled model does not look: join first,
    compile then, and neither before the weights are where they stay. `len` says how many such sets take part. For
    inference only; to be made before a graph is captured, and not to be undone beneath one. Not thread-safe: the model
    is one's own meanwhile.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._groups: list[_Group] = []
        try:
            for linears in _joinable(model):
                self._groups.append(_Group(linears))
        except BaseException:
            self.undo()
            raise

    def __len__(self) -> int:
        return len(self._groups)

    def undo(self) -> None:
        """Each projection runs by itself again. The weights stay where they are. May be called twice."""
        for group in self._groups:
            group.leave()
        self._groups = []

    def __enter__(self) -> JoinedProjections:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


class _Group:
    """Projections of one input. The first that is called computes for all; each takes its part once."""

    def __init__(self, linears: list[torch.nn.Linear]) -> None:
        self._linears = linears
        self._states: torch.Tensor | None = None
        self._output: torch.Tensor | None = None
        self._taken = 0
        # A parameter takes no data of the other kind: of inference mode, where it was made without, or the reverse.
        with torch.inference_mode(linears[0].weight.is_inference()), torch.no_grad():
            self._weight = torch.cat([each.weight for each in linears])
            self._bias = None if linears[0].bias is None else torch.cat([each.bias for each in linears])
            try:
                self._join()
            except BaseException:
                self.leave()
                raise

    def _join(self) -> None:
        begin = 0
        for each in self._linears:
            end = begin + each.out_features
            each.weight.data = self._weight[begin:end]
            if self._bias is not None:
                each.bias.data = self._bias[begin:end]
            part: Any = each
            part.__class__ = _Part
            part.joined, part.columns = self, slice(begin, end)
            part.places = _places_of(part)
            begin = end

    def part(self, states: torch.Tensor, columns: slice) -> torch.Tensor | None:
        """None where the projections turn out to have different inputs, or one was left out: they are apart then."""
        if self._output is None:
            self._states, self._output, self._taken = states, linear(states, self._weight, self._bias), 0
        elif self._states is not states:
            self.leave()
            return None
        output = self._output[..., columns]
        self._taken += 1
        if self._taken == len(self._linears):
            self._states = self._output = None
        return output

    def leave(self) -> None:
        self._states = self._output = None
        for each in self._linears:
            part: Any = each
            if type(each) is _Part:
                del part.joined, part.columns, part.places
                part.__class__ = torch.nn.Linear


class _Part(torch.nn.Linear):
    joined: _Group
    columns: slice
    places: tuple[int, ...]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        # Weights that were moved, cast or replaced since are no longer those of the one matrix.
        if torch.compiler.is_compiling() or _places_of(self) == self.places:
            output = self.joined.part(states, self.columns)
            if output is not None:
                return output
        return linear(states, self.weight, self.bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.nn.Linear:
        """By itself, as the copy's weights are its own."""
        plain = torch.nn.Linear.__new__(torch.nn.Linear)
        memo[id(self)] = plain
        own = ("joined", "columns", "places")
        plain.__dict__.update(
            {name: copy.deepcopy(value, memo) for name, value in self.__dict__.items() if name not in own}
        )
        return plain


def _places_of(part: torch.nn.Linear) -> tuple[int, ...]:
    return (part.weight.data_ptr(),) if part.bias is None else (part.weight.data_ptr(), part.bias.data_ptr())


def _joinable(model: torch.nn.Module) -> Iterator[list[torch.nn.Linear]]:
    for module in model.modules():
        for names in SIBLINGS:
            linears = [getattr(module, name, None) for name in names]
            if all(map(_plain, linears)) and _alike(linears):  # type: ignore[arg-type]
                yield linears  # type: ignore[misc]


def _plain(module: Any) -> bool:
    """A Linear that is nothing else, and whose weight is its own."""
    if type(module) is not torch.nn.Linear or "forward" in module.__dict__ or hasattr(module, "_hf_hook"):
        return False
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and type(module.weight) is torch.nn.Parameter and module.weight.device.type != "meta"


def _alike(linears: list[torch.nn.Linear]) -> bool:
    kinds = {
        (each.in_features, each.weight.dtype, each.weight.device, each.bias is None, each.weight.is_inference())
        for each in linears
    }  # fmt: skip
    biases = all(each.bias is None or each.bias.is_inference() == each.weight.is_inference() for each in linears)
    return len(kinds) == 1 and biases and len({id(each.weight) for each in linears}) == len(linears)
