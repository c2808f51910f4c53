"""KV caches for transformers models. Importing this package costs nothing: transformers comes in at first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastikv.hf.attention import register
    from elastikv.hf.cache import ElasticCache
    from elastikv.hf.decoder import Decoder
    from elastikv.hf.generation import generate
    from elastikv.hf.projections import JoinedProjections
    from elastikv.hf.sampling import Sampling
    from elastikv.hf.slots import Slots

__all__ = ["Decoder", "ElasticCache", "JoinedProjections", "Sampling", "Slots", "generate", "register"]

_HOMES = {
    "Decoder": "decoder",
    "ElasticCache": "cache",
    "JoinedProjections": "projections",
    "Sampling": "sampling",
    "Slots": "slots",
    "generate": "generation",
    "register": "attention",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import transformers  # noqa: F401
    except ImportError as missing:
        raise ImportError(
            f"elastikv.hf.{name} needs transformers 5.17 or newer: pip install 'elastikv[hf]'"
        ) from missing
    import importlib

    importlib.import_module("elastikv.hf.attention")  # makes itself known to transformers
    value = getattr(importlib.import_module(f"elastikv.hf.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
