"""The same model with fewer kernels, for steps so short that their number counts."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch.nn.functional import rms_norm

from elastikv import _core
from elastikv.hf import kernels

Forward = Callable[..., Any]

#: Kinds of rotary embeddings whose frequencies stay as they are, however long a row gets.
FIXED_ROTARY = ("default", "linear", "llama3", "yarn")


class Lean:
    """Within it, a model's RMS norms take one kernel each, not eight, rotary embeddings one, not ten, their angles one,
    not ten, and gates one.

    These are our own kernels, for bfloat16 and float16; in other dtypes torch's operators leave four of ten to rotary
    embeddings, and angles and gates as they are. What takes part says so by its name and, put to the test on random
    input, gives the same to roundings of its dtype. Where gradients are recorded all is as it was. Not thread-safe: the
    model is one's own meanwhile. Others of its architecture may be in use by other threads.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules: list[tuple[torch.nn.Module, Forward]] = []  # and what takes the place of its forward
        self._entered: list[torch.nn.Module] = []
        weights = next(model.parameters())
        homes = {sys.modules[type(module).__module__] for module in model.modules() if _attends(module)}
        with torch.inference_mode():
            for module in model.modules():
                fused = _fused_norm(module) or _fused_gate(module) or _fused_angles(module, weights)
                if fused is not None:
                    self._modules.append((module, fused))
            self._rotaries = [rotary for home in homes if (rotary := _rotary_of(home, weights)) is not None]

    def __len__(self) -> int:
        """How many norms, gated MLPs, rotary embeddings and rotary functions take part."""
        return len(self._modules) + len(self._rotaries)

    def __enter__(self) -> None:
        for module, fused in self._modules:
            if "forward" not in module.__dict__:  # else someone has put another over the class' own since
                module.forward = fused
                self._entered.append(module)
        for rotary in self._rotaries:
            rotary.enter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module in self._entered:
            del module.forward
        self._entered = []
        for rotary in self._rotaries:
            rotary.leave()


class Rotary:
    """transformers' apply_rotary_pos_emb for queries and keys ``[batch, head, token, dim]``, both at once.

    One token's take our kernel. Elsewhere the half that is turned comes by a roll, and its sign with the sine, which
    all layers of a pass share. Takes the place of a Python module's function while someone is within; thread-safe.
    """

    lock = threading.Lock()  # guards who is within, of all

    def __init__(self, home: ModuleType) -> None:
        self._home, self.original, self.within = home, home.apply_rotary_pos_emb, 0
        self._pass = threading.local()  # of the calling thread

    def enter(self) -> None:
        with self.lock:
            self.within += 1
            self._home.apply_rotary_pos_emb = self  # type: ignore[attr-defined]

    def leave(self) -> None:
        with self.lock:
            self.within -= 1
            if self.within == 0:
                self._home.apply_rotary_pos_emb = self.original  # type: ignore[attr-defined]
        self._pass.__dict__.clear()

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        whole = q.shape[-1] == k.shape[-1] == cos.shape[-1]  # else only a part of a head is turned
        if torch.is_grad_enabled() or not whole:
            return self.original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)  # type: ignore[no-any-return]
        if unsqueeze_dim == 1 and q.shape[2] == 1 and q.dtype == cos.dtype == sin.dtype and kernels.serve(q):
            return _core.fused_rotate(q, k, cos, sin)
        half, seen = sin.shape[-1] // 2, self._pass
        if getattr(seen, "sine", None) is not sin:
            seen.sine, seen.cosines = sin, cos.unsqueeze(unsqueeze_dim)
            seen.signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1).unsqueeze(unsqueeze_dim)
        both = torch.cat([q, k], dim=unsqueeze_dim)
        turned = torch.addcmul(both * seen.cosines, both.roll(half, -1), seen.signed)
        heads = q.shape[unsqueeze_dim]
        return turned.narrow(unsqueeze_dim, 0, heads), turned.narrow(unsqueeze_dim, heads, k.shape[unsqueeze_dim])

    def gives_the_same(self, like: torch.Tensor) -> bool:
        for tokens in (1, 3):
            states = _noise(2, 4, tokens, 16, like=like), _noise(2, 2, tokens, 16, like=like)
            angles = _noise(2, tokens, 16, like=like), _noise(2, tokens, 16, like=like).flip(0)
            try:
                wanted = self.original(*states, *angles)
                found = self(*states, *angles)
            except (TypeError, RuntimeError, ValueError, IndexError):  # one of another kind
                return False
            finally:
                self._pass.__dict__.clear()
            # Sums of two products: how far they may be off goes by the products.
            tolerance = 4 * torch.finfo(like.dtype).eps * 16
            if not isinstance(wanted, tuple) or not all(
                ours.dtype == theirs.dtype and torch.allclose(ours, theirs, rtol=0, atol=tolerance)
                for ours, theirs in zip(found, wanted)
            ):
                return False
        return True


_rotaries: dict[ModuleType, Rotary] = {}


def _rotary_of(home: ModuleType, like: torch.Tensor) -> Rotary | None:
    """The module's one, whoever asks; None where its function is of another kind."""
    with Rotary.lock:
        if home not in _rotaries and hasattr(home, "apply_rotary_pos_emb"):
            _rotaries[home] = Rotary(home)
        rotary = _rotaries.get(home)
        if rotary is not None and rotary.within == 0:  # it may have become another since
            rotary.original = home.apply_rotary_pos_emb
    return rotary if rotary is not None and rotary.gives_the_same(like) else None


def _attends(module: torch.nn.Module) -> bool:
    return type(module).__name__.endswith("Attention")


def _same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Each element, to roundings."""
    limits = torch.finfo(wanted.dtype)
    alike = found.dtype == wanted.dtype and found.shape == wanted.shape
    return alike and torch.allclose(found, wanted, rtol=2 * limits.eps, atol=limits.tiny, equal_nan=True)


def _noise(*shape: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(like.device, like.dtype)


def _fused_norm(module: Any) -> Forward | None:
    """The norm's forward by one kernel; None for what is no such norm."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    named = type(module).__name__.endswith("RMSNorm") and "forward" not in module.__dict__
    if not named or not isinstance(weight, torch.Tensor) or weight.ndim != 1 or not isinstance(eps, float):
        return None

    def forward(states: torch.Tensor) -> torch.Tensor:
        now: torch.Tensor = module.weight
        if torch.is_grad_enabled() or states.dtype != now.dtype:
            return type(module).forward(module, states)  # type: ignore[no-any-return]
        if kernels.serve(states) and len(now) % 8 == 0:
            return _core.fused_rms_norm(states, now, eps)
        return rms_norm(states, now.shape, now, eps)

    probe = _noise(3, len(weight), like=weight)
    return forward if _same(forward(probe), module(probe)) else None


def _fused_angles(module: Any, like: torch.Tensor) -> Forward | None:
    """The forward of a model's rotary embedding by one kernel; None for what is no such module."""
    original = type(module).forward
    named = type(module).__name__.endswith("RotaryEmbedding") and "forward" not in module.__dict__
    if not named or getattr(module, "rope_type", None) not in FIXED_ROTARY or not kernels.serve(like):
        return None
    if list(inspect.signature(original).parameters) != ["self", "x", "position_ids"]:
        return None

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frequencies: torch.Tensor = module.inv_freq
        fits = frequencies.dtype == torch.float32 and frequencies.device == x.device == position_ids.device
        fits = fits and position_ids.ndim == 2 and position_ids.dtype == torch.int64
        if torch.is_grad_enabled() or not fits or not kernels.serve(x):
            return original(module, x, position_ids)  # type: ignore[no-any-return]
        return _core.fused_angles(position_ids, frequencies, module.attention_scaling, x.dtype)

    positions = torch.tensor([[0, 1, 7, 1000], [4095, 30000, 65535, 131071]], device=like.device)
    try:
        return forward if all(map(_same, forward(like, positions), module(like, positions))) else None
    except (TypeError, RuntimeError, ValueError, IndexError, AttributeError):  # it wants positions of another kind
        return None


class _Stop(Exception):
    """A probe has seen what it wanted."""


def _fused_gate(module: Any) -> Forward | None:
    """The forward of a gated MLP with its gate in one kernel; None for what is no such MLP."""
    gate, up, down = linears = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    named = type(module).__name__.endswith("MLP") and "forward" not in module.__dict__
    if not named or not all(isinstance(each, torch.nn.Linear) for each in linears):
        return None
    act = next((found for name in ("act_fn", "act", "activation_fn") if (found := getattr(module, name, None))), None)
    hooked = isinstance(act, torch.nn.Module) and (act._forward_hooks or act._forward_pre_hooks)
    if (
        type(act).__name__ not in ("SiLU", "SiLUActivation")
        or hooked
        or len(inspect.signature(module.forward).parameters) != 1
    ):
        return None
    assert gate is not None and up is not None and down is not None and act is not None
    if not kernels.serve(gate.weight) or gate.out_features % 8 != 0 or up.out_features != gate.out_features:
        return None

    def gated(states: torch.Tensor) -> torch.Tensor:
        gates, factors = module.gate_proj(states), module.up_proj(states)
        if torch.is_grad_enabled() or not kernels.serve(gates) or gates.dtype != factors.dtype:
            return act(gates) * factors  # type: ignore[no-any-return]
        return _core.fused_gate(gates, factors)

    def forward(states: torch.Tensor) -> torch.Tensor:
        return module.down_proj(gated(states))  # type: ignore[no-any-return]

    # Some clamp what is large. What comes behind the gate is not computed: on a split model it would wait for others.
    seen: list[torch.Tensor] = []

    def stop(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _Stop

    hook = down.register_forward_pre_hook(stop)
    try:
        for scale in (1, 30, 1000):
            probe = _noise(3, gate.in_features, like=gate.weight) * scale
            try:
                module(probe)
            except _Stop:
                if _same(gated(probe), seen.pop()):
                    continue
            return None
    finally:
        hook.remove()
    return forward
