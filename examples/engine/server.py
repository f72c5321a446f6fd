"""The engine over HTTP, as OpenAI's clients speak it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from examples.engine.engine import Busy, Engine, Stream
from examples.engine.metrics import Metrics
from examples.engine.protocol import ApiError, Call, Chat, Completion, Reply, parse
from examples.engine.scheduler import Request, Scheduler
from examples.engine.text import Detokenizer

__all__ = ["Server"]


class Server:
    """``app`` is an ASGI application; its engine lives as long as it does.

    name: of the model. max_requests: running and waiting; more get a 503. max_body_bytes: longer bodies get a 413.
    send_seconds: a client that takes nothing for so long is gone.
    """

    def __init__(
        self, scheduler: Scheduler, tokenizer: Any, name: str, *, max_requests: int = 512,
        max_body_bytes: int = 1 << 20, send_seconds: float = 60.0,
    ) -> None:  # fmt: skip
        self.scheduler, self.tokenizer, self.name = scheduler, tokenizer, name
        self.metrics = Metrics(scheduler)
        self._max_requests, self._max_body_bytes, self._send_seconds = max_requests, max_body_bytes, send_seconds
        self.engine: Engine
        routes = [
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/models", self._models), Route("/health", self._health), Route("/metrics", self._metrics),
        ]  # fmt: skip
        handlers: dict[Any, Any] = {ApiError: _refused, HTTPException: _http_error, Exception: _failed}
        self.app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.engine = Engine(self.scheduler, max_requests=self._max_requests, observer=self.metrics)
        try:
            yield
        finally:
            await run_in_threadpool(self.engine.close)

    async def _models(self, request: HttpRequest) -> Response:
        model = {"id": self.name, "object": "model", "owned_by": "kvmem", "max_model_len": self.scheduler.max_tokens}
        return JSONResponse({"object": "list", "data": [model]})

    async def _health(self, request: HttpRequest) -> Response:
        return Response(status_code=200 if self.engine.alive else 503)

    async def _metrics(self, request: HttpRequest) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def _completions(self, request: HttpRequest) -> ASGIApp:
        return await self._answer(parse(Completion, await self._body(request)))

    async def _chat(self, request: HttpRequest) -> ASGIApp:
        return await self._answer(parse(Chat, await self._body(request)))

    async def _body(self, request: HttpRequest) -> bytes:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > self._max_body_bytes:
                raise ApiError(413, f"the body has more than {self._max_body_bytes} bytes")
        return body

    async def _answer(self, call: Call) -> ASGIApp:
        if call.model not in (None, self.name):
            raise ApiError(404, f"this server has the model {self.name}, and not the one that was named", "model")
        prompt = await run_in_threadpool(call.tokens, self.tokenizer)  # of a long text, while others are served
        if max(prompt, default=0) >= self.scheduler.vocab_size:
            raise ApiError(422, f"prompt: ids of this model are below {self.scheduler.vocab_size}", "prompt")
        left = self.scheduler.max_tokens - len(prompt)
        wanted = getattr(call, "max_completion_tokens", None) or call.max_tokens or max(left, 1)
        if not prompt or wanted > left:
            longest = f"there is room for {self.scheduler.max_tokens} in all"
            raise ApiError(400, f"got {len(prompt)} prompt tokens and max_tokens {wanted}; {longest}", "max_tokens")
        asked = Request(prompt, call.sampling(wanted), call.cache_salt)

        async def respond(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                with self.engine.open(asked) as stream:
                    answer = _Answer(call, Reply(call, self.name, prompt), stream, self.tokenizer)
                    response: Any = None
                    if call.stream:
                        response = EventSourceResponse(answer.events(), sep="\n", send_timeout=self._send_seconds)
                    else:
                        response = JSONResponse(await answer.whole(receive))
                    await response(scope, receive, send)
            except Busy as error:
                raise ApiError(503, str(error)) from error
            except SendTimeoutError:
                pass  # the server closes the connection

        return respond


class _Answer:
    """What one client is sent."""

    def __init__(self, call: Call, reply: Reply, stream: Stream, tokenizer: Any) -> None:
        self._call, self._reply, self._stream, self._generated = call, reply, stream, 0
        stops = [call.stop] if isinstance(call.stop, str) else call.stop
        self._text = Detokenizer(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), stops)

    async def _pieces(self) -> AsyncIterator[tuple[str, list[int], str | None]]:
        async for tokens, reason in self._stream:
            if reason == "error":
                raise ApiError(500, "the engine has ended, or has no memory for this request")
            text = ""
            for number, token in enumerate(tokens, 1):
                text += self._text.push(token, last=reason is not None and number == len(tokens))
                self._generated += 1
                if self._text.stopped:
                    yield text, tokens[:number], "stop"
                    return
            yield text, tokens, reason

    async def events(self) -> AsyncIterator[str]:
        try:
            async for text, tokens, reason in self._pieces():
                if text or reason or self._call.return_token_ids:
                    yield json.dumps(self._reply.piece(text, tokens, reason))
            if self._call.stream_options.include_usage:
                yield json.dumps(self._usage())
            yield "[DONE]"
        except ApiError as error:
            yield json.dumps({"error": error.error})

    async def whole(self, receive: Receive) -> dict[str, Any]:
        """The answer in one object; an unfinished one if the client has gone."""
        text, tokens, reason = "", list[int](), None

        async def until_gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(until_gone)
            async for more, fresh, reason in self._pieces():
                text, tokens = text + more, tokens + fresh
            group.cancel_scope.cancel()
        return {**self._reply.piece(text, tokens, reason), "usage": self._usage()["usage"]}

    def _usage(self) -> dict[str, Any]:
        return self._reply.usage(self._generated, self._stream.request.cached_tokens)


def _refused(request: HttpRequest, error: ApiError) -> Response:
    return JSONResponse({"error": error.error}, error.status)


def _http_error(request: HttpRequest, error: HTTPException) -> Response:
    return _refused(request, ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))


def _failed(request: HttpRequest, error: Exception) -> Response:
    return _refused(request, ApiError(500, "the server failed; its log says where"))
