"""Sizes as people write and read them. Units are powers of 1024."""

from __future__ import annotations

import re

import typer

_UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def parse_size(text: str, *, zero: bool = False) -> int:
    """Bytes of `96MiB`, `1.5 GiB`, `64M` or `123456`. Raises typer.BadParameter, for 0 as well unless `zero`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(?:i?[bB])?\s*", text)
    size = int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " ")) if match else -1
    if size < (0 if zero else 1):
        raise typer.BadParameter(f"{text!r} is not a size: write 96MiB or 1.5GiB")
    return size


def short_size(size: float) -> str:
    """As `1.5 GiB`, in four digits at most."""
    for unit, name in _UNITS:
        if abs(size) >= unit:
            return f"{size / unit:.{1 if abs(size) < 100 * unit else 0}f} {name}"
    return f"{size:.0f} B"


def count(number: int, noun: str) -> str:
    """As `1 process` or `3 processes`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"
