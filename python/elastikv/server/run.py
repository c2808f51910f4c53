"""A server from its settings to its end."""

from __future__ import annotations

import contextlib
import socket
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
    """As `elastikv serve` takes them; limit, reserve and quota in bytes. port: 0 for one that is free."""

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


class _Server(uvicorn.Server):
    """Says on stdout where it listens, once it does."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for one in sockets or []:
            host, port = one.getsockname()[:2]
            print(f"listens at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address that does not listen yet. Raises OSError that names it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        one = socket.socket(family, kind, protocol)
        try:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(address)
        except BaseException:
            one.close()
            raise
    except OSError as error:
        raise OSError(f"can't listen at {host}:{port}: {error}") from error
    return one


def run_server(settings: Settings) -> None:
    """Loads the model, serves until SIGINT or SIGTERM, and gives everything back.

    Prints a line with the address once it listens. Raises OSError, before it loads anything, where the port is taken.
    """
    with bind(settings.host, settings.port) as listener:
        _run(settings, listener)


def _run(settings: Settings, listener: socket.socket) -> None:
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
                server = _Server(uvicorn.Config(make_app(served, pool), log_level="warning"))
                with contextlib.suppress(KeyboardInterrupt):
                    server.run(sockets=[listener])
        finally:
            engine.close()
