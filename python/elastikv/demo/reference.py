"""A greedy step of transformers by itself, which the answers are checked against."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


#: Logits of tokens that the answer has already are divided by it (multiplied below 0): small models repeat themselves.
REPETITION_PENALTY = 1.2


def next_token(model: PreTrainedModel, prompt: list[int], answer: list[int], cache: Cache) -> int:
    """Runs the model on what the cache does not hold yet, the prompt or the answer's last token; the likeliest next."""
    with torch.inference_mode():
        inputs = torch.tensor([answer[-1:] or prompt], device=model.device)
        logits = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        said = torch.tensor(sorted(set(answer)), dtype=torch.long, device=logits.device)
        scores = logits[said]
        logits[said] = torch.where(scores > 0, scores / REPETITION_PENALTY, scores * REPETITION_PENALTY)
        return int(logits.argmax())


@contextmanager
def threads_that_pay(model: PreTrainedModel) -> Iterator[None]:
    """Within it, torch computes with all its CPU threads or with one, as a short request each decides.

    A small model is bound by memory, and its steps are short: threads that wait for each other may cost more than they
    bring, above all where other programs run too. So all of them have to be clearly faster.
    """
    most = torch.get_num_threads()
    try:
        if model.device.type == "cpu" and most > 1:
            seconds = {}
            for threads in (1, most, 1, most):  # each a second time, now warm
                torch.set_num_threads(threads)
                begin = time.monotonic()
                cache, answer = DynamicCache(config=model.config), list[int]()
                while len(answer) < 6:
                    answer.append(next_token(model, [3] * 36, answer, cache))
                seconds[threads] = time.monotonic() - begin
            torch.set_num_threads(most if seconds[most] * 1.25 < seconds[1] else 1)
        yield
    finally:
        torch.set_num_threads(most)
