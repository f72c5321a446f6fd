"""What needs no server that is up: bodies, texts, and the process that is told to end."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", minversion="5.23", reason="the engine's models need kvmem[engine]")
pytest.importorskip("starlette", reason="the server needs kvmem[engine]")
pytest.importorskip("sse_starlette", reason="the server needs kvmem[engine]")
pytest.importorskip("uvicorn", reason="the server needs kvmem[engine]")
pytest.importorskip("prometheus_client", reason="the server needs kvmem[engine]")
pytest.importorskip("httpx", reason="a client of these tests, from kvmem[test]")

import httpx
from pydantic import ValidationError
from support_engine import scheduler

from examples.engine import protocol
from examples.engine.answer import Detokenizer
from examples.engine.server import Server
from kvmem.bench.language_models import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def test_many_wrong_elements_make_few_errors() -> None:
    """Reporting all of them, in the server's loop, would delay everybody."""
    counts = []
    wrong: list[tuple[type[protocol.Completion | protocol.Chat], Any]] = [
        (protocol.Completion, {"prompt": [-1] * 1000}),
        (protocol.Completion, {"prompt": ["a"] * 1000}),
        (protocol.Completion, {"prompt": [[-1] * 1000]}),
        (protocol.Completion, {"prompt": "a", "stop": [5] * 1000}),
        (
            protocol.Completion,
            {"prompt": "a", "stream_options": {"include_usage": 1, **dict.fromkeys(map(str, range(1000)), 1)}},
        ),
        (protocol.Chat, {"messages": [5] * 1000}),
        (protocol.Chat, {"messages": [{"role": "user", "content": [5] * 1000}]}),
    ]
    for kind, body in wrong:
        with pytest.raises(ValidationError) as caught:
            kind.model_validate_json(json.dumps(body))
        counts.append(caught.value.error_count())
    assert max(counts) < 40, counts


def test_a_template_that_refuses_is_the_callers_error() -> None:
    for template in ("{{ raise_exception('roles must alternate') }}", None):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        with pytest.raises(protocol.ApiError, match="chat template") as caught:
            protocol.Chat(messages=[protocol.Message(role="user", content="a")]).tokens(tokenizer)
        assert caught.value.status == 400


def test_a_client_that_goes_within_its_body_is_no_error_of_the_server() -> None:
    """An exception here would be a traceback in the log for each."""
    app = Server(scheduler("paged"), byte_tokenizer(), "tiny").app
    parts = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(parts)

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    asyncio.run(app(scope, receive, send))


@pytest.mark.timeout(120)
def test_a_signal_lets_answers_end_and_the_process_ends_well(tmp_path: Path) -> None:
    words = f"-m examples.engine --model tiny --port 0 --threads 1 --memory 8MiB --host-memory 1MiB --disk {tmp_path}"
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    process = subprocess.Popen([sys.executable, *words.split()], **pipes)
    try:
        url = process.stdout.readline().strip() + "/v1/completions"
        asked = {"prompt": "a", "max_tokens": 300, "stream": True, "temperature": 0}
        lines = []
        with httpx.stream("POST", url, json=asked, timeout=60) as answer:
            for line in answer.iter_lines():
                if not lines:
                    process.send_signal(signal.SIGTERM)
                lines += [line] * line.startswith("data: ")
        assert len(lines) == 301 and lines[-1] == "data: [DONE]"
        assert "length" in lines[-2]
        _, printed = process.communicate(timeout=60)
        assert (process.returncode, printed) == (0, "")
    finally:
        process.kill()
        process.wait()


def test_text_that_comes_by_the_byte(rng: random.Random) -> None:
    tokenizer = byte_tokenizer()
    text = "".join(rng.choice("ab é日🙂\n") for _ in range(200))
    ids = tokenizer(text)["input_ids"]
    for stops in ([], ["🙂日", "aa", "never"], [text[50:60], text[40:70]], [text[-3:]], [text[:9] + "x" * 500_000]):
        detokenizer, said = Detokenizer(tokenizer.decode, stops), []
        for number, token in enumerate(ids, 1):
            said.append(detokenizer.push(token, last=number == len(ids)))
            if detokenizer.stopped:
                break
        ends = [at for stop in stops if (at := text.find(stop)) >= 0]
        if ends:  # the stop string that is complete first
            first = min((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text)
            assert detokenizer.stopped and "".join(said) == text[: first[1]]
        else:
            assert not detokenizer.stopped and "".join(said) == text
    for _ in range(20):  # tokens that end within a character, one after the other
        data, pieces, at = "é日🙂🙂🙂🙂🙂🙂🙂日é".encode(), list[bytes](), 0
        while at < len(data):
            pieces.append(data[at : (at := at + rng.randint(1, 5))])
        split = Detokenizer(lambda ids, of=pieces: b"".join(of[n] for n in ids).decode(errors="replace"))
        said = [split.push(n, last=n == len(pieces) - 1) for n in range(len(pieces))]
        assert "".join(said) == data.decode(), pieces
    broken = Detokenizer(tokenizer.decode)
    invalid = tokenizer("é")["input_ids"][:1] * 9
    assert set("".join(broken.push(token, last=n == 8) for n, token in enumerate(invalid))) == {"\ufffd"}
