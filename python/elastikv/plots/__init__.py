"""Pictures. matplotlib comes in when one is drawn."""

from elastikv.plots.memory import plot_memory, require_matplotlib
from elastikv.plots.timeline import plot_timeline

__all__ = ["plot_memory", "plot_timeline", "require_matplotlib"]
