"""The `elastikv` command."""

from __future__ import annotations

import typer

from elastikv.cli.demo import demo
from elastikv.cli.doctor import doctor

app = typer.Typer(
    help="KV caches that grow and shrink in place, in memory that several models share.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(doctor)


def main() -> None:
    app()
