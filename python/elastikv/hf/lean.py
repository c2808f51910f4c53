"""The same model with fewer kernels, for steps so short that their number counts."""

from __future__ import annotations

import functools
import sys
from types import TracebackType
from typing import Any

import torch
from torch.nn.functional import rms_norm

from elastikv import _core
from elastikv.hf.views import logger


class Lean:
    """Within it, a model's RMS norms take one kernel each, not eight, rotary embeddings one, not ten, and gates one.

    These are our own kernels, for bfloat16 and float16; in other dtypes torch's operators leave four of ten to rotary
    embeddings, and gates as they are. What takes part says so by its name and, put to the test on random input, gives
    the same to roundings of its dtype. Not thread-safe: the model is one's own meanwhile.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules: list[tuple[torch.nn.Module, Any]] = []  # and what takes the place of its forward
        self._rotaries: list[tuple[Any, Any, Any]] = []  # module of Python, its function, ours
        weights = next(model.parameters())
        homes = {sys.modules[type(module).__module__] for module in model.modules() if _attends(module)}
        with torch.inference_mode():
            for module in model.modules():
                fused = _fused_norm(module) or _fused_gate(module)
                if fused is not None:
                    self._modules.append((module, fused))
            for home in homes:
                function = getattr(home, "apply_rotary_pos_emb", None)
                if function is not None and _turns_alike(function, weights):
                    self._rotaries.append((home, function, Rotary()))

    def __len__(self) -> int:
        """How many norms, gated MLPs and rotary functions take part."""
        return len(self._modules) + len(self._rotaries)

    def __enter__(self) -> None:
        for module, fused in self._modules:
            module.forward = fused
        for home, _, ours in self._rotaries:
            home.apply_rotary_pos_emb = ours

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module, _ in self._modules:
            del module.forward  # what was put over the class' own
        for home, function, ours in self._rotaries:
            home.apply_rotary_pos_emb = function
            ours.forget()


class Rotary:
    """transformers' apply_rotary_pos_emb for queries and keys ``[batch, head, token, dim]``, both at once.

    One token's take our kernel. Elsewhere the half that is turned comes by a roll, and its sign with the sine, which
    all layers of a pass share.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The pass is over."""
        self._sine: torch.Tensor | None = None
        self._cosines, self._signed = torch.empty(0), torch.empty(0)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if unsqueeze_dim == 1 and q.shape[2] == 1 and _served(q) and q.dtype == cos.dtype == sin.dtype:
            return _core.fused_rotate(q, k, cos, sin)
        half = sin.shape[-1] // 2
        if sin is not self._sine:
            self._sine = sin
            self._cosines = cos.unsqueeze(unsqueeze_dim)
            self._signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1).unsqueeze(unsqueeze_dim)
        both = torch.cat([q, k], dim=unsqueeze_dim)
        turned = torch.addcmul(both * self._cosines, both.roll(half, -1), self._signed)
        heads = q.shape[unsqueeze_dim]
        return turned.narrow(unsqueeze_dim, 0, heads), turned.narrow(unsqueeze_dim, heads, k.shape[unsqueeze_dim])


def _served(like: torch.Tensor) -> bool:
    """Whether our kernels take a tensor of this device and dtype. Says why not once, where it is not for these."""
    if like.device.type != "cuda" or like.dtype not in (torch.bfloat16, torch.float16):
        return False
    return _answer(like.device, like.dtype)


@functools.cache
def _answer(device: torch.device, dtype: torch.dtype) -> bool:
    reason = _core.why_no_decode_kernels(torch.empty(0, device=device, dtype=dtype))
    if reason:
        logger.warning("decoding takes torch's kernels, not ours: %s", reason)
    return not reason


def _attends(module: torch.nn.Module) -> bool:
    return type(module).__name__.endswith("Attention")


def _same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    tolerance = 4 * torch.finfo(wanted.dtype).eps * wanted.abs().max()
    alike = found.dtype == wanted.dtype and found.shape == wanted.shape
    return alike and bool((found - wanted).abs().max() <= tolerance)


def _noise(*shape: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(like.device, like.dtype)


def _fused_norm(module: torch.nn.Module) -> Any:
    """The norm's forward by one kernel; None for what is no such norm."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    named = type(module).__name__.endswith("RMSNorm") and "forward" not in module.__dict__
    if not named or not isinstance(weight, torch.Tensor) or weight.ndim != 1 or not isinstance(eps, float):
        return None

    ours = _served(weight) and len(weight) % 8 == 0

    def forward(states: torch.Tensor) -> torch.Tensor:
        if ours and states.dtype == weight.dtype:
            return _core.fused_rms_norm(states, weight, eps)
        return rms_norm(states, weight.shape, weight, eps)

    probe = _noise(3, len(weight), like=weight)
    return forward if _same(forward(probe), module(probe)) else None


def _fused_gate(module: torch.nn.Module) -> Any:
    """The forward of a gated MLP with its gate in one kernel; None for what is no such MLP."""
    names = ("gate_proj", "up_proj", "down_proj")
    gate, up, down = linears = [getattr(module, name, None) for name in names]
    named = type(module).__name__.endswith("MLP") and "forward" not in module.__dict__
    if not named or not all(isinstance(each, torch.nn.Linear) for each in linears):
        return None
    assert gate is not None and up is not None and down is not None
    if not _served(gate.weight) or gate.out_features % 8 != 0 or up.out_features != gate.out_features:
        return None

    def forward(states: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = down(_core.fused_gate(gate(states), up(states)))
        return output

    probe = _noise(3, gate.in_features, like=gate.weight)
    return forward if _same(forward(probe), module(probe)) else None


def _turns_alike(function: Any, like: torch.Tensor) -> bool:
    for tokens in (1, 3):
        queries, keys = _noise(2, 4, tokens, 16, like=like), _noise(2, 2, tokens, 16, like=like)
        cosines, sines = _noise(2, tokens, 16, like=like), _noise(2, tokens, 16, like=like).flip(0)
        try:
            wanted = function(queries, keys, cosines, sines)
        except (TypeError, RuntimeError, ValueError):  # one of another kind
            return False
        if not isinstance(wanted, tuple) or not all(map(_same, Rotary()(queries, keys, cosines, sines), wanted)):
            return False
    return True
