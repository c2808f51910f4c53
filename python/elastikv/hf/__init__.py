"""KV caches for transformers models. Importing this package costs nothing: transformers comes in at first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastikv.hf.cache import ElasticCache

__all__ = ["ElasticCache"]


def __getattr__(name: str) -> Any:
    if name != "ElasticCache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import transformers  # noqa: F401
    except ImportError as missing:
        raise ImportError(
            "elastikv.hf.ElasticCache needs transformers 5.17 or newer: pip install 'elastikv[hf]'"
        ) from missing
    from elastikv.hf.cache import ElasticCache

    return ElasticCache
