"""The engine over HTTP, as OpenAI's clients speak it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from functools import partial
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from examples.engine.answer import Answer
from examples.engine.engine import Engine
from examples.engine.metrics import Metrics
from examples.engine.protocol import ApiError, Chat, Completion, parse
from examples.engine.sampling import Sampling
from examples.engine.scheduler import Request, Scheduler


class Server:
    """``app`` is an ASGI application. name: of the model. max_requests: running and waiting; more get a 503.
    send_seconds: a client that takes nothing for so long is gone."""

    def __init__(
        self, scheduler: Scheduler, tokenizer: Any, name: str, *, max_requests: int = 512,
        max_body_bytes: int = 1 << 20, send_seconds: float = 60.0,
    ) -> None:  # fmt: skip
        self._scheduler, self._tokenizer, self._name = scheduler, tokenizer, name
        self._max_requests, self._max_body_bytes, self._send_seconds = max_requests, max_body_bytes, send_seconds
        metrics = self._metrics = Metrics(scheduler)
        model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "kvmem"}
        model["max_model_len"] = scheduler.max_tokens
        routes = [
            Route("/v1/completions", partial(self._answer, Completion), methods=["POST"]),
            Route("/v1/chat/completions", partial(self._answer, Chat), methods=["POST"]),
            Route("/v1/models", lambda _: JSONResponse({"object": "list", "data": [model]})),
            Route("/health", lambda _: Response(status_code=200 if self._engine.alive else 503)),
            Route("/metrics", lambda _: Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)),
        ]
        handlers: dict[Any, Any] = dict.fromkeys((ApiError, HTTPException, ClientDisconnect, Exception), _refused)
        self.app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        engine = Engine(self._scheduler, max_requests=self._max_requests, metrics=self._metrics)
        with closing(engine) as self._engine:
            yield

    async def _answer(self, kind: type[Completion | Chat], http: HttpRequest) -> ASGIApp:
        body = b""
        async for part in http.stream():
            body += part
            if len(body) > self._max_body_bytes:
                raise ApiError(413, f"the body has more than {self._max_body_bytes} bytes")
        call = parse(kind, body)
        asked = await run_in_threadpool(self._request, call)  # others are served while a long text becomes tokens

        async def respond(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                with self._engine.open(asked) as tokens:
                    answer = Answer(call, asked, tokens, self._name, self._tokenizer)
                    if call.stream:
                        # No pings: vLLM's client loses events that come after one. With no grace a stream would end, as
                        # if complete, when the process is told to.
                        sending: Any = dict(ping=0, send_timeout=self._send_seconds, shutdown_grace_period=float("inf"))
                        response: Any = EventSourceResponse(answer.events(), sep="\n", **sending)
                    else:
                        response = JSONResponse(await answer.whole(receive))
                    await response(scope, receive, send)
            except (SendTimeoutError, asyncio.CancelledError):
                pass  # the connection is closed, since the answer is not complete

        return respond

    def _request(self, call: Completion | Chat) -> Request:
        """``ApiError`` for what this model cannot do."""
        if call.model not in (None, self._name):
            raise ApiError(404, f"this server has the model {self._name} and no other", "model")
        prompt, room = call.tokens(self._tokenizer), self._scheduler.max_tokens
        if max(prompt, default=0) >= self._scheduler.vocab_size:
            raise ApiError(422, f"prompt: this model's ids are below {self._scheduler.vocab_size}", "prompt")
        more = getattr(call, "max_completion_tokens", None) or call.max_tokens or max(room - len(prompt), 1)
        if not prompt or len(prompt) + more > room:
            why = f"{len(prompt)} prompt tokens and max_tokens {more}: there is room for 1 to {room} in all"
            raise ApiError(400, why, "max_tokens")
        how = Sampling(more, call.temperature, call.top_p, call.top_k, call.seed, call.ignore_eos)
        return Request(prompt, how, call.cache_salt)


async def _refused(http: HttpRequest, error: Exception) -> Response:
    headers = getattr(error, "headers", None)  # of a 405: what is allowed
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}")
    elif not isinstance(error, ApiError):
        error = ApiError(500, "the server failed; its log says where")
    return JSONResponse(error.body, error.status, headers)
