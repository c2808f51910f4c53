"""Reads traces in the format of the Azure LLM inference dataset: TIMESTAMP, ContextTokens, GeneratedTokens."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from elastikv.errors import InvalidArgument

#: The trace that comes with the package. `scripts/make-trace` writes it anew.
DEFAULT_TRACE = Path(__file__).with_name("default.csv")

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class TraceRequest:
    """One request: seconds after the trace's first one, tokens of its prompt, tokens of its answer (both >= 1)."""

    arrival: float
    context_tokens: int
    generated_tokens: int


def read_trace(path: str | Path) -> list[TraceRequest]:
    """The trace's requests in the order of their arrival. Columns may stand in any order, others are ignored.

    Requests without a prompt or an answer are left out: there is nothing to serve. Raises InvalidArgument with file
    and line for what can't be read, OSError for a file that can't be opened.
    """
    rows: list[tuple[int, int, int]] = []  # nanoseconds, context, generated
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise InvalidArgument(f"{path}: no column {', '.join(missing)}; a trace has {', '.join(COLUMNS)}")
        for row in reader:
            try:
                moment = _nanoseconds(row["TIMESTAMP"])
                context, generated = _count(row["ContextTokens"]), _count(row["GeneratedTokens"])
            except (TypeError, ValueError) as wrong:
                raise InvalidArgument(f"{path}, line {reader.line_num}: {wrong}") from wrong
            if context and generated:
                rows.append((moment, context, generated))
    if not rows:
        raise InvalidArgument(f"{path}: a trace without requests")
    rows.sort(key=lambda row: row[0])
    start = rows[0][0]
    return [TraceRequest((moment - start) / 1e9, context, generated) for moment, context, generated in rows]


def scale_trace(
    requests: Sequence[TraceRequest],
    *,
    time_scale: float = 1.0,
    token_scale: float = 1.0,
    max_requests: int | None = None,
) -> list[TraceRequest]:
    """The first max_requests requests, with times and token counts multiplied; counts never fall below 1."""
    scales_fit = all(math.isfinite(scale) and scale > 0 for scale in (time_scale, token_scale))
    if not scales_fit or (max_requests is not None and max_requests < 1):
        raise InvalidArgument(
            f"time scale {time_scale}, token scale {token_scale} and {max_requests} requests must all be finite and "
            "above 0"
        )

    def scaled(tokens: int) -> int:
        return max(round(tokens * token_scale), 1)

    return [
        replace(
            request,
            arrival=request.arrival * time_scale,
            context_tokens=scaled(request.context_tokens),
            generated_tokens=scaled(request.generated_tokens),
        )
        for request in requests[:max_requests]
    ]


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError(f"{number} tokens")
    return number


def _nanoseconds(text: str) -> int:
    """Of `2023-11-16 18:17:03.9799600` or `...+00:00`, since 1970. Datetimes keep six digits, traces have seven."""
    text = text.strip()
    seconds, dot, rest = text.partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    moment = datetime.fromisoformat(seconds + rest[len(digits) :])
    if dot and not 1 <= len(digits) <= 9:
        raise ValueError(f"timestamp {text!r}")
    since = moment.replace(tzinfo=moment.tzinfo or timezone.utc) - datetime(1970, 1, 1, tzinfo=timezone.utc)
    return (since.days * 86400 + since.seconds) * 10**9 + int(digits.ljust(9, "0"))
