"""OpenAI's completions: what a request may ask for, and what an answer looks like."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any

from elastikv.errors import InvalidArgument
from elastikv.hf.sampling import Sampling
from elastikv.server.text import Texts
from elastikv.serving.request import Finish, Request

REASONS = {Finish.STOP: "stop", Finish.LENGTH: "length", Finish.CANCELLED: "stop", Finish.DEADLINE: "length"}
# What we do not do is refused, unless it is asked for in the one way that makes no difference.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1), "best_of": (None, 1), "echo": (None, False), "logprobs": (None,), "suffix": (None, ""),
    "presence_penalty": (None, 0), "frequency_penalty": (None, 0), "logit_bias": (None, {}),
}  # fmt: skip


@dataclass(frozen=True)
class Completion:
    """A request, read. timeout: seconds, beyond OpenAI's, as are repetition_penalty, top_k and ignore_eos."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    seed: int | None
    repetition_penalty: float
    stops: list[str]
    ignore_eos: bool
    timeout: float | None
    stream: bool
    usage_in_stream: bool

    @classmethod
    def read(cls, body: Any, texts: Texts) -> Completion:
        """Raises InvalidArgument that says what was wrong."""
        if not isinstance(body, dict):
            raise InvalidArgument("the body must be a JSON object")
        for name, neutral in NEUTRAL.items():
            if body.get(name) not in neutral:
                raise InvalidArgument(f"{name}={body[name]!r} is not supported")
        stop = body.get("stop")
        stops = [stop] if isinstance(stop, str) else stop or []
        if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(one, str) for one in stops):
            raise InvalidArgument("stop must be a string or up to 4 of them")
        options = body.get("stream_options") or {}
        temperature, top_p = _number(body, "temperature", 1.0), _number(body, "top_p", 1.0)
        return cls(
            prompt=_prompt(body.get("prompt"), texts),
            max_tokens=_integer(body, "max_tokens", 16),
            sampling=Sampling(temperature, _integer(body, "top_k", None), None if top_p == 1 else top_p),
            seed=_integer(body, "seed", None),
            repetition_penalty=_number(body, "repetition_penalty", 1.0),
            stops=stops,
            ignore_eos=bool(body.get("ignore_eos", False)),
            timeout=_number(body, "timeout", None),
            stream=bool(body.get("stream", False)),
            usage_in_stream=isinstance(options, dict) and bool(options.get("include_usage", False)),
        )


class Shape:
    """The JSON of one answer, whole or in pieces."""

    def __init__(self, model: str) -> None:
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def piece(self, text: str, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        return {**self._head, "choices": [choice]}

    def usage(self, request: Request) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage(request)}

    def whole(self, text: str, reason: str, request: Request) -> dict[str, Any]:
        return {**self.piece(text, reason), "usage": usage(request)}


def usage(request: Request) -> dict[str, Any]:
    prompt, answer = len(request.asked.prompt), len(request.answer)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": request.prefix_tokens},
    }


def error(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _prompt(prompt: Any, texts: Texts) -> list[int]:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"prompt is no text: {error}") from error
        return texts.encode(prompt)
    if isinstance(prompt, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
        return prompt
    raise InvalidArgument("prompt must be one string or one list of token ids")


def _number(body: dict[str, Any], name: str, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidArgument(f"{name} must be a number, not {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise InvalidArgument(f"{name} must be a number of 64 bits, not one of {len(str(value))} digits") from None


def _integer(body: dict[str, Any], name: str, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(f"{name} must be an integer, not {value!r}")
    return value
