"""Refuses a torch that the extension module was not built for, before it is loaded and crashes."""

from __future__ import annotations

from elastikv import _build_info


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def check_torch(running: str) -> None:
    """Raises ImportError unless `running`, torch's version, has the minor version that this copy was built for.

    torch's C++ interface changes between minor versions, so a module built for another fails with a missing symbol at
    best.
    """
    built = _build_info.TORCH_VERSION
    if _minor(running) != _minor(built):
        raise ImportError(
            f"this elastikv was built for torch {_minor(built)} (exactly {built}), and torch {running} is running. "
            "Rebuild it against this torch: pip install --no-build-isolation --force-reinstall --no-deps elastikv "
            "(from a clone: the same with '.')."
        )
