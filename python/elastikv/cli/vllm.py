"""`elastikv vllm serve MODEL`: vLLM's own command, with its KV cache on elastic memory."""

from __future__ import annotations

import os
import shutil
from typing import Annotated

import typer

from elastikv.cli.sizes import parse_size


def vllm(
    context: typer.Context,
    pool: Annotated[str | None, typer.Option(help="Engines of one pool share its limit on each GPU [vllm].")] = None,
    limit: Annotated[str | None, typer.Option(help="What they may hold of a GPU, as 70GiB [95 % of it].")] = None,
    reserve: Annotated[str | None, typer.Option(help="KV cache that is this engine's whenever it asks [0].")] = None,
    priority: Annotated[int | None, typer.Option(help="Higher ones are served first [0].")] = None,
    prefix_cache: Annotated[
        str | None, typer.Option(help="Idle prefixes that are kept, as 4GiB [all, until somebody lacks memory].")
    ] = None,
) -> None:
    """Runs vLLM's command with elastic memory: what follows the options is vLLM's own, as `serve MODEL --port 8001`."""
    given = {"limit": limit, "reserve": reserve, "prefix_cache": prefix_cache}
    environment = {f"ELASTIKV_VLLM_{key.upper()}": text for key, text in given.items() if text is not None}
    for text in environment.values():
        parse_size(text, zero=True)  # a bad one is told before vLLM starts
    if pool is not None:
        environment["ELASTIKV_VLLM_POOL"] = pool
    if priority is not None:
        environment["ELASTIKV_VLLM_PRIORITY"] = str(priority)
    program = shutil.which("vllm")
    if program is None:
        typer.echo("vLLM's command is not on the PATH: pip install vllm", err=True)
        raise typer.Exit(1)
    os.execvpe(program, ["vllm", *context.args], {**os.environ, **environment, "ELASTIKV_VLLM": "1"})
