"""What became of a trace's requests, in numbers that two ways of serving can be compared by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: A request that had to wait: its first token came later than this after it was due, in seconds.
WAITED = 1.0


@dataclass(frozen=True)
class Outcome:
    """One request: seconds after the replay's start. first and end are None where it was refused or failed."""

    due: float
    first: float | None
    end: float | None
    tokens: int
    model: int = 0

    @property
    def first_token_seconds(self) -> float | None:
        """From when it was due, not from when somebody looked at it."""
        return None if self.first is None else self.first - self.due


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that a share of all, 0 to 1, does not pass; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def summary(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Requests served, refused and kept waiting; tokens a second; p50 and p99 of the time to the first token."""
    firsts = [one.first_token_seconds for one in outcomes if one.first_token_seconds is not None]
    ends = [one.end for one in outcomes if one.end is not None]
    tokens = sum(one.tokens for one in outcomes)
    span = max(ends, default=0.0) - min((one.due for one in outcomes), default=0.0)
    return {
        "requests": len(outcomes),
        "served": len(ends),
        "refused": len(outcomes) - len(ends),
        "waited": sum(first > WAITED for first in firsts),
        "tokens": tokens,
        "seconds": span,
        "tokens_per_second": tokens / span if span > 0 else 0.0,
        "first_token_p50": percentile(firsts, 0.5),
        "first_token_p99": percentile(firsts, 0.99),
    }
