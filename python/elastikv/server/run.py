"""A server from its settings to its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import uvicorn

import elastikv
from elastikv.server.app import Served, make_app
from elastikv.server.models import load_model
from elastikv.server.text import Texts
from elastikv.serving.engine import Engine
from elastikv.serving.runner import Runner


@dataclass(frozen=True)
class Settings:
    """As `elastikv serve` takes them; limit, reserve and quota in bytes."""

    model: str
    name: str
    limit: int
    pool: str | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    reserve: int = 0
    quota: int | None = None
    priority: int = 0
    max_batch: int = 32
    max_tokens: int = 8192
    chunk: int = 1024
    prefixes: int = 32
    host: str = "127.0.0.1"
    port: int = 8000


def run_server(settings: Settings) -> None:
    """Loads the model, serves until SIGINT or SIGTERM, and gives everything back."""
    model, tokenizer = load_model(settings.model, device=settings.device, dtype=settings.dtype)
    config = model.config.get_text_config(decoder=True)
    with elastikv.SharedMemoryPool(settings.limit, settings.device, name=settings.pool) as pool:
        handle = pool.register_model(
            settings.name,
            Engine.addresses(
                model.config,
                settings.dtype,
                max_batch=settings.max_batch,
                max_tokens=settings.max_tokens,
                prefix_entries=settings.prefixes,
            ),
            reserve=settings.reserve,
            limit=settings.quota,
            priority=settings.priority,
        )
        engine = Engine(
            model,
            handle,
            max_batch=settings.max_batch,
            max_tokens=settings.max_tokens,
            chunk=settings.chunk,
            prefix_entries=settings.prefixes,
        )
        ends: Any = getattr(model.generation_config, "eos_token_id", None) if tokenizer is not None else None
        stops = [ends] if isinstance(ends, int) else list(ends or [])
        try:
            with Runner(engine) as runner:
                served = Served(engine, runner, Texts(tokenizer, config.vocab_size), stops)
                uvicorn.run(make_app(served, pool), host=settings.host, port=settings.port, log_level="warning")
        finally:
            engine.close()
