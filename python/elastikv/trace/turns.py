"""Which of several models a trace's request goes to: they are busy in turn, so their peaks come one after another."""

from __future__ import annotations

from elastikv.errors import InvalidArgument

#: One request in so many goes to a model that is quiet just now.
CROSSING = 6


def model_of(index: int, arrival: float, *, models: int, shift: float) -> int:
    """For `shift` seconds most requests go to one model, then to the next, and so on round."""
    if models < 1 or not shift > 0:
        raise InvalidArgument(f"{models} models that take turns every {shift} seconds: both must be above 0")
    busy = int(arrival / shift) % models
    if models == 1 or index % CROSSING != CROSSING - 1:
        return busy
    return (busy + 1 + index // CROSSING % (models - 1)) % models
