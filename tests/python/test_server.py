"""The HTTP server: OpenAI's completions for stock clients, errors that say what is wrong, and the ledger beneath."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import elastikv

pytest.importorskip("transformers")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
CollectorRegistry = pytest.importorskip("prometheus_client").CollectorRegistry

from elastikv.server.app import Served, make_app  # noqa: E402
from elastikv.server.models import load_model  # noqa: E402
from elastikv.server.text import Stream, Texts  # noqa: E402
from elastikv.serving import Engine, Runner  # noqa: E402
from elastikv.trace import TraceRequest, summary  # noqa: E402
from serving_tools import expected  # noqa: E402

PAGE = 4096


class Letters:
    """A tokenizer whose tokens are UTF-8 bytes."""

    def decode(self, tokens, skip_special_tokens):
        return bytes(tokens).decode(errors="replace")

    def __call__(self, text):
        return {"input_ids": list(text.encode())}


def test_text_comes_in_whole_characters_and_without_its_stop():
    text = "grün und blau, dann STOP und mehr"
    stream = Stream(Texts(Letters(), 256), ["STOP"])
    pieces = [stream.add(token) for token in text.encode()]
    assert stream.stopped and "".join(pieces) == stream.text == "grün und blau, dann "
    assert "\ufffd" not in "".join(pieces) and pieces[2:4] == ["", "ü"]
    stream = Stream(Texts(Letters(), 256), ["STOP"])
    pieces = [stream.add(token) for token in b"no STO"]
    assert "".join(pieces) == "no " and stream.end() == "STO" and stream.text == "no STO"
    stream = Stream(Texts(Letters(), 256), [])
    assert [stream.add(token) for token in "ü".encode()[:1]] == [""] and stream.end() == "\ufffd"


@pytest.fixture
def network(one_thread):
    return load_model("random:tiny", device="cpu", dtype=torch.float32)[0]


@pytest.fixture
def served(network):
    with elastikv.SharedMemoryPool(2048 * PAGE, "cpu") as pool:
        handle = pool.register_model("tiny", 1 << 40)
        engine = Engine(network, handle, max_batch=4, max_tokens=512)
        with Runner(engine) as runner:
            served = Served(engine, runner, Texts(None, 512), [])
            served.app, served.pool, served.network = make_app(served, pool), pool, network
            yield served
        engine.close()


def run(served, work):
    """work(client) within one event loop."""

    async def main():
        transport = httpx.ASGITransport(app=served.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await work(client)

    return asyncio.run(main())


def test_a_completion_is_the_models_own(served, network):
    prompt = [5, 6, 7, 8]

    async def ask(client):
        return await client.post(
            "/v1/completions", json={"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0}
        )

    answer = run(served, ask).json()
    right = expected(network, prompt, 12)
    assert answer["object"] == "text_completion" and answer["model"] == "tiny"
    assert answer["choices"] == [
        {"index": 0, "text": Texts(None, 512).decode(right), "logprobs": None, "finish_reason": "length"}
    ]
    assert answer["usage"]["completion_tokens"] == 12 and answer["usage"]["total_tokens"] == 16


def test_a_stream_brings_an_event_a_token(served, network):
    async def ask(client):
        body = {"prompt": "hello", "max_tokens": 9, "temperature": 0, "stream": True,
                "stream_options": {"include_usage": True}}  # fmt: skip
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            return [line.removeprefix("data: ") async for line in response.aiter_lines() if line]

    events = run(served, ask)
    assert events[-1] == "[DONE]"
    pieces = [json.loads(event) for event in events[:-1]]
    assert len([piece for piece in pieces if piece["choices"]]) >= 10
    text = "".join(piece["choices"][0]["text"] for piece in pieces if piece["choices"])
    assert text == Texts(None, 512).decode(expected(network, Texts(None, 512).encode("hello"), 9))
    assert pieces[-2]["choices"][0]["finish_reason"] == "length" and pieces[-1]["usage"]["completion_tokens"] == 9


def test_stop_seed_and_timeout(served):
    async def ask(client):
        sampled = {"prompt": "abc", "max_tokens": 30, "seed": 4, "temperature": 1.0, "top_p": 0.9}
        answers = [(await client.post("/v1/completions", json=sampled)).json() for _ in range(2)]
        text = answers[0]["choices"][0]["text"]
        assert text == answers[1]["choices"][0]["text"]
        stopped = (await client.post("/v1/completions", json={**sampled, "stop": [text[10:12]]})).json()
        assert stopped["choices"][0]["finish_reason"] == "stop"
        assert text.startswith(stopped["choices"][0]["text"]) and text[10:12] not in stopped["choices"][0]["text"]
        late = (await client.post("/v1/completions", json={**sampled, "timeout": 0})).json()
        assert late["choices"][0]["text"] == "" and late["usage"]["completion_tokens"] == 0

    run(served, ask)


@pytest.mark.parametrize(
    ("body", "status", "complaint"),
    [
        ("no json", 400, "no JSON"),
        ([1], 400, "JSON object"),
        ({"prompt": [1], "model": "other"}, 404, "there is no model 'other' here"),
        ({}, 400, "prompt must be"),
        ({"prompt": ["a", "b"]}, 400, "prompt must be"),
        ({"prompt": []}, 400, "a prompt of 0 tokens"),
        ({"prompt": [1], "n": 2}, 400, "n=2 is not supported"),
        ({"prompt": [1], "max_tokens": "many"}, 400, "max_tokens must be an integer"),
        ({"prompt": [1], "max_tokens": 600}, 400, "do not fit an engine of max_tokens=512"),
        ({"prompt": [1], "temperature": -1}, 400, "temperature must be 0"),
        ({"prompt": [1], "top_p": 7}, 400, "top_p must be"),
        ({"prompt": [1], "stop": 3}, 400, "stop must be"),
        ({"prompt": [9999]}, 400, "token 9999"),
        ({"prompt": [-1]}, 400, "token -1"),
        ({"prompt": [1], "seed": 1 << 63}, 400, "seed=9223372036854775808"),
        ({"prompt": [1], "temperature": 1e300}, 400, "temperature=1e+300"),
        ({"prompt": [1], "temperature": 10**400}, 400, "temperature must be a number of 64 bits"),
        ({"prompt": [1], "repetition_penalty": 1e39}, 400, "repetition_penalty=1e+39"),
        ({"prompt": "\ud800"}, 400, "prompt is no text"),
    ],
)
def test_what_is_wrong_with_a_request(served, body, status, complaint):
    async def ask(client):
        content = body if isinstance(body, str) else json.dumps(body)
        return await client.post("/v1/completions", content=content)

    answer = run(served, ask)
    assert answer.status_code == status and complaint in answer.json()["error"]["message"]
    assert served.engine.idle and served.runner.alive


def test_more_likeliest_tokens_than_there_are_are_all_of_them(served):
    async def ask(client):
        body = {"prompt": [5, 6], "max_tokens": 6, "seed": 4}
        return [(await client.post("/v1/completions", json={**body, "top_k": top_k})) for top_k in (512, 1 << 70)]

    every, more = run(served, ask)
    assert every.status_code == more.status_code == 200 and every.json()["choices"] == more.json()["choices"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("heard", [0, 1])
def test_who_leaves_is_not_served_further(network, stream, heard):
    """The client goes before the answer begins, or after its first piece; nobody computes the rest of it."""
    with elastikv.SharedMemoryPool(2048 * PAGE, "cpu") as pool:
        engine = Engine(network, pool.register_model("tiny", 1 << 40), max_batch=4, max_tokens=512)
        served = Served(engine, Runner(engine), Texts(None, 512), [])
        served.runner.stop()  # who steps is the test
        app = make_app(served, pool)
        body = json.dumps({"prompt": [5], "max_tokens": 400, "stream": stream}).encode()
        requests = []
        submit, engine.submit = engine.submit, lambda *a, **k: requests.append(submit(*a, **k)) or requests[-1]

        async def main():
            left, messages = asyncio.Event(), []
            if heard == 0:
                left.set()
            asks = [{"type": "http.request", "body": body, "more_body": False}]

            async def receive():
                if asks:
                    return asks.pop()
                await left.wait()
                return {"type": "http.disconnect"}

            async def send(message):
                messages.append(message)
                await asyncio.sleep(0)  # as where the socket is full

            scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b"",
                     "asgi": {"version": "3.0", "spec_version": "2.3"}, "app": app}  # fmt: skip
            serving = asyncio.ensure_future(app(scope, receive, send))
            while heard and not requests:
                await asyncio.sleep(0)
            if heard:
                engine.advance()
                await asyncio.sleep(0)
                left.set()
            await serving

        asyncio.run(main())
        (request,) = requests
        assert request.cancelled
        engine.advance()
        assert request.done and len(request.answer) <= 1 + heard and engine.idle
        engine.close()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_the_engine_cut_off_is_an_error(served, stream):
    async def ask(client):
        body = {"prompt": [5], "max_tokens": 500, "stream": stream}
        asking = asyncio.ensure_future(client.post("/v1/completions", json=body))
        while not served.engine.counts.submitted:
            await asyncio.sleep(0)
        served.engine.close()
        return await asking

    answer = run(served, ask)
    assert answer.status_code == (200 if stream else 503)
    assert "engine 'tiny' was closed" in answer.text and '"finish_reason": "stop"' not in answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_others_starve_is_told_who_holds_what(served, monkeypatch, stream):
    submit = served.engine.submit

    def starve(*_):
        raise elastikv.OutOfPhysicalMemory("'other' holds all of it")

    monkeypatch.setattr(served.engine, "submit", lambda *a, on_token, **k: submit(*a, on_token=starve, **k))

    async def ask(client):
        return await client.post("/v1/completions", json={"prompt": [5], "max_tokens": 9, "stream": stream})

    answer = run(served, ask)
    assert answer.status_code == (200 if stream else 503)
    assert "'other' holds all of it" in answer.text and served.runner.alive


def test_models_health_and_metrics(served):
    async def ask(client):
        await client.post("/v1/completions", json={"prompt": [5] * 40, "max_tokens": 4})
        await client.post("/v1/completions", json={"prompt": [5] * 40, "max_tokens": 4})
        return [await client.get(path) for path in ("/v1/models", "/health", "/metrics")]

    models, health, metrics = run(served, ask)
    assert [one["id"] for one in models.json()["data"]] == ["tiny"]
    assert health.status_code == 200 and health.json() == {"alive": True, "running": 0, "waiting": 0}
    for line in (
        'elastikv_engine_requests_total{model="tiny"} 2.0',
        'elastikv_engine_prefix_hits_total{model="tiny"} 1.0',
        'elastikv_engine_finished_total{how="length",model="tiny"} 2.0',
    ):
        assert line in metrics.text
    assert re.search(r'elastikv_pool_physical_limit_bytes{device="cpu",pool="pool"}', metrics.text)
    served.runner.stop()

    async def dead(client):
        return await client.get("/health")

    assert run(served, dead).status_code == 503


# ---- processes that share a ledger


def take_all(name: str) -> None:
    """All of a ledger's memory for a moment, in pieces of four pages."""
    with elastikv.SharedMemoryPool(4 << 20, "cpu", name=name) as pool:
        model = pool.register_model("own", 1 << 30)
        rows = elastikv.SlotTensor(model, 1, 1000, PAGE // 2, torch.float16, largest_extent=4 * PAGE)
        rows.grow([0], [1000], exact=True)


def test_two_servers_in_processes_share_one_ledger(network):
    """Each answers a stock client with its own model's tokens; the ledger knows both, and in the end none."""
    pool = f"test-server-{os.getpid()}"
    names = ("left", "right")
    servers = [
        subprocess.Popen(
            [sys.executable, "-m", "elastikv.cli", "serve", "random:tiny", "--name", name, "--pool", pool,
             "--limit", "4MiB", "--device", "cpu", "--dtype", "float32", "--max-tokens", "512", "--port", "0"],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
        )
        for name in names
    ]  # fmt: skip
    try:
        with httpx.Client(timeout=60) as client:
            urls = {}
            for name, server in zip(names, servers):
                said = server.stdout.readline()  # once it listens
                assert said.startswith("listens at http://127.0.0.1:")
                urls[name] = said.removeprefix("listens at ").strip()
                assert client.get(f"{urls[name]}/health").status_code == 200
            ledger = elastikv.Ledger(pool)
            assert sorted(one.model for one in ledger.clients()) == ["left", "right"]
            assert ledger.stats().processes == 2 and ledger.stats().physical_limit == 4 << 20
            for turn in range(3):
                for name, url in urls.items():
                    prompt = [7 + turn, *range(3, 40)]
                    body = {"model": name, "prompt": prompt, "max_tokens": 8, "temperature": 0}
                    answer = client.post(f"{url}/v1/completions", json=body).json()
                    assert answer["choices"][0]["text"] == Texts(None, 512).decode(expected(network, prompt, 8))
            # Prefixes are kept, within the limit, and given up when somebody asks.
            held = {one.model: one.charged for one in ledger.clients()}
            assert all(held.values()) and sum(held.values()) == ledger.stats().charged <= 4 << 20
            # Also for one who needs it in many small pieces, of which the first ones would fit.
            take_all(pool)
            assert ledger.stats().charged <= 4 << 20
            ledger.trim()
            assert sum(one.used for one in ledger.clients()) == 0
    finally:
        for server in servers:
            server.send_signal(signal.SIGTERM)
        codes = [server.wait(30) for server in servers]
    assert all(code in (0, -signal.SIGTERM) for code in codes)
    assert pool not in elastikv.ledgers()


def test_a_port_that_is_taken_is_said_before_anything_is_loaded():
    from typer.testing import CliRunner

    from elastikv.cli import app

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        result = CliRunner().invoke(
            app, ["serve", "random:giant", "--limit", "1MiB", "--device", "cpu", "--port", port]
        )
    assert result.exit_code == 2 and f"can't listen at 127.0.0.1:{port}" in result.output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("random:giant", "--limit", "1MiB", "--device", "cpu"), "there is no random model 'giant'"),
        (("random:tiny", "--limit", "lots"), "not a size"),
        (("random:tiny", "--limit", "1MiB", "--device", "cpu", "--quota", "1GiB"), "above the physical limit"),
    ],
)
def test_settings_that_can_not_be(arguments, complaint):
    from typer.testing import CliRunner

    from elastikv.cli import app

    result = CliRunner().invoke(app, ["serve", *arguments, "--port", "0"])
    assert result.exit_code == 2 and complaint in result.output


def test_the_load_generator_tells_what_became_of_each_request(served, monkeypatch):
    """One model takes long requests, which the other, of 64 tokens, refuses."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "examples" / "serving"))
    load = importlib.import_module("load")
    handle = served.pool.register_model("short", 1 << 40)
    engine = Engine(served.network, handle, max_batch=2, max_tokens=64, prefix_entries=0)
    with Runner(engine) as runner:
        short = Served(engine, runner, Texts(None, 512), [])
        requests = [TraceRequest(index / 100, 40 + 30 * (index % 2), 5) for index in range(12)]

        async def main():
            transports = [
                httpx.ASGITransport(app=app) for app in (served.app, make_app(short, served.pool, CollectorRegistry()))
            ]
            clients = [httpx.AsyncClient(transport=each, base_url="http://test") for each in transports]
            servers = [await load.find_model(client) for client in clients]
            assert [server.model for server in servers] == ["tiny", "short"]
            return await load.replay(servers, requests, shift=0.02)

        outcomes = asyncio.run(main())
    engine.close()
    assert {one.model for one in outcomes} == {0, 1}
    for request, one in zip(requests, outcomes):
        fits = one.model == 0 or request.context_tokens + 5 <= 65
        assert (one.end is not None) == fits and one.tokens == (5 if fits else 0)
        assert one.due == request.arrival and (one.first is None or one.due <= one.first <= one.end)
    assert 0 < summary(outcomes)["refused"] < 12
