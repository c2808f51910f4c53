"""Request traces: when requests come, how long their prompts are, and how many tokens they get."""

from elastikv.trace.reader import DEFAULT_TRACE, TraceRequest, read_trace, scale_trace

__all__ = ["DEFAULT_TRACE", "TraceRequest", "read_trace", "scale_trace"]
