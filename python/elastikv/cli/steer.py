"""`elastikv limit`, `reserve`, `trim`, `sleep` and `wake`: what a person changes while models run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from elastikv.cli.ledgers import Model, Pid, Pool, chosen, clear_errors, complete_model, with_model
from elastikv.cli.sizes import parse_size, short_size

if TYPE_CHECKING:
    from elastikv import Ledger, LedgerClient


def limit(
    model: Model,
    size: Annotated[str, typer.Argument(help="As 8GiB; 'none': as much as the pool has.")],
    pool: Pool = None,
    pid: Pid = None,
) -> None:
    """Sets how much physical memory a model may hold. Below what it holds, it counts as memory is freed."""
    asked = None if size.strip().lower() == "none" else parse_size(size)
    with clear_errors("limit"):
        ledger, client = with_model(model, pool, pid)
        target = ledger.stats().physical_limit if asked is None else asked
        ledger.set_quota(model, pid=client.pid, limit=target)
        _tell(ledger.name, model, client.pid, f"limit {short_size(client.limit)} -> {short_size(target)}")
        over = next((one.overage for one in ledger.clients() if (one.model, one.pid) == (model, client.pid)), 0)
    if over > 0:
        typer.echo(f"it holds {short_size(over)} more than that, which goes as memory is freed")


def reserve(
    model: Model,
    size: Annotated[str, typer.Argument(help="As 8GiB; 0 or 'none': nothing is promised.")],
    pool: Pool = None,
    pid: Pid = None,
) -> None:
    """Sets how much physical memory is a model's whenever it asks."""
    asked = 0 if size.strip().lower() == "none" else parse_size(size, zero=True)
    with clear_errors("reserve"):
        ledger, client = with_model(model, pool, pid)
        ledger.set_quota(model, pid=client.pid, reserve=asked)
        _tell(ledger.name, model, client.pid, f"reserve {short_size(client.reserve)} -> {short_size(asked)}")


def trim(
    model: Annotated[
        str | None, typer.Argument(help="The model's name; default: all.", autocompletion=complete_model)
    ] = None,
    pool: Pool = None,
    pid: Pid = None,
) -> None:
    """Gives parked memory back to the device: a model's, or everyone's."""
    with clear_errors("trim"):
        if model is not None:
            ledger, client = with_model(model, pool, pid)
            freed = ledger.trim(model, pid=client.pid)
        elif pid is not None:
            raise typer.BadParameter("--pid needs a model")
        else:
            freed = sum(ledger.trim() for ledger in chosen(pool))
    typer.echo(f"{short_size(freed)} given back")


Timeout = Annotated[float, typer.Option(min=0, help="Seconds to wait for it; what takes longer goes on.")]


def sleep(model: Model, pool: Pool = None, pid: Pid = None, timeout: Timeout = 60.0) -> None:
    """Puts a model to sleep: its memory goes, and comes back with `elastikv wake`. Requests wait meanwhile."""
    with clear_errors("sleep"):
        ledger, client = with_model(model, pool, pid)
        ledger.sleep(model, pid=client.pid, timeout=timeout)
        _tell_held(ledger, model, client, "sleeps")


def wake(model: Model, pool: Pool = None, pid: Pid = None, timeout: Timeout = 60.0) -> None:
    """Wakes a model that sleeps; its requests go on."""
    with clear_errors("wake"):
        ledger, client = with_model(model, pool, pid)
        ledger.wake(model, pid=client.pid, timeout=timeout)
        _tell_held(ledger, model, client, "is awake")


def _tell_held(ledger: Ledger, model: str, client: LedgerClient, what: str) -> None:
    now = next((one.charged for one in ledger.clients() if (one.model, one.pid) == (model, client.pid)), 0)
    _tell(ledger.name, model, client.pid, f"{what}, {short_size(client.charged)} held -> {short_size(now)}")


def _tell(pool: str, model: str, pid: int, what: str) -> None:
    typer.echo(f"{model} (process {pid}, pool {pool}): {what}")
