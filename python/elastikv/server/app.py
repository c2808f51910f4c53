"""The routes: completions, models, metrics, health."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

import elastikv.metrics
from elastikv.errors import InvalidArgument, OutOfPhysicalMemory, PoolClosed
from elastikv.server.completions import REASONS, Completion, Shape, error
from elastikv.server.counters import EngineCollector
from elastikv.server.text import Stream, Texts
from elastikv.serving.engine import Engine
from elastikv.serving.request import Finish, Request
from elastikv.serving.runner import Runner


class Served:
    """An engine with the thread that runs it, and what its tokens mean. ends: the tokens that end an answer."""

    def __init__(self, engine: Engine, runner: Runner, texts: Texts, ends: Sequence[int]) -> None:
        self.engine = engine
        self.runner = runner
        self.texts = texts
        self.ends = list(ends)


class _Answer:
    """One request between the engine's thread and the loop. Cancelled where nobody listens any more."""

    def __init__(self, served: Served, asked: Completion) -> None:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[int | None] = asyncio.Queue()
        self._queue = queue
        self._name = served.engine.name
        self.stream = Stream(served.texts, asked.stops)
        engine = served.engine

        def tell(token: int | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, token)

        self.request: Request = engine.submit(
            asked.prompt,
            max_new_tokens=asked.max_tokens,
            sampling=asked.sampling,
            seed=asked.seed,
            repetition_penalty=asked.repetition_penalty,
            stop=() if asked.ignore_eos else served.ends,
            deadline=None if asked.timeout is None else engine.clock() + asked.timeout,
            on_token=lambda _, token: tell(token),
            on_end=lambda _: tell(None),
        )

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it comes. Raises what failed."""
        ends = self.request.asked.stop
        try:
            while (token := await self._queue.get()) is not None:
                piece = "" if token in ends else self.stream.add(token)
                if self.stream.stopped:
                    yield piece
                    return
                yield piece
            if self.request.error is not None:
                raise self.request.error
            if self.request.finish is Finish.CANCELLED:
                raise PoolClosed(f"engine {self._name!r} was closed before the answer was whole")
            yield self.stream.end()
        finally:
            self.leave()

    def leave(self) -> None:
        """Nobody listens any more."""
        if not self.request.done:
            self.request.cancel()

    @property
    def reason(self) -> str:
        if self.stream.stopped:
            return "stop"
        return REASONS.get(self.request.finish or Finish.STOP, "stop")


def make_app(served: Served, pool: elastikv.SharedMemoryPool, registry: CollectorRegistry | None = None) -> Starlette:
    """The application of one model. It neither starts nor ends the engine."""
    registry = registry or CollectorRegistry()
    elastikv.metrics.watch(pool, name=pool.name or "pool", registry=registry)
    registry.register(EngineCollector(served.engine))
    name = served.engine.name

    async def completions(http: HttpRequest) -> Response:
        try:
            body = await http.json()
        except ValueError:
            return JSONResponse(error("the body is no JSON", "invalid_request_error"), 400)
        wanted = body.get("model", name) if isinstance(body, dict) else name
        if wanted != name:
            message = f"there is no model {wanted!r} here: this is {name!r}"
            return JSONResponse(error(message, "invalid_request_error", "model_not_found"), 404)
        try:
            asked = Completion.read(body, served.texts)
            answer = _Answer(served, asked)
        except (InvalidArgument, OutOfPhysicalMemory) as refused:
            return JSONResponse(error(str(refused), "invalid_request_error"), 400)
        except PoolClosed as closed:
            return JSONResponse(error(str(closed), "server_error"), 503)
        shape = Shape(name)
        if asked.stream:
            return _Events(answer, shape, asked.usage_in_stream)
        reading = asyncio.ensure_future(_read(answer))
        leaving = asyncio.ensure_future(_left(http))
        await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not reading.done():
            reading.cancel()
            return Response(status_code=499)  # nobody is there to read it
        failed = reading.exception()
        if failed is not None:
            status = 503 if isinstance(failed, (PoolClosed, OutOfPhysicalMemory)) else 500
            return JSONResponse(error(str(failed), "server_error"), status)
        return JSONResponse(shape.whole(reading.result(), answer.reason, answer.request))

    async def models(http: HttpRequest) -> Response:
        one = {"id": name, "object": "model", "created": 0, "owned_by": "elastikv"}
        return JSONResponse({"object": "list", "data": [one]})

    async def health(http: HttpRequest) -> Response:
        engine = served.engine
        alive = served.runner.alive
        state = {"alive": alive, "running": len(engine.running), "waiting": engine.waiting}
        return JSONResponse(state, 200 if alive else 503)

    async def metrics(http: HttpRequest) -> Response:
        text = await asyncio.to_thread(prometheus_client.generate_latest, registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    return Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
            Route("/metrics", metrics),
        ]
    )


class _Events(StreamingResponse):
    """An answer in pieces. Whoever leaves before the first one is not served either."""

    def __init__(self, answer: _Answer, shape: Shape, usage: bool) -> None:
        super().__init__(_events(answer, shape, usage), media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.leave()


async def _read(answer: _Answer) -> str:
    return "".join([piece async for piece in answer.pieces()])


async def _left(http: HttpRequest) -> None:
    """Returns when the client has gone."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _events(answer: _Answer, shape: Shape, usage: bool) -> AsyncIterator[str]:
    try:
        async for piece in answer.pieces():
            # An event a token, also where its text is still to come: who measures counts them.
            yield _event(shape.piece(piece))
        yield _event(shape.piece("", answer.reason))
        if usage:
            yield _event(shape.usage(answer.request))
    except Exception as failed:
        yield _event(error(str(failed), "server_error"))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
