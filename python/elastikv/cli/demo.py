"""`elastikv demo`: two language models answer a trace of requests out of one shared pool."""

from __future__ import annotations

import enum
import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from elastikv.cli.sizes import parse_size

MISSING = 2  # exit status when something can't be used as asked


class DType(str, enum.Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def demo(
    models: Annotated[str, typer.Option(help="auto, smollm2 or random.")] = "auto",
    model: Annotated[str | None, typer.Option(help="A local checkpoint: a folder or a .gguf file.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="CSV with TIMESTAMP,ContextTokens,GeneratedTokens; default: the one that ships.")
    ] = None,
    time_scale: Annotated[float, typer.Option(help="Multiplies the trace's times.")] = 1.0,
    token_scale: Annotated[float, typer.Option(help="Multiplies the trace's token counts.")] = 1.0,
    max_requests: Annotated[int, typer.Option(help="Serve only the first so many.")] = 32,
    shift: Annotated[float, typer.Option(help="Seconds after which the other model becomes the busy one.")] = 15.0,
    limit: Annotated[str | None, typer.Option(help="Physical limit, as 96MiB; default: 80 % of the need.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    dtype: Annotated[
        DType, typer.Option(help="Of weights and caches. Tokens are sure to be equal in float32.")
    ] = DType.float32,
    out: Annotated[Path, typer.Option(help="Folder for picture, timeline and summary.")] = Path("elastikv-demo"),
) -> None:
    """Two language models share one pool under one physical limit, and their caches grow and shrink in it.

    Every answer is then checked against transformers' own DynamicCache. Exits 1 if a token differs, 2 if something
    that was asked for can't be used here.
    """
    _require_packages()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network
    import torch

    from elastikv.cli.screen import LiveScreen, PlainScreen
    from elastikv.demo.run import Options, run_demo
    from elastikv.errors import VmmError
    from elastikv.trace import DEFAULT_TRACE

    options = Options(
        models=model or models,
        trace=trace or DEFAULT_TRACE,
        time_scale=time_scale,
        token_scale=token_scale,
        max_requests=max_requests,
        shift=shift,
        limit=parse_size(limit) if limit else None,
        device=device,
        dtype=getattr(torch, dtype.value),
        out=out,
    )
    screen = LiveScreen() if sys.stdout.isatty() else PlainScreen()
    try:
        with screen:
            result = run_demo(options, screen)
    except (VmmError, OSError, ValueError) as refused:  # transformers says ValueError of a checkpoint that is none
        typer.echo(f"elastikv demo: {refused}", err=True)
        raise typer.Exit(MISSING) from refused
    screen.ended(result)
    raise typer.Exit(0 if result.ok else 1)


def _require_packages() -> None:
    missing = [name for name in ("transformers", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        typer.echo(f"elastikv demo needs {' and '.join(missing)}: pip install 'elastikv[demo]'", err=True)
        raise typer.Exit(MISSING)
