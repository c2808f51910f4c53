"""What a person can set: environment variables, or `--additional-config '{"elastikv": {...}}'`, which goes first."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from elastikv.cli.sizes import parse_size

PREFIX = "ELASTIKV_VLLM_"
LAYOUTS = ("blocks", "layers")


@dataclass(frozen=True)
class Settings:
    """Sizes are bytes, or as `8GiB`. The variable of a field is ELASTIKV_VLLM_ and its name in capitals."""

    pool: str = "vllm"  # name of the ledger that engines share; the device is added to it
    limit: int | None = None  # bytes of the device that all engines of the pool may hold together, weights and all
    other: int | None = None  # bytes of this engine beside its KV cache; None: by vLLM's profile
    reserve: int = 0  # bytes of KV cache that are this engine's whenever it asks
    priority: int = 0  # higher ones are served first
    prefix_cache: int | None = None  # bytes of idle prefixes that are kept; None: all, until somebody lacks memory
    extent: int | None = None  # bytes that come and go at once; None: 1/64 of the cache, at most 16 MiB
    park: int = 32 << 20  # idle bytes that stay mapped, for the next request
    # The same while eight times as much is in use, or the next step's prompts want it; mapped before there is need.
    ahead: int = 256 << 20
    layout: str = "blocks"  # what lies together in an extent: all layers of each block, or all blocks of each layer
    name: str | None = None  # what `elastikv top` shows; None: the model's served name

    @classmethod
    def read(cls, additional_config: object = None, environment: Mapping[str, str] = os.environ) -> Settings:
        """Raises ValueError for a name that there is not, and for a value that can't be."""
        given: dict[str, Any] = {}
        known = {field.name for field in fields(cls)}
        for key, text in environment.items():
            if key.startswith(PREFIX):
                given[key[len(PREFIX) :].lower()] = text
        config = additional_config.get("elastikv", {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(config, Mapping):
            raise ValueError(f"additional-config's 'elastikv' must be a mapping of settings, not {config!r}")
        given.update(config)
        for key in given:
            if key not in known:
                raise ValueError(f"elastikv has no setting '{key}' for vLLM; there are {', '.join(sorted(known))}")
        values: dict[str, Any] = {key: _value_of(key, value) for key, value in given.items()}
        return cls(**values)


def _value_of(key: str, value: object) -> object:
    try:
        if key in ("pool", "name"):
            if not isinstance(value, str) or not value:
                raise ValueError("it must be a name")
            return value
        if key == "layout":
            if value not in LAYOUTS:
                raise ValueError(f"it must be one of {', '.join(LAYOUTS)}")
            return value
        if key == "priority":
            return int(str(value))
        if isinstance(value, bool):
            raise ValueError("it must be a size")
        if isinstance(value, int) and value < 0:
            raise ValueError("it must be at least 0")
        return value if isinstance(value, int) else parse_size(str(value), zero=True)
    except Exception as error:
        raise ValueError(f"elastikv's setting '{key}' for vLLM can't be {value!r}: {error}") from None
