#!/usr/bin/env python3
"""Replays a trace against servers with OpenAI's completions route: requests come when the trace says.

    examples/serving/load.py --server http://127.0.0.1:8000 [--server http://127.0.0.1:8001 ...] [--trace AZURE.csv]

Each server is asked for its model. Where there are several, they are busy in turn for --shift seconds of the trace, so
that their ramps come one after another. Times to the first token count from when a request was due. Needs httpx.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from elastikv.trace import DEFAULT_TRACE, Outcome, TraceRequest, model_of, read_trace, scale_trace, summary


@dataclass(frozen=True)
class Server:
    """A client whose base address is the server's, and the name of its model."""

    client: httpx.AsyncClient
    model: str


async def find_model(client: httpx.AsyncClient) -> Server:
    """Asks a server for the model that it has."""
    answer = await client.get("/v1/models")
    answer.raise_for_status()
    return Server(client, answer.json()["data"][0]["id"])


async def replay(servers: Sequence[Server], requests: Sequence[TraceRequest], *, shift: float) -> list[Outcome]:
    """What became of each request. shift: as in model_of, in seconds of these requests."""
    start = time.perf_counter()
    rng = random.Random(7)
    tasks = []
    for index, request in enumerate(requests):
        which = model_of(index, request.arrival, models=len(servers), shift=shift)
        prompt = [rng.randrange(3, 250) for _ in range(request.context_tokens)]
        tasks.append(_ask(servers[which], which, request, prompt, start))
    return list(await asyncio.gather(*tasks))


async def _ask(server: Server, which: int, request: TraceRequest, prompt: list[int], start: float) -> Outcome:
    await asyncio.sleep(max(start + request.arrival - time.perf_counter(), 0.0))
    body = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": request.generated_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    first, tokens = None, 0
    try:
        async with server.client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                event = line.removeprefix("data: ")
                if event in ("", "[DONE]"):
                    continue
                content = json.loads(event)
                if "error" in content:
                    return Outcome(request.arrival, first, None, tokens, which)
                if content["choices"] and content["choices"][0]["finish_reason"] is None:
                    tokens += 1
                    first = first or time.perf_counter() - start
    except httpx.HTTPError:
        return Outcome(request.arrival, first, None, tokens, which)
    # The last piece is what the server held back, if anything; it is no token.
    tokens = min(tokens, request.generated_tokens)
    return Outcome(request.arrival, first, time.perf_counter() - start, tokens, which)


async def run(urls: Sequence[str], requests: Sequence[TraceRequest], *, shift: float) -> list[Outcome]:
    """`replay` on servers by their addresses."""
    limits = httpx.Limits(max_connections=None)
    clients = [httpx.AsyncClient(base_url=url, timeout=None, limits=limits) for url in urls]
    try:
        servers = [await find_model(client) for client in clients]
        return await replay(servers, requests, shift=shift)
    finally:
        for client in clients:
            await client.aclose()


def tell(outcomes: Sequence[Outcome], names: Sequence[str]) -> None:
    """One line for each model, and one for all of them."""
    for index, name in [*enumerate(names), (None, "all")]:
        facts = summary([one for one in outcomes if index in (None, one.model)])
        print(
            f"  {name:16} {facts['served']} of {facts['requests']} served, {facts['waited']} waited over 1 s, "
            f"{facts['tokens_per_second']:.0f} tokens/s, first token p50 {facts['first_token_p50'] * 1000:.0f} ms, "
            f"p99 {facts['first_token_p99'] * 1000:.0f} ms"
        )


def add_trace_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", type=Path, default=DEFAULT_TRACE, help="in the format of the Azure dataset")
    parser.add_argument("--max-requests", type=int, help="only the first so many")
    parser.add_argument("--time-scale", type=float, default=1.0, help="multiplies the trace's times")
    parser.add_argument("--token-scale", type=float, default=1.0, help="multiplies the trace's token counts")
    parser.add_argument("--shift", type=float, default=15.0, help="seconds of the trace, as written, of one busy model")


def requests_of(arguments: argparse.Namespace) -> list[TraceRequest]:
    return scale_trace(
        read_trace(arguments.trace),
        time_scale=arguments.time_scale,
        token_scale=arguments.token_scale,
        max_requests=arguments.max_requests,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", action="append", required=True, help="a server's address; may be given again")
    add_trace_options(parser)
    arguments = parser.parse_args()
    shift = arguments.shift * arguments.time_scale
    outcomes = asyncio.run(run(arguments.server, requests_of(arguments), shift=shift))
    tell(outcomes, arguments.server)


if __name__ == "__main__":
    main()
