"""Pictures. matplotlib comes in when one is drawn."""

from elastikv.plots.memory import plot_memory, require_matplotlib

__all__ = ["plot_memory", "require_matplotlib"]
