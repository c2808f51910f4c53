"""Request traces: when requests come, how long their prompts are, and how many tokens they get."""

from elastikv.trace.outcome import Outcome, summary
from elastikv.trace.reader import DEFAULT_TRACE, TraceRequest, read_trace, scale_trace
from elastikv.trace.turns import model_of

__all__ = ["DEFAULT_TRACE", "Outcome", "TraceRequest", "model_of", "read_trace", "scale_trace", "summary"]
