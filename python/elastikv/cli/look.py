"""`elastikv list` and `watch`: what runs, for people and for programs."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from elastikv.cli.ledgers import Pool, chosen, clear_errors, running
from elastikv.cli.sizes import count, short_size

if TYPE_CHECKING:
    from elastikv import Ledger, LedgerClient

POOL_FIELDS = ("physical_limit", "charged", "committed", "reserved", "peak", "processes", "waiters")
CLIENT_FIELDS = (
    "model", "pid", "charged", "used", "retiring", "parked", "stranded", "spilled", "paused", "backup", "live",
    "reserve", "limit", "overage", "priority", "waiting", "waiters", "grants", "refusals", "driver_calls", "age",
)  # fmt: skip


def pool_row(ledger: Ledger) -> dict[str, Any]:
    stats = ledger.stats()
    return {"pool": ledger.name, "device": ledger.device, **{name: getattr(stats, name) for name in POOL_FIELDS}}


def client_row(client: LedgerClient) -> dict[str, Any]:
    """A model's numbers; `age` is None where its process has never told them."""
    row = {name: getattr(client, name) for name in CLIENT_FIELDS}
    return {**row, "age": row["age"] if math.isfinite(row["age"]) else None}


def list_pools(
    pool: Pool = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs; sizes in bytes.")] = False,
) -> None:
    """Lists the pools on this machine that have a name, and the models in them."""
    with clear_errors("list"):
        ledgers = chosen(pool) if pool else running()
        rows = [{**pool_row(one), "models": [client_row(client) for client in one.clients()]} for one in ledgers]
    if as_json:
        typer.echo(json.dumps({"pools": rows}, indent=2))
        return
    if not rows:
        typer.echo("no pool with a name runs here")
    for row in rows:
        held = f"{short_size(row['charged'])} of {short_size(row['physical_limit'])} held"
        typer.echo(
            f"{row['pool']} ({row['device']}): {held}, "
            f"{short_size(row['reserved'])} reserved, {count(row['processes'], 'process')}, {row['waiters']} waiting"
        )
        for model in row["models"]:
            typer.echo(
                f"  {model['model']} (process {model['pid']}): {short_size(model['charged'])} held, "
                f"{short_size(model['used'])} used, {short_size(model['parked'])} parked, "
                f"reserve {short_size(model['reserve'])}, limit {short_size(model['limit'])}"
                + (f", {short_size(model['overage'])} above it" if model["overage"] else "")
            )


def watch(
    pool: Pool = None,
    out: Annotated[Path | None, typer.Option("--csv", help="A file, or - for the terminal.")] = None,
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between two readings.")] = 1.0,
    count: Annotated[int | None, typer.Option(min=1, help="Readings, then it ends; default: until Ctrl-C.")] = None,
) -> None:
    """Writes what every model holds as CSV, one line a model and reading; sizes in bytes."""
    with clear_errors("watch"), contextlib.ExitStack() as stack:
        if pool is not None:
            chosen(pool)  # says so if there is none
        try:
            file = sys.stdout if out is None or str(out) == "-" else stack.enter_context(out.open("w", newline=""))
        except OSError as error:
            typer.echo(f"elastikv watch: can't write {out}: {error.strerror}", err=True)
            raise typer.Exit(2) from error
        with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
            _record(file, pool, interval, count)


def _record(file: TextIO, pool: str | None, interval: float, count: int | None) -> None:
    from elastikv import LedgerError

    writer = csv.writer(file)
    writer.writerow(("time", "pool", "pool_limit", "pool_charged", *CLIENT_FIELDS))
    following = time.monotonic()
    taken = 0
    while count is None or taken < count:
        if taken:
            now = time.monotonic()
            following = max(following + interval, now)
            time.sleep(following - now)
        for ledger in running():
            if pool not in (None, ledger.name):
                continue
            with contextlib.suppress(LedgerError):  # it ended meanwhile
                clients, stats, moment = ledger.clients(), ledger.stats(), f"{time.time():.3f}"
                for client in clients:
                    row = client_row(client)
                    writer.writerow((moment, ledger.name, stats.physical_limit, stats.charged, *row.values()))
        file.flush()
        taken += 1
