"""What the models of a shared pool held over time: recorded while a run goes on, kept as a CSV file and a picture.

>>> with shared.timeline() as timeline:
...     serve()
>>> timeline.to_csv("run.csv")
>>> timeline.plot("run.png")  # needs matplotlib: pip install 'elastikv[plots]'
"""

from __future__ import annotations

import csv
from itertools import islice
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from elastikv._core import SharedMemoryPool

COLUMNS = ("seconds", "model", "used", "retiring", "parked", "stranded", "limit", "pool_limit")
MOST_INSTANTS = 20_000


class TimelineSample(NamedTuple):
    """One model at one moment; bytes. used + retiring + parked + stranded is its physical memory."""

    seconds: float  # since the recording began
    model: str
    used: int
    retiring: int
    parked: int
    stranded: int
    limit: int  # the model's
    pool_limit: int  # physical_limit of the pool

    @property
    def physical(self) -> int:
        return self.used + self.retiring + self.parked + self.stranded


class Timeline:
    """A recording, which begins when it is made and ends with `stop()`, or with the `with` block.

    One thread of its own reads the pool every `interval` seconds and needs no GIL; a pool that nobody records pays
    nothing. Memory is bounded: after 20,000 readings every second one is dropped and the interval doubles, so that a
    recording of any length covers all of it. Models are read one after the other, so a sum over them may be off by
    what moved between two readings. Thread safe. Keeps the pool alive until it is stopped.

    Raises InvalidArgument unless 0 < interval <= 86400.
    """

    def __init__(self, pool: SharedMemoryPool, interval: float = 0.01) -> None:
        from elastikv._core import TimelineRecorder

        self.device = pool.device
        self._recorder = TimelineRecorder(pool, interval, MOST_INSTANTS)

    def stop(self) -> None:
        """Takes a last reading and ends the recording. Calling it again does nothing."""
        self._recorder.stop()

    def __enter__(self) -> Timeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        return self._recorder.running

    def samples(self) -> list[TimelineSample]:
        """All readings so far, by time; at each moment one of every model that the pool had then."""
        models, instants, rows = self._recorder.recording()
        samples = []
        rest = iter(rows)
        for seconds, pool_limit, count in instants:
            for model, used, retiring, parked, stranded, limit in islice(rest, count):
                sizes = (used, retiring, parked, stranded)
                samples.append(TimelineSample(seconds, models[model], *sizes, limit, pool_limit))
        return samples

    def to_csv(self, path: str | PathLike[str]) -> Path:
        """Writes `samples()`, one a line, with the names of the fields in the first; returns the path."""
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for sample in self.samples():
                writer.writerow((f"{sample.seconds:.6f}", *sample[1:]))
        return Path(path)

    def plot(self, path: str | PathLike[str]) -> Path:
        """Draws the recording to an image file, its format by the name's ending; returns the path.

        Raises ImportError where matplotlib is missing, InvalidArgument where no model was there to be read.
        """
        from elastikv.plots import plot_timeline

        plot_timeline(Path(path), self.samples(), title=f"Physical memory on {self.device}")
        return Path(path)
