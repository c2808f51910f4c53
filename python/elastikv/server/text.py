"""Tokens to text and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Texts:
    """A model's tokenizer; without one, a byte is a token (its value plus 3), so that any text can be asked."""

    def __init__(self, tokenizer: Any | None, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary

    def encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            return [3 + byte % (self._vocabulary - 3) for byte in text.encode()]
        return [int(token) for token in self._tokenizer(text)["input_ids"]]

    def decode(self, tokens: Sequence[int]) -> str:
        if self._tokenizer is None:
            return "".join(chr(32 + token % 95) for token in tokens)
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


class Stream:
    """An answer's text, as its tokens come: `add` returns what is new, and says by `stopped` when a stop has come.

    What may still change is held back: the beginning of a character of several tokens, or of a stop.
    """

    def __init__(self, texts: Texts, stops: Sequence[str]) -> None:
        self.text = ""  # all that was handed out
        self.stopped = False
        self._texts = texts
        self._stops = [stop for stop in stops if stop]
        self._tokens: list[int] = []
        self._from = 0  # tokens before are out, and needed only as what stands before the next
        self._until = 0
        self._held = ""

    def add(self, token: int) -> str:
        if self.stopped:
            return ""
        self._tokens.append(token)
        before = self._texts.decode(self._tokens[self._from : self._until])
        now = self._texts.decode(self._tokens[self._from :])
        if now.endswith("\ufffd"):
            return ""
        self._from, self._until = self._until, len(self._tokens)
        return self._pass(now[len(before) :])

    def end(self) -> str:
        """No more tokens come: what was held back."""
        if self.stopped:
            return ""
        before = self._texts.decode(self._tokens[self._from : self._until])
        rest = self._texts.decode(self._tokens[self._from :])[len(before) :]
        self._until = len(self._tokens)
        out = self._pass(rest)
        held, self._held = self._held, ""
        self.text += held
        return out + held

    def _pass(self, new: str) -> str:
        held = self._held + new
        found = [place for place in (held.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped = True
            out, self._held = held[: min(found)], ""
        else:
            keep = max((_overlap(held, stop) for stop in self._stops), default=0)
            out, self._held = held[: len(held) - keep], held[len(held) - keep :]
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """How many characters at the text's end may be the beginning of the stop."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
