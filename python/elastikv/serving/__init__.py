"""Serving requests from slots: continuous batching, shared prefixes, several models on one pool.

request    what was asked, and what has come of it
engine     the public face: submit, step, close; one a model
scheduler  who waits, who computes, who makes way
prompts    taking prompts in, a chunk at a time
lanes      the rows that decode together
choice     the next token, by each row's own settings
prefix     rows that are kept for those who share a prefix
runner     threads that take the steps, or the caller's own
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastikv.hf.sampling import Sampling
    from elastikv.serving.engine import Engine
    from elastikv.serving.request import Finish, Request, State
    from elastikv.serving.runner import Runner, run_until_idle

__all__ = ["Engine", "Finish", "Request", "Runner", "Sampling", "State", "run_until_idle"]

_HOMES = {
    "Engine": "engine",
    "Finish": "request",
    "Request": "request",
    "Runner": "runner",
    "State": "request",
    "run_until_idle": "runner",
}


def __getattr__(name: str) -> Any:
    if name == "Sampling":
        from elastikv import hf

        return hf.Sampling
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    from elastikv import hf

    hf.register  # noqa: B018 (says what is missing where transformers is)
    value = getattr(importlib.import_module(f"elastikv.serving.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
