"""`elastikv vllm serve MODEL`: vLLM's own command, with its KV cache on elastic memory."""

from __future__ import annotations

import os
import shutil
from typing import Annotated

import typer

Text = str | None


def vllm(
    context: typer.Context,
    pool: Annotated[Text, typer.Option(help="Engines of one pool share its limit on each GPU; 'vllm'.")] = None,
    limit: Annotated[Text, typer.Option(help="What they may hold of a GPU, as 70GiB; 95 % of it.")] = None,
    reserve: Annotated[Text, typer.Option(help="KV cache that is this engine's whenever it asks; 0.")] = None,
    priority: Annotated[Text, typer.Option(help="Higher ones are served first; 0.")] = None,
    prefix_cache: Annotated[
        Text, typer.Option(help="Idle prefixes that are kept, as 4GiB; all, until somebody lacks memory.")
    ] = None,
    name: Annotated[Text, typer.Option(help="What `elastikv top` shows; the served name.")] = None,
    layout: Annotated[Text, typer.Option(help="'blocks' or 'layers': what lies together in memory.")] = None,
    extent: Annotated[Text, typer.Option(help="What comes and goes at once, as 16MiB.")] = None,
    park: Annotated[Text, typer.Option(help="Idle memory that stays mapped; 32MiB.")] = None,
    ahead: Annotated[Text, typer.Option(help="Memory mapped before there is need; 256MiB.")] = None,
    other: Annotated[Text, typer.Option(help="What the engine counts for beside its KV cache; vLLM's profile.")] = None,
) -> None:
    """Runs vLLM's command with elastic memory. From the first word on, as `serve MODEL --port 8001`, all is vLLM's own.

    Each option says what it is without it. docs/vllm.md has more on them.
    """
    from elastikv.vllm.settings import PREFIX, Settings

    given = {
        "pool": pool, "limit": limit, "reserve": reserve, "priority": priority, "prefix_cache": prefix_cache,
        "name": name, "layout": layout, "extent": extent, "park": park, "ahead": ahead, "other": other,
    }  # fmt: skip
    environment = {f"{PREFIX}{key.upper()}": text for key, text in given.items() if text is not None}
    try:
        Settings.read(environment=environment)
    except ValueError as error:  # a bad one is told before vLLM starts
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    program = shutil.which("vllm")
    if program is None:
        typer.echo("vLLM's command is not on the PATH: pip install vllm", err=True)
        raise typer.Exit(1)
    os.execvpe(program, ["vllm", *context.args], {**os.environ, **environment, "ELASTIKV_VLLM": "1"})
