"""Several stores as one, split by KV head. Outputs are put side by side: nothing is merged, so nothing is rounded."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from kvmem.arguments import check_members
from kvmem.errors import KVMemError, SpecError
from kvmem.near.base import Part
from kvmem.near.near_store import NearStore

__all__ = ["HeadShards"]


class HeadShards(NearStore):
    """``shards`` hold neighbouring KV heads, in this order, and work at the same time. ``close`` closes them too.

    Give each as many heads as the next, or one more: the slowest one counts. If one fails, the others take back what
    they have appended or opened. For shards of token ranges attend each, and ``merge``.

    traffic: the sum of the shards', made anew by each call; clear theirs.
    """

    def __init__(self, shards: Sequence[NearStore]) -> None:
        self._shards = check_members("shards", shards, NearStore)  # type: ignore[type-abstract]
        heads = [shard.shape.kv_heads for shard in self._shards]
        super().__init__(replace(self._shards[0].shape, kv_heads=sum(heads)), self._shards[0].layers)
        for shard in self._shards:
            if replace(shard.shape, kv_heads=sum(heads)) != self.shape or shard.layers != self.layers:
                raise SpecError(f"shards: got {[s.shape for s in self._shards]}; only the number of heads may differ")
        self._heads, self._threads = heads, ThreadPoolExecutor(len(heads), "kvmem-near")

    def _call(self, call: str, *tensors: torch.Tensor, **arguments: Any) -> Any:
        share = [[t.shape[1] // self.shape.kv_heads * heads for heads in self._heads] for t in tensors]
        parts = [torch.split(t, sizes, 1) for t, sizes in zip(tensors, share, strict=True)]
        futures = [
            self._threads.submit(shard._call, call, *(part[i] for part in parts), **arguments)
            for i, shard in enumerate(self._shards)
        ]
        errors = [future.exception() for future in futures]
        for shard, error in zip(self._shards, errors, strict=True):
            if error is None and any(errors):
                with suppress(KVMemError):
                    _take_back(shard, call, len(tensors), arguments)
        self._add_up()
        results = [future.result() for future in futures]  # raises the first error
        if call == "attend":
            outs, lses, exact = zip(*results, strict=True)
            return Part(torch.cat(outs, 1), torch.cat(lses, 1), all(exact))
        return sum(results) if call == "used_pages" else results[0]

    def _add_up(self) -> None:
        self.traffic.clear()
        for shard in self._shards:
            self.traffic.update(shard.traffic)

    def close(self) -> None:
        self._threads.shutdown()
        for shard in self._shards:
            shard.close()


def _take_back(shard: NearStore, call: str, tensors: int, arguments: dict[str, Any]) -> None:
    if call == "open":
        shard.free(arguments["sequence"])
    elif tensors > 1:  # with new K and V
        layer = arguments["layer"]
        for sequence, count in zip(arguments["sequences"], arguments["counts"], strict=True):
            shard.truncate(sequence, shard.num_tokens(sequence, layer) - count, layer=layer)
