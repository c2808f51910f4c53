"""Calling a model: what its forward takes, from one version of transformers to the next."""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from elastikv.errors import InvalidArgument
from elastikv.hf.attention import NAME

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from elastikv.hf.step import Step


@cache
def cache_argument(model_class: type) -> str:
    """What the class' forward calls its cache: ``cache``, or ``past_key_values`` before transformers 5.2x."""
    parameters = inspect.signature(model_class.forward).parameters  # type: ignore[attr-defined]
    return "cache" if "cache" in parameters else "past_key_values"


@cache
def _takes_logits_to_keep(model_class: type) -> bool:
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters  # type: ignore[attr-defined]


def require_attention(model: PreTrainedModel) -> None:
    """Raises InvalidArgument unless the model computes its attention by our function."""
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    if implementation != NAME:
        raise InvalidArgument(
            f"the model's attention is {implementation!r}; steps over slots need "
            f"model.set_attn_implementation({NAME!r})"
        )


def run_step(
    model: Any, step: Step, tokens: torch.Tensor, positions: torch.Tensor, *, last_only: bool = True
) -> torch.Tensor:
    """The model's logits ``[row, token, vocabulary]`` for a step, by default only the last token's.

    tokens and positions: ``[row, token]``. The model sees no cache and no mask: attention learns of the step by its
    handle, and a mask of four dimensions makes transformers build none. model may be a compiled one.
    """
    kind: Any = type(getattr(model, "_orig_mod", model))
    options: dict[str, Any] = {"logits_to_keep": 1} if last_only and _takes_logits_to_keep(kind) else {}
    output = model(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=step.slots.no_mask,
        use_cache=False,
        elastikv=step.handle,
        **options,
    )
    logits: torch.Tensor = output.logits
    return logits[:, -1:] if last_only else logits
