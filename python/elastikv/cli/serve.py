"""`elastikv serve`: one model behind HTTP, on a pool that other processes may share."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

from elastikv.cli.demo import MISSING, DType
from elastikv.cli.sizes import parse_size

PACKAGES = ("transformers", "starlette", "uvicorn", "prometheus_client")


def serve(
    model: Annotated[str, typer.Argument(help="A transformers checkpoint, or random:tiny, :small or :large.")],
    limit: Annotated[str, typer.Option(help="Physical limit of the pool, as 60GiB; the same for all who share it.")],
    name: Annotated[str | None, typer.Option(help="The model's name for clients and in the pool.")] = None,
    pool: Annotated[str | None, typer.Option(help="Name of the ledger that processes share; default: none.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda:N.")] = "cuda:0",
    dtype: Annotated[DType, typer.Option(help="Of weights and cache.")] = DType.bfloat16,
    reserve: Annotated[str, typer.Option(help="Memory that is promised to this model.")] = "0",
    quota: Annotated[str | None, typer.Option(help="The most that this model may hold; default: the limit.")] = None,
    priority: Annotated[int, typer.Option(help="Higher ones are served first.")] = 0,
    max_batch: Annotated[int, typer.Option(help="Requests that decode together.")] = 32,
    max_tokens: Annotated[int, typer.Option(help="Of a request, prompt and answer.")] = 8192,
    chunk: Annotated[int, typer.Option(help="Prompt tokens taken in beside a decode step.")] = 1024,
    prefixes: Annotated[int, typer.Option(help="Rows kept for prompts that share a prefix; 0: none.")] = 32,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0: a free one, which it says.")] = 8000,
) -> None:
    """Serves OpenAI's completions for one model: /v1/completions, /v1/models, /health, /metrics.

    Several of these with the same --pool and --limit share one limit of physical memory: see `elastikv top`.
    """
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        typer.echo(f"elastikv serve needs {' and '.join(missing)}: pip install 'elastikv[serve]'", err=True)
        raise typer.Exit(MISSING)
    import torch

    from elastikv.errors import VmmError
    from elastikv.server.run import Settings, run_server

    settings = Settings(
        model=model,
        name=name or model.rstrip("/").rpartition("/")[2].replace(":", "-"),
        limit=parse_size(limit),
        pool=pool,
        device=device,
        dtype=getattr(torch, dtype.value),
        reserve=parse_size(reserve, zero=True),
        quota=None if quota is None else parse_size(quota),
        priority=priority,
        max_batch=max_batch,
        max_tokens=max_tokens,
        chunk=chunk,
        prefixes=prefixes,
        host=host,
        port=port,
    )
    try:
        run_server(settings)
    except (VmmError, OSError, ValueError) as refused:
        typer.echo(f"elastikv serve: {refused}", err=True)
        raise typer.Exit(MISSING) from refused
