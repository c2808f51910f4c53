"""Taking prompts in, a chunk at a time, and the first token that follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from elastikv.hf.forward import run_step
from elastikv.hf.slots import Slots
from elastikv.hf.step import RaggedStep
from elastikv.serving.choice import Choice, Kind
from elastikv.serving.request import Request


class Prompts:
    """Runs the model on what rows do not hold yet: prompts, and what restarted requests have of their answers."""

    def __init__(self, model: Any, slots: Slots, vocabulary: int, chunk: int) -> None:
        self.slots = slots
        self.tokens = 0  # taken in so far
        self._model = model
        self._vocabulary = vocabulary
        self._chunk = chunk
        self._choices: dict[Kind, Choice] = {}

    def choose(self, requests: Sequence[Request]) -> list[Request]:
        """The first, and those behind it that fit into the same chunk, padded to one width."""
        rows: list[Request] = []
        width = 0
        for request in requests:
            width = max(width, min(request.known - request.stored, self._chunk))
            if rows and width * (len(rows) + 1) > self._chunk:
                break
            rows.append(request)
        return rows

    def run(self, requests: Sequence[Request]) -> list[torch.Tensor]:
        """Stores a chunk of each; the logits ``[1, vocabulary]`` that follow. Raises what the model does, unchanged."""
        parts = [request.tokens[request.stored :][: self._chunk] for request in requests]
        step = RaggedStep(self.slots, [request.row for request in requests], [len(part) for part in parts])
        padded = torch.tensor([[0] * (step.width - len(part)) + list(part) for part in parts])
        logits = run_step(self._model, step, padded.to(self.slots.device), step.positions())
        step.commit()
        for request, part in zip(requests, parts):
            request.stored += len(part)
            self.tokens += len(part)
        return list(logits.unbind(0))

    def first(self, request: Request, logits: torch.Tensor) -> int:
        """The token that follows all that the request has. Waits for the device."""
        kind = Kind.of(request.asked)
        if kind not in self._choices:
            self._choices[kind] = Choice(kind, 1, self._vocabulary, self.slots.device)
        choice = self._choices[kind]
        choice.set(0, request.asked, request.answer)
        return int(choice(logits, torch.tensor([request.stored - 1], device=self.slots.device)))
