"""What one client is sent: text, token ids and usage, in pieces or in one object."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from starlette.types import Receive

from examples.engine.engine import Tokens
from examples.engine.protocol import ApiError, Chat, Completion, Json
from examples.engine.scheduler import Request


class Detokenizer:
    """The text of tokens that come one by one. ``stopped``: a stop string has come; the text has ended before it."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops, self.stopped = decode, stops, False
        self._tokens: list[int] = []
        self._first = self._read = 0  # tokens between them are decoded again: text may depend on its neighbours
        self._held = ""  # may be the beginning of a stop string

    def push(self, token: int, *, last: bool) -> str:
        """Return the text that is certain now. last: no token follows."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._first : self._read])
        after = self._decode(self._tokens[self._first :])
        # A character has four bytes at most: where four are none, no token completes them.
        never = len(self._tokens) - self._read >= 4 and after.endswith("\ufffd" * 4)
        if last or never or not after.endswith("\ufffd"):
            self._held += after[len(before) :]
            self._first, self._read = self._read, len(self._tokens)
        found = min((at for stop in self._stops if (at := self._held.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.stopped = True
            return self._held[:found]
        starts = range(len(self._held)) if self._stops and not last else ()
        begun = (at for at in starts if any(stop.startswith(self._held[at:]) for stop in self._stops))
        cut = next(begun, len(self._held))
        text, self._held = self._held[:cut], self._held[cut:]
        return text


class Answer:
    """To ``call``, for which the engine was asked ``asked`` and gives ``tokens``. model: its name."""

    def __init__(self, call: Completion | Chat, asked: Request, tokens: Tokens, model: str, tokenizer: Any) -> None:
        self._call, self._asked, self._tokens, self._generated = call, asked, tokens, 0
        stops = [call.stop] if isinstance(call.stop, str) else call.stop
        self._text = Detokenizer(partial(tokenizer.decode, skip_special_tokens=True), stops)
        self._chat, self._began = isinstance(call, Chat), False
        kind = ("chat.completion.chunk" if call.stream else "chat.completion") if self._chat else "text_completion"
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}

    async def events(self) -> AsyncIterator[str]:
        try:
            async for text, token, reason in self._pieces():
                yield json.dumps(self._piece(text, [token], reason))
            if self._call.stream_options.include_usage:
                yield json.dumps({**self._head, "choices": [], "usage": self._usage()})
            yield "[DONE]"
        except ApiError as error:
            yield json.dumps(error.body)

    async def whole(self, receive: Receive) -> Json:
        """The answer in one object. ``ApiError``, which nobody reads, if the client goes."""
        watching = asyncio.create_task(self._until_gone(receive))
        try:
            texts, tokens, reasons = zip(*[piece async for piece in self._pieces()], strict=True)
        except asyncio.CancelledError:  # the server stops, and waits no more
            raise ApiError(503, "the server has stopped") from None
        finally:
            watching.cancel()
        return self._piece("".join(texts), list(tokens), reasons[-1]) | {"usage": self._usage()}

    async def _until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._tokens.put_nowait((None, "gone"))

    async def _pieces(self) -> AsyncIterator[tuple[str, int, str | None]]:
        reason = None
        while reason is None:
            token, reason = await self._tokens.get()
            if token is None:
                raise ApiError(500, "the engine has ended, or has no memory for this request")
            text = self._text.push(token, last=reason is not None)
            self._generated += 1
            reason = "stop" if self._text.stopped else reason
            yield text, token, reason

    def _piece(self, text: str, tokens: list[int], reason: str | None) -> Json:
        said: Json = {"text": text}
        if self._chat:
            role = {} if self._began else {"role": "assistant"}
            said = {"delta" if self._call.stream else "message": {**role, "content": text}}
        if self._call.return_token_ids:
            said |= {"token_ids": tokens} | ({} if self._began else {"prompt_token_ids": self._asked.prompt})
        self._began = True
        return {**self._head, "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": reason}]}

    def _usage(self) -> Json:
        prompt, answer = len(self._asked.prompt), self._generated
        counts = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
        return {**counts, "prompt_tokens_details": {"cached_tokens": self._asked.cached_tokens}}
