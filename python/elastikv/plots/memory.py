"""Physical bytes over time, per model, against the limit and a static split of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastikv.demo.accounting import Sample

COLORS = ("#3b73b9", "#e8913a")
INK = "#30343b"
MIB = 1 << 20


def require_matplotlib() -> None:
    """Raises ImportError that says what to install."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as missing:
        raise ImportError("pictures need matplotlib: pip install 'elastikv[plots]'") from missing


def plot_memory(path: Path, samples: Sequence[Sample], names: Sequence[str], *, limit: int) -> None:
    """Draws two models' samples to an image file. Above: both in their pool. Below: each against half of the limit.

    limit in bytes. Needs no display.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    seconds = [sample.seconds for sample in samples]
    physical = [[sample.models[i].physical / MIB for sample in samples] for i in range(len(names))]
    top, half = limit / MIB, limit / len(names) / MIB

    figure = Figure(figsize=(10, 6.6), dpi=150, layout="constrained")
    pool, split = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))

    pool.stackplot(seconds, *physical, labels=names, colors=COLORS, step="post", linewidth=0, alpha=0.9)
    others = {"StaticCache would hold": ("static_cache", ":"), "DynamicCache would hold": ("dynamic_cache", "--")}
    for label, (field, style) in others.items():
        line = [sum(getattr(model, field) for model in sample.models) / MIB for sample in samples]
        pool.step(seconds, line, where="post", color=INK, linestyle=style, linewidth=1.1, label=label)
    pool.axhline(top, color="#b3261e", linewidth=1.6)
    note(pool, top, f"limit {top:.0f} MiB", "#b3261e")
    pool.set_title("Physical memory of two models' KV caches in one pool", loc="left", color=INK, fontsize=13, pad=26)
    pool.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=9, borderaxespad=0.3)

    for line, name, color in zip(physical, names, COLORS):
        split.step(seconds, line, where="post", color=color, linewidth=1.8, label=name)
        over = [value > half for value in line]
        split.fill_between(seconds, line, half, where=over, step="post", color=color, alpha=0.35, linewidth=0)
    split.axhline(half, color="#b3261e", linewidth=1.2, linestyle="--")
    note(split, half, f"static half {half:.0f} MiB", "#b3261e")
    split.set_xlabel("seconds of the trace", color=INK)

    for axes in (pool, split):
        axes.set_xlim(0, max(seconds[-1], 1))
        axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.06)
        tidy(axes, "MiB")
    figure.savefig(path)


def tidy(axes: Any, unit: str) -> None:
    """The house's look: a faint grid, no frame but the floor."""
    axes.set_ylabel(unit, color=INK)
    axes.grid(axis="y", color="#d9dce1", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def note(axes: Any, height: float, text: str, color: str) -> None:
    """A word at the right end of a horizontal line."""
    axes.annotate(
        text, (1, height), xycoords=("axes fraction", "data"), xytext=(-4, 3), textcoords="offset points",
        ha="right", va="bottom", color=color, fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.5},
    )  # fmt: skip
