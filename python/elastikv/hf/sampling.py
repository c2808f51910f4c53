"""Choosing the next token on the device, in a way that a CUDA graph can hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elastikv import _core
from elastikv.errors import InvalidArgument
from elastikv.hf import kernels


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else at random.

    As in transformers, the temperature comes first, then the top_k likeliest are kept, then the likeliest that together
    have top_p of the rest's probability.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InvalidArgument(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise InvalidArgument(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InvalidArgument(f"top_p must be above 0 and at most 1, not {self.top_p}")

    @property
    def kind(self) -> tuple[bool, int | None, bool]:
        """What a graph is captured for; temperature and top_p themselves may change between replays."""
        greedy = self.temperature == 0
        return greedy, None if greedy else self.top_k, not greedy and self.top_p is not None


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The first of the likeliest tokens, ``[row]``, of logits ``[row, vocabulary]``."""
    if kernels.serve(logits) and logits.shape[-1] % 8 == 0:
        return _core.fused_argmax(logits)
    return logits.argmax(-1)


class Sampler:
    """Samples rows of logits by its settings, which live in device memory, with a generator of its own."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._kind = sampling.kind
        with torch.inference_mode(False):
            self._settings = torch.ones(2, dtype=torch.float32, device=device)
        self.generator = torch.Generator(device)
        self.set(sampling)

    def set(self, sampling: Sampling, seed: int | None = None) -> None:
        """Other values of the same kind. With a seed, the same draws come again."""
        if sampling.kind != self._kind:
            raise InvalidArgument(f"this sampler was made for {self._kind}, not {sampling.kind}")
        self._settings[0] = sampling.temperature or 1.0
        self._settings[1] = 1.0 if sampling.top_p is None else sampling.top_p
        if seed is not None:
            self.generator.manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Tokens ``[row]`` for logits ``[row, vocabulary]``. Waits for nothing."""
        greedy, top_k, by_share = self._kind
        if greedy:
            return likeliest(logits)
        scores = logits.float() / self._settings[0]
        tokens: torch.Tensor | None = None
        if top_k is not None:
            scores, tokens = scores.topk(min(top_k, scores.shape[-1]), dim=-1)
        elif by_share:
            scores, tokens = scores.sort(dim=-1, descending=True)
        shares = scores.softmax(-1)
        if by_share:  # what the likelier ones have by themselves is enough
            shares = shares.masked_fill(shares.cumsum(-1) - shares >= self._settings[1], 0.0)
        # The one with the earliest arrival, at a rate of its share: a draw without a look at the sum.
        arrivals = torch.empty_like(shares).exponential_(generator=self.generator).clamp_min_(1e-30)
        chosen = (shares / arrivals).argmax(-1, keepdim=True)
        return (chosen if tokens is None else tokens.gather(-1, chosen)).squeeze(-1)
