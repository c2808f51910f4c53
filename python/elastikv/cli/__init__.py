"""The `elastikv` command."""

from __future__ import annotations

import typer

from elastikv.cli.demo import demo
from elastikv.cli.doctor import doctor
from elastikv.cli.look import list_pools, watch
from elastikv.cli.serve import serve
from elastikv.cli.steer import limit, reserve, sleep, trim, wake
from elastikv.cli.top import top
from elastikv.cli.vllm import vllm

app = typer.Typer(
    help="KV caches that grow and shrink in place, in memory that several models share.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(doctor)
app.command()(serve)
app.command()(top)
app.command("list")(list_pools)
app.command()(limit)
app.command()(reserve)
app.command()(trim)
app.command()(sleep)
app.command()(wake)
app.command()(watch)
app.command(context_settings={"allow_extra_args": True, "allow_interspersed_args": False})(vllm)


def main() -> None:
    app()
