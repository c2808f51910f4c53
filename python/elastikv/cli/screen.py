"""What the demo shows: a live screen in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from elastikv.cli.board import Board, conclusion, intro, mib
from elastikv.demo.accounting import Sample
from elastikv.demo.run import Plan, Result
from elastikv.demo.workload import Job

COLORS = ("bright_blue", "yellow")
TEXT_LINES = 7
PLAIN_SECONDS = 3.0  # between two plain lines


class LiveScreen:
    """A board that redraws itself: two texts, the table, a progress bar. Implements demo.run.Screen.

    rich draws on a thread of its own, from what the run's thread has put there: it only reads.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._board: Board | None = None
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(), expand=True
        )
        self._bar = self._progress.add_task("loading", total=None)
        self._live = Live(self._progress, console=self._console, refresh_per_second=8, get_renderable=self._draw)

    def __enter__(self) -> LiveScreen:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def loading(self, device: str) -> None:
        self._progress.update(self._bar, description=f"loading the models for {device} (20 to 30 s)")

    def planned(self, plan: Plan) -> None:
        for line in intro(plan):
            self._live.console.print(line, highlight=False)
        self._board = Board(plan)
        self._progress.update(self._bar, description="serving", total=len(plan.jobs), completed=0)

    def token(self, job: Job) -> None:
        assert self._board is not None
        self._board.token(job)

    def finished(self, job: Job) -> None:
        assert self._board is not None
        self._board.finished(job)
        self._progress.advance(self._bar)

    def sampled(self, sample: Sample) -> None:
        assert self._board is not None
        self._board.sampled(sample)

    def checked(self, job: Job) -> None:
        assert self._board is not None
        if self._board.checked == 0:
            jobs = len(self._board.plan.jobs)
            self._progress.reset(self._bar, description="checking against DynamicCache", total=jobs)
        self._board.checked += 1
        self._progress.advance(self._bar)

    def ended(self, result: Result) -> None:
        for line in conclusion(result):
            self._console.print(line, highlight=False)

    def _draw(self) -> Group:
        if self._board is None:
            return Group(self._progress)
        texts = Table.grid(expand=True, padding=(0, 1))
        panels = []
        for index, service in enumerate(self._board.plan.services):
            texts.add_column(ratio=1)
            width = max(self._console.width // 2 - 6, 20)
            text = Text("\n".join(self._board.lines(index, width, TEXT_LINES)))
            name, color = service.role.name, COLORS[index]
            panels.append(Panel(text, height=TEXT_LINES + 2, title=name, title_align="left", border_style=color))
        texts.add_row(*panels)
        return Group(texts, self._table(), self._progress)

    def _table(self) -> Table:
        assert self._board is not None
        table = Table(expand=True, title=self._board.status(), title_style="", title_justify="left", show_edge=False)
        for name, color in zip(self._board.columns, ("", *COLORS, "bold")):
            table.add_column(name, justify="right" if name else "left", style=color)
        for row in self._board.rows():
            table.add_row(*row)
        return table


class PlainScreen:
    """Lines for a log file: numbers every few seconds, and each answer as it ends. Implements demo.run.Screen."""

    def __init__(self) -> None:
        # Wide and without markup, so that a log can be searched.
        self._console = Console(width=200, color_system=None, markup=False, highlight=False, soft_wrap=True)
        self._board: Board | None = None
        self._last = 0.0

    def __enter__(self) -> PlainScreen:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def loading(self, device: str) -> None:
        self._console.print(f"loading the models for {device} (20 to 30 s)")

    def planned(self, plan: Plan) -> None:
        self._board = Board(plan)
        self._say(intro(plan))

    def token(self, job: Job) -> None:
        pass

    def finished(self, job: Job) -> None:
        assert self._board is not None
        role = self._board.plan.services[job.role].role
        answer = " ".join(role.text(job.answer).split())
        self._console.print(f"  {role.name} #{job.index}: {answer[:150]}")

    def sampled(self, sample: Sample) -> None:
        assert self._board is not None
        self._board.sampled(sample)
        if time.monotonic() - self._last < PLAIN_SECONDS:
            return
        self._last = time.monotonic()
        services = self._board.plan.services
        models = [
            f"{one.role.name} {one.done}/{one.jobs} done, {model.running} running, {mib(model.physical)} MiB"
            for one, model in zip(services, sample.models)
        ]
        self._console.print(f"{self._board.status()} | {' | '.join(models)}")

    def checked(self, job: Job) -> None:
        assert self._board is not None
        if self._board.checked == 0:
            self._table()
            self._console.print("checking every answer against transformers' DynamicCache")
        self._board.checked += 1
        if self._board.checked % 8 == 0:
            self._console.print(f"  {self._board.checked}/{len(self._board.plan.jobs)} checked")

    def ended(self, result: Result) -> None:
        self._say(conclusion(result))

    def _say(self, lines: Iterator[str]) -> None:
        for line in lines:
            self._console.print(Text.from_markup(line).plain)

    def _table(self) -> None:
        assert self._board is not None
        table = Table(*self._board.columns)
        for row in self._board.rows():
            table.add_row(*row)
        self._console.print(table)
