"""Finding the pools that run on this machine and the models in them, for the commands that look at and steer them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from elastikv import Ledger, LedgerClient

FAILED = 2  # exit status when something can't be used as asked

NO_POOL = "no pool with a name runs here; a program shares one as SharedMemoryPool(..., name='gpu0')"


def complete_pool(incomplete: str) -> list[str]:
    from elastikv import ledgers

    return [name for name in ledgers() if name.startswith(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    names = {client.model for ledger in running() for client in ledger.clients(refresh=False)}
    return sorted(name for name in names if name.startswith(incomplete))


Model = Annotated[str, typer.Argument(help="The model's name.", autocompletion=complete_model)]
Pool = Annotated[
    str | None, typer.Option("--pool", "-p", help="The pool's name; default: all.", autocompletion=complete_pool)
]
Pid = Annotated[int | None, typer.Option(help="The process, where several have a model of that name.")]


@contextlib.contextmanager
def clear_errors(command: str) -> Iterator[None]:
    """Turns what is wrong with the request, or with a pool, into one line and exit status 2."""
    from elastikv import VmmError

    try:
        yield
    except VmmError as error:
        typer.echo(f"elastikv {command}: {error}", err=True)
        raise typer.Exit(FAILED) from error


def running() -> list[Ledger]:
    """Every pool of this user, by name; one that ends meanwhile is left out."""
    from elastikv import Ledger, LedgerError, ledgers

    found = []
    for name in ledgers():
        with contextlib.suppress(LedgerError):
            found.append(Ledger(name))
    return found


def chosen(pool: str | None) -> list[Ledger]:
    """The pool of that name, or all of them. Raises LedgerError where there is none."""
    from elastikv import Ledger, LedgerError

    if pool is not None:
        return [Ledger(pool)]
    found = running()
    if not found:
        raise LedgerError(NO_POOL)
    return found


def with_model(model: str, pool: str | None, pid: int | None) -> tuple[Ledger, LedgerClient]:
    """The one model that is meant, and its pool.

    Raises ModelNotFound with the names that there are, InvalidArgument where several fit, LedgerError as `chosen`.
    """
    from elastikv import InvalidArgument, ModelNotFound

    ledgers = chosen(pool)
    clients = [(ledger, client) for ledger in ledgers for client in ledger.clients(refresh=False)]
    fitting = [one for one in clients if one[1].model == model and pid in (None, one[1].pid)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        places = ", ".join(f"process {client.pid} in pool '{ledger.name}'" for ledger, client in fitting)
        raise InvalidArgument(f"model '{model}' is there {len(fitting)} times ({places}): say which by --pid or --pool")
    where = f"in pool '{pool}'" if pool else "in any pool"
    of = f" of process {pid}" if pid is not None else ""
    known = sorted({f"'{client.model}'" for _, client in clients})
    raise ModelNotFound(
        f"no model '{model}'{of} {where}; {'there are ' + ', '.join(known) if known else 'there is none'}"
    )
