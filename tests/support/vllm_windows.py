"""A program for the environment of a peer: vLLM's ``KVCacheManager`` under the traffic of `window_traffic`.

Standard input: a JSON list of objects with the fields of `window_traffic.Model`, ``block``, and ``steps``. Standard
output: for each, a JSON list of how many tokens of each prompt were found. Groups are made as vLLM makes them: of equal
numbers of layers."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from math import gcd
from typing import Any

from harness import stand_in  # type: ignore[import-not-found]
from vllm_driver import _ABSENT, _NO_PART_OF_IT  # type: ignore[import-not-found]


class Manager:
    """As its scheduler drives it for prompts that are computed whole, and answers token by token."""

    def __init__(self, model: dict[str, Any]) -> None:
        utils = import_module("vllm.v1.core.kv_cache_utils")
        hashing = import_module("vllm.utils.hashing")
        self.request_type = import_module("vllm.v1.request").Request
        structured = import_module("vllm.v1.structured_output.request")
        structured.StructuredOutputRequest.from_sampling_params = staticmethod(lambda _: None)
        self.parameters = import_module("vllm.sampling_params").SamplingParams(max_tokens=model["longest"])
        self.manager = import_module("vllm.v1.core.kv_cache_manager").KVCacheManager(
            _config(model), max_model_len=model["longest"], scheduler_block_size=model["block"],
            hash_block_size=model["block"],
        )  # fmt: skip
        utils.init_none_hash(hashing.sha256)
        self.hasher = utils.get_request_block_hasher(model["block"], hashing.sha256)
        self.requests: dict[int, Any] = {}

    def open(self, number: int, tokens: list[int]) -> int:
        request = self.request_type(str(number), tokens, self.parameters, None, block_hasher=self.hasher)
        blocks, found, _ = self.manager.get_computed_blocks(request)
        self._allocate(request, len(tokens) - found, found, blocks)
        request.num_computed_tokens = len(tokens)
        self.requests[number] = request
        return int(found)

    def grow(self, number: int, tokens: list[int]) -> None:
        request = self.requests[number]
        for token in tokens:
            request.append_output_token_ids(token)
            self._allocate(request, 1)
            request.num_computed_tokens += 1

    def close(self, number: int) -> None:
        self.manager.free(self.requests.pop(number))

    def _allocate(self, request: Any, count: int, *found: Any) -> None:
        assert self.manager.allocate_slots(request, count, *found) is not None, "the pool is too small"


def _config(model: dict[str, Any]) -> Any:
    import torch

    interface = import_module("vllm.v1.kv_cache_interface")
    shape = {"block_size": model["block"], "num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
    each = gcd(model["full"], model["sliding"])  # layers of a group
    groups = []
    for count, kind, more in (
        (model["full"], interface.FullAttentionSpec, {}),
        (model["sliding"], interface.SlidingWindowSpec, {"sliding_window": model["window"]}),
    ):
        for i in range(count // each):
            layers = [f"{kind.__name__}.{i}.{j}" for j in range(each)]
            groups.append(interface.KVCacheGroupSpec(layers, kind(**shape, **more)))
    return interface.KVCacheConfig(num_blocks=model["pages"] // each, kv_cache_tensors=[], kv_cache_groups=groups)


def replay(job: dict[str, Any]) -> list[int]:
    manager = Manager(job)
    hits = []
    for verb, request, tokens in job["steps"]:
        if verb == "open":
            hits.append(manager.open(request, tokens))
        elif verb == "grow":
            manager.grow(request, tokens)
        else:
            manager.close(request)
    return hits


def main() -> None:
    said = sys.stdout
    sys.stdout = sys.stderr  # what the peer prints is not the answer
    stand_in(_ABSENT, _NO_PART_OF_IT)
    json.dump([replay(job) for job in json.loads(sys.stdin.read())], said)


if __name__ == "__main__":
    main()
