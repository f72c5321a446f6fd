"""A request as kvmem's block manager sees it: what is read of vLLM's, and what is kept while it has blocks."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from typing import Any, Protocol

from kvmem.allocator.prefix import Tokens

__all__ = ["Held", "Prompt", "Request"]


class Request(Protocol):
    """What the manager reads of a ``vllm.v1.request.Request``."""

    request_id: str
    num_computed_tokens: int
    num_in_flight_tokens: int
    num_preemptions: int
    skip_reading_prefix_cache: bool
    cache_salt: str | None
    lora_request: Any
    mm_features: Sequence[Any]
    prompt_embeds: Any
    resumable: bool
    all_token_ids: Sequence[int]

    @property
    def num_tokens(self) -> int: ...


class Prompt:
    """A request's tokens when it was last looked at, and what their KV depends on besides.

    ids: None for a request that shares nothing: its prompt is embeddings, or a session may add images to it. keys:
    arguments of ``SchedulerCache``: tenant, adapter, and each image from its place on.
    """

    __slots__ = ("ids", "keys")

    def __init__(self, request: Request) -> None:
        private = request.prompt_embeds is not None or request.resumable
        # The slice is a list, which converts faster than vLLM's ConstantList.
        self.ids = None if private else array("i", request.all_token_ids[:])
        lora, features = request.lora_request, request.mm_features
        self.keys: dict[str, Any] = {
            "salt": request.cache_salt,
            "adapter": None if lora is None else json.dumps([lora.lora_name, lora.lora_path]),
            "extra_key": [(one.mm_position.offset, one.identifier) for one in features] if features else None,
        }


class Held:
    """The blocks of a request, and the key of its sequence: a request that was preempted may begin again before the
    blocks of its first life are given back.

    blocks: as the worker has them; 0 where a window has dropped one. room, committed: tokens; whole blocks of room.
    loading: what a connector loads is not known to be right: ``"now"`` until the step's output has told, ``"later"``
    until the scheduler says so; or ``""``.
    """

    __slots__ = ("blocks", "committed", "loading", "prompt", "room")

    def __init__(self, prompt: Prompt, blocks: list[int], room: int, committed: int) -> None:
        self.prompt, self.blocks, self.room, self.committed = prompt, blocks, room, committed
        self.loading = ""

    def valid_tokens(self, request: Request) -> int:
        """Return how many tokens are known to be in the blocks, which others may find."""
        if self.loading == "now" and request.num_in_flight_tokens == 0:
            self.loading = ""
        return 0 if self.loading else request.num_computed_tokens - request.num_in_flight_tokens

    def ids(self, request: Request, end: int) -> Tokens | None:
        """Return the ids of the tokens that are not published yet, up to ``end``."""
        known = self.prompt.ids
        if known is None:
            return None
        if end <= len(known):
            return known[self.committed : end]
        return request.all_token_ids[self.committed : end]  # a list
