"""Choosing next tokens where each row has its own settings, in a way that a CUDA graph can hold."""

from __future__ import annotations

from typing import NamedTuple

import torch

from elastikv.hf.sampling import likeliest
from elastikv.serving.request import Asked

_MIX = (0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


class Kind(NamedTuple):
    """What a step's choice has to do; what no row asks for costs nothing."""

    draws: bool = False
    penalties: bool = False

    @classmethod
    def of(cls, asked: Asked) -> Kind:
        return cls(asked.sampling.temperature > 0, asked.repetition_penalty != 1.0)

    def __or__(self, other: object) -> Kind:
        assert isinstance(other, Kind)
        return Kind(self.draws or other.draws, self.penalties or other.penalties)


class Choice:
    """Settings by row, in device memory. A draw follows from the row's seed and the token's position alone.

    So an answer does not depend on who else is in the batch, nor on whether it was computed in one go.
    """

    def __init__(self, kind: Kind, rows: int, vocabulary: int, device: torch.device) -> None:
        self.kind = kind
        with torch.inference_mode(False):
            self._temperature = torch.ones(rows, 1, device=device)
            self._top_p = torch.ones(rows, 1, device=device)
            self._top_k = torch.ones(rows, 1, dtype=torch.int64, device=device)
            self._seed = torch.zeros(rows, 1, dtype=torch.int64, device=device)
            self._penalty = torch.ones(rows, 1, device=device)
            self._said = torch.zeros(rows if kind.penalties else 0, vocabulary, dtype=torch.bool, device=device)
            self._ranks = torch.arange(vocabulary, dtype=torch.int64, device=device)

    def set(self, row: int, asked: Asked, answer: list[int]) -> None:
        """The row goes by these settings from now on. answer: the tokens that it has already."""
        sampling = asked.sampling
        greedy = sampling.temperature == 0
        self._temperature[row] = 1.0 if greedy else sampling.temperature
        self._top_p[row] = 1.0 if sampling.top_p is None else sampling.top_p
        self._top_k[row] = 1 if greedy else min(sampling.top_k or len(self._ranks), len(self._ranks))
        self._seed[row] = asked.seed
        self._penalty[row] = asked.repetition_penalty
        if self.kind.penalties:
            self._said[row] = False
            self._said[row, torch.tensor(answer, dtype=torch.int64, device=self._said.device)] = True

    def mark(self, tokens: torch.Tensor) -> None:
        """These, ``[row, 1]``, belong to the answers."""
        if self.kind.penalties:
            self._said.scatter_(1, tokens, True)

    def __call__(self, logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Tokens ``[row]`` for logits ``[row, vocabulary]`` of the tokens at these positions, ``[row]``."""
        if self.kind.penalties:
            scaled = torch.where(logits > 0, logits / self._penalty, logits * self._penalty).to(logits.dtype)
            logits = torch.where(self._said, scaled, logits)
        if not self.kind.draws:
            return likeliest(logits)
        scores, tokens = (logits.float() / self._temperature).sort(dim=-1, descending=True, stable=True)
        shares = scores.masked_fill(self._ranks >= self._top_k, -torch.inf).softmax(-1)
        shares = shares.masked_fill(shares.cumsum(-1) - shares >= self._top_p, 0.0)
        # The one with the earliest arrival, at a rate of its share.
        arrivals = -self._uniform(positions.to(torch.int64).unsqueeze(1)).log()
        chosen = (shares / arrivals).argmax(-1, keepdim=True)
        return tokens.gather(-1, chosen).squeeze(-1)

    def _uniform(self, positions: torch.Tensor) -> torch.Tensor:
        """Above 0 and below 1, ``[row, rank]``: splitmix64 of seed, position and rank."""
        mixed = _splitmix(_splitmix(self._seed + positions * _MIX[0]) + self._ranks * _MIX[0])
        return ((mixed >> 40) & 0xFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-24)


def _splitmix(numbers: torch.Tensor) -> torch.Tensor:
    # Signed integers wrap as unsigned ones do; only the shift needs its upper bits cleared.
    numbers = (numbers ^ ((numbers >> 30) & ((1 << 34) - 1))) * _MIX[1]
    numbers = (numbers ^ ((numbers >> 27) & ((1 << 37) - 1))) * _MIX[2]
    return numbers ^ ((numbers >> 31) & ((1 << 33) - 1))
