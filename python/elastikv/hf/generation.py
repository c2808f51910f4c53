"""Prompts in, answers out: prefill in chunks, then a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from elastikv.errors import InvalidArgument
from elastikv.hf.forward import require_attention, run_step
from elastikv.hf.sampling import Sampling
from elastikv.hf.step import RaggedStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from elastikv.hf.cache import ElasticCache
    from elastikv.hf.slots import Slots

#: Prompt tokens of a row that the model takes at a time: bounds what the activations take.
CHUNK = 4096


def prefill(
    model: Any, slots: Slots, rows: Sequence[int], tokens: torch.Tensor, real: torch.Tensor, *, chunk: int = CHUNK
) -> torch.Tensor:
    """Stores prompts ``[row, token]``; returns the logits ``[row, vocabulary]`` of each row's last token.

    real: boolean on the CPU, like tokens: false where a token is padding, which is not stored. The last of each row is
    real.
    Memory for all of it is claimed first, so in few pieces, or OutOfPhysicalMemory is raised and nothing has changed.
    An error of the model leaves the chunks before it stored.
    """
    slots.reserve(rows, real.sum(1).tolist())
    logits = torch.empty(0)
    for begin in range(0, tokens.shape[1], chunk):
        part = slice(begin, begin + chunk)
        if not real[:, part].any():
            continue
        step = RaggedStep(slots, rows, real=real[:, part])
        logits = run_step(model, step, tokens[:, part], step.positions())
        step.commit()
    return logits[:, -1]


def generate(
    model: PreTrainedModel,
    inputs: torch.Tensor,
    cache: ElasticCache,
    *,
    attention_mask: torch.Tensor | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[int] | None = None,
    pad: int | None = None,
    seed: int | None = None,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Answers ``[batch, prompt + new tokens]`` to prompts ``[batch, prompt]``, as ``model.generate`` gives them.

    The cache may hold the front of the prompts already, from an earlier turn. attention_mask: false or 0 where a prompt
    is padded; padding is not stored. temperature 0 is greedy. stop: tokens that end a sequence, by default the model's;
    after them comes pad. On CUDA decoding replays graphs, which the cache keeps for the next call.

    Raises InvalidArgument, OutOfPhysicalMemory; the cache then holds what it held, and what was stored of the prompts.
    """
    sampling = Sampling(temperature, top_k, top_p)
    require_attention(getattr(model, "_orig_mod", model))
    batch, count = cache._batch, len(inputs)
    if inputs.ndim != 2 or inputs.numel() == 0 or max_new_tokens < 1 or chunk < 1:
        raise InvalidArgument(
            f"prompts {list(inputs.shape)}, max_new_tokens={max_new_tokens}, chunk={chunk}: need something to do"
        )
    batch.start_rows(count, model.dtype)
    new = _not_stored(inputs, attention_mask, batch.slots.lengths[:count])
    longest = max(held + more for held, more in zip(batch.slots.lengths, new.sum(1).tolist())) + max_new_tokens - 1
    if longest > cache.max_tokens:
        raise InvalidArgument(
            f"{longest} tokens, prompt and answer, do not fit a cache of max_tokens={cache.max_tokens}"
        )
    stops, pad = _ends(model, stop, pad)
    begin = int(new.any(0).nonzero()[0])
    with torch.inference_mode():
        try:
            original = getattr(model, "_orig_mod", model)  # prompts have any length: not worth compiling for
            logits = prefill(original, batch.slots, range(count), inputs[:, begin:], new[:, begin:], chunk=chunk)
        except BaseException:
            batch.slots.crop(range(count), batch.slots.lengths[:count])  # memory of chunks that did not come
            raise
        finally:
            batch.adopt_rows(count, 0)
        decoder = cache.decoder(model, sampling=sampling, capacity=max_new_tokens)
        if seed is None and sampling.temperature and batch.slots.ranks is None:
            seed = int(torch.randint(1 << 62, ()))  # from torch's generator, so that its seed decides
        decoder.start(logits, limits=[max_new_tokens] * count, stop=stops, pad=pad, sampling=sampling, seed=seed)
    steps = 1
    try:
        while steps < max_new_tokens and not decoder.all_ended:
            decoder.step()
            steps += 1
    finally:
        made = max(decoder.finish())
        batch.adopt_rows(count, inputs.shape[1] + made - 1)
    return torch.cat([inputs, decoder.history[:, :made].to(inputs.dtype)], dim=1)


def _not_stored(inputs: torch.Tensor, mask: torch.Tensor | None, held: Sequence[int]) -> torch.Tensor:
    """True where a token is real and not yet in the slots, of which row i holds the first held[i] real ones."""
    real = torch.ones(inputs.shape, dtype=torch.bool) if mask is None else mask.to(device="cpu", dtype=torch.bool)
    if real.shape != inputs.shape:
        raise InvalidArgument(f"attention_mask {list(real.shape)} for prompts {list(inputs.shape)}")
    new = real & (real.cumsum(1) > torch.tensor(held).unsqueeze(1))
    if not bool(new[:, -1].all()):
        raise InvalidArgument(
            "each prompt must end with a token that the cache does not hold; padding goes on the left"
        )
    return new


def _ends(model: PreTrainedModel, stop: Sequence[int] | None, pad: int | None) -> tuple[list[int], int]:
    """The tokens that end a sequence, and what follows them."""
    settings = model.generation_config
    ends = getattr(settings, "eos_token_id", None) if stop is None else list(stop)
    stops = [ends] if isinstance(ends, int) else list(ends or [])
    if pad is None:
        pad = getattr(settings, "pad_token_id", None)
    return stops, pad if pad is not None else stops[0] if stops else 0
