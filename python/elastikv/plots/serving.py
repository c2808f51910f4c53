"""Times to the first token, of several ways to serve the same trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from elastikv.plots.memory import INK, require_matplotlib
from elastikv.trace.outcome import Outcome

COLORS = ("#3b73b9", "#e8913a", "#5a9e6f", "#8d6bb0")


def plot_first_tokens(path: Path, panels: Mapping[str, Mapping[str, Sequence[Outcome]]]) -> None:
    """For each panel, what share of its requests had their first token within so many seconds, by way. No display."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.2 * len(panels), 6), 4.4), dpi=150, layout="constrained")
    for axes, (title, ways) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for color, (name, outcomes) in zip(COLORS, ways.items()):
            firsts = sorted(one.first_token_seconds for one in outcomes if one.first_token_seconds is not None)
            shares = [100 * (index + 1) / len(outcomes) for index in range(len(firsts))]
            axes.step(firsts, shares, where="post", color=color, linewidth=1.8, label=name)
        axes.set_xscale("log")
        axes.set_ylim(0, 102)
        axes.set_title(title, loc="left", color=INK, fontsize=11)
        axes.set_xlabel("seconds to the first token", color=INK)
        axes.set_ylabel("% of all requests", color=INK)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(path)
