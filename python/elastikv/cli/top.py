"""`elastikv top`: the pools of this machine, live."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from elastikv.cli.ledgers import NO_POOL, Pool, chosen, clear_errors, running
from elastikv.cli.sizes import count, short_size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from elastikv import Ledger, LedgerClient, LedgerStats

BAR = 24
WIDE = 116  # columns of the terminal, from which all of ours fit
NARROW_LEAVES_OUT = ("retiring", "stranded", "calls")
STATES = (("used", "green"), ("retiring", "magenta"), ("parked", "blue"), ("stranded", "bright_black"))


@dataclass
class Rates:
    """How fast numbers change, between one reading and the last."""

    _last: dict[tuple[str, ...], tuple[float, float]] = field(default_factory=dict)

    def of(self, value: float, now: float, *key: str) -> float:
        """Change a second since the last reading under the key; 0 at the first."""
        before = self._last.get(key)
        self._last[key] = (value, now)
        return 0.0 if before is None or now <= before[1] else (value - before[0]) / (now - before[1])


def top(
    pool: Pool = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two readings.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one reading and end.")] = False,
) -> None:
    """Shows the models of every pool that has a name: what they hold, of what, how fast it grows. Ctrl-C ends it."""
    from rich.console import Console
    from rich.live import Live

    rates = Rates()
    with clear_errors("top"):
        if pool is not None:
            chosen(pool)  # says so if there is none
        console = Console() if sys.stdout.isatty() else Console(width=160)
        if once or not sys.stdout.isatty():
            console.print(picture(pool, rates, console.width))
            return
        live = Live(picture(pool, rates, console.width), console=console, screen=True, auto_refresh=False)
        with contextlib.suppress(KeyboardInterrupt), live:
            while True:
                time.sleep(interval)
                live.update(picture(pool, rates, console.width), refresh=True)


def picture(pool: str | None, rates: Rates, width: int) -> RenderableType:
    """All pools, or the one of that name, as they are now."""
    from rich.console import Group
    from rich.text import Text

    from elastikv import LedgerError

    legend = [(f"■ {name}  ", color) for name, color in STATES]
    parts: list[RenderableType] = [Text.assemble(("elastikv top", "bold"), time.strftime("  %H:%M:%S   "), *legend)]
    for ledger in running():
        if pool in (None, ledger.name):
            with contextlib.suppress(LedgerError):  # it ended meanwhile
                parts += _pool(ledger, rates, width)
    if len(parts) == 1:
        parts.append(Text(f"\n{NO_POOL}" if pool is None else f"\npool '{pool}' has ended", style="yellow"))
    return Group(*parts)


def _pool(ledger: Ledger, rates: Rates, width: int) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    clients = sorted(ledger.clients(), key=lambda one: (-one.charged, one.model, one.pid))
    stats, now = ledger.stats(), time.monotonic()
    head = Text.assemble(
        "\n", (ledger.name, "bold cyan"), f" ({ledger.device})  ", _bar(clients, stats, stats.physical_limit),
        f"  {short_size(stats.charged)} of {short_size(stats.physical_limit)} held, peak {short_size(stats.peak)}, "
        f"{short_size(stats.reserved)} reserved, {count(stats.processes, 'process')}",
        (f", {stats.waiters} waiting" if stats.waiters else "", "bold yellow"),
    )  # fmt: skip
    table = Table(expand=True, show_edge=False, pad_edge=False, box=None, header_style="bold", padding=(0, 1))
    rows = [_cells(ledger.name, client, stats, rates, now) for client in clients]
    if not rows:
        return [head, Text("  no model", style="bright_black")]
    columns = [name for name in rows[0] if width >= WIDE or name not in NARROW_LEAVES_OUT]
    for name in columns:
        left = name == "model"
        table.add_column(
            name, justify="left" if left else "right", ratio=1 if left else None, min_width=8 if left else None,
            overflow="ellipsis", no_wrap=True,
        )  # fmt: skip
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    return [head, table]


def _cells(pool: str, client: LedgerClient, stats: LedgerStats, rates: Rates, now: float) -> dict[str, str | Text]:
    """One model's row, by column."""
    from rich.text import Text

    rate = rates.of(client.charged, now, pool, client.model, str(client.pid))
    growth = f"{'+' if rate > 0 else ''}{short_size(rate)}" if rate else "-"
    over = client.overage > 0
    limit = short_size(client.limit) if client.limit < stats.physical_limit else "-"
    if over:
        limit += f" +{short_size(client.overage)}"
    waiting = f"{client.waiters}: {short_size(client.waiting)}" if client.waiters else "-"
    stale = "" if client.age < 5 else "bright_black"  # its process has not answered for a while
    return {
        "model": client.model,
        "pid": str(client.pid),
        "held": Text(short_size(client.charged), style="bold red" if over else "bold"),
        **{name: Text(short_size(getattr(client, name)), style=stale or color) for name, color in STATES},
        "reserve": short_size(client.reserve) if client.reserve else "-",
        "limit": Text(limit, style="red" if over else ""),
        "growth/s": Text(growth, style="green" if rate > 0 else ""),
        "calls": f"{client.driver_calls:,}",
        "waiting": Text(waiting, style="bold yellow" if client.waiters else ""),
    }


def _bar(clients: list[LedgerClient], stats: LedgerStats, whole: int) -> Text:
    """What is held of the limit, by state; the rest of what is charged, where no process has told, in white."""
    from rich.text import Text

    amounts = [(sum(getattr(client, name) for client in clients), color) for name, color in STATES]
    untold = max(stats.charged - sum(amount for amount, _ in amounts), 0)
    bar, filled, reached = Text(), 0, 0
    for amount, color in [*amounts, (untold, "white")]:
        reached += amount
        end = min(round(BAR * reached / whole), BAR) if whole else 0
        bar.append("━" * max(end - filled, 0), style=color)
        filled = max(end, filled)
    bar.append("─" * (BAR - filled), style="bright_black")
    return bar
