"""A recording of a shared pool: what each model held, and in which state, against the limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from elastikv.errors import InvalidArgument
from elastikv.plots.memory import INK, note, require_matplotlib, tidy

if TYPE_CHECKING:
    from elastikv.timeline import TimelineSample

COLORS = ("#3b73b9", "#e8913a", "#4b9a6a", "#9463b0", "#c25b74", "#7f7f3f", "#3fa3ab", "#8a6a55")
RED = "#b3261e"
STATES = ("used", "retiring", "parked", "stranded")
SHADES = (0.95, 0.62, 0.32, 0.14)  # how much of the model's colour a state has
UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def plot_timeline(path: Path, samples: Sequence[TimelineSample], *, title: str = "Physical memory") -> None:
    """Draws samples, sorted by time, to an image file. Above: all models in the pool. Below: each with its states.

    Needs no display. Raises ImportError without matplotlib, InvalidArgument without samples.
    """
    if not samples:
        raise InvalidArgument("there is nothing to draw: the recording has no model in it")
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    moments = sorted({sample.seconds for sample in samples})
    names = list(dict.fromkeys(sample.model for sample in samples))
    at = {(sample.model, sample.seconds): sample for sample in samples}
    pool_limit = {sample.seconds: sample.pool_limit for sample in samples}
    top = max(pool_limit.values())
    scale, unit = next(((size, name) for size, name in UNITS if top >= size), (1, "bytes"))

    def line(model: str, field: str) -> list[float]:
        found = (at.get((model, moment)) for moment in moments)
        return [getattr(sample, field) / scale if sample else 0.0 for sample in found]

    rows = len(names)
    height = 3.1 + 1.55 * rows
    figure = Figure(figsize=(10, height), dpi=150, layout="constrained")
    pool, *panels = figure.subplots(1 + rows, 1, sharex=True, height_ratios=(2.3, *([1.2] * rows)))
    colors = [COLORS[index % len(COLORS)] for index in range(rows)]

    physical = [line(name, "physical") for name in names]
    pool.stackplot(moments, *physical, labels=names, colors=colors, step="post", linewidth=0, alpha=0.95)
    limits = [pool_limit[moment] / scale for moment in moments]
    pool.step(moments, limits, where="post", color=RED, linewidth=1.6)
    note(pool, limits[-1], f"physical limit {limits[-1]:.4g} {unit}", RED)
    pool.set_title(title, loc="left", color=INK, fontsize=13, pad=24)
    pool.legend(ncols=6, loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=9, borderaxespad=0.3)
    pool.set_ylim(0, max(limits) * 1.12)

    for axes, name, color, total in zip(panels, names, colors, physical):
        shades = [_shade(color, share) for share in SHADES]
        axes.stackplot(moments, *(line(name, state) for state in STATES), colors=shades, step="post", linewidth=0)
        axes.step(moments, total, where="post", color=color, linewidth=0.8)
        own = line(name, "limit")
        axes.set_ylim(0, max(max(total) * 1.25, max(limits) * 0.02))
        shown = [
            value if sample and sample.limit < sample.pool_limit else float("nan")
            for value, sample in zip(own, (at.get((name, moment)) for moment in moments))
        ]
        finite = [value for value in shown if value == value]
        if finite:
            axes.step(moments, shown, where="post", color=RED, linewidth=1.1, linestyle="--")
            axes.set_ylim(0, max(axes.get_ylim()[1], max(finite) * 1.22))
            note(axes, finite[-1], f"limit {finite[-1]:.4g} {unit}", RED)
        axes.set_title(name, loc="left", color=color, fontsize=10, fontweight="bold", pad=4)
    if panels:
        states = [Patch(facecolor=_shade("#555b66", share), label=state) for state, share in zip(STATES, SHADES)]
        panels[0].legend(
            handles=states, ncols=4, loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=8,
            borderaxespad=0.1, handlelength=1.2,
        )  # fmt: skip
        panels[-1].set_xlabel("seconds", color=INK)
    for axes in (pool, *panels):
        tidy(axes, unit)
        axes.set_xlim(moments[0], max(moments[-1], moments[0] + 1e-3))
    figure.savefig(path)


def _shade(color: str, share: float) -> tuple[float, float, float]:
    """The colour mixed with white."""
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return (1 - share * (1 - red), 1 - share * (1 - green), 1 - share * (1 - blue))
