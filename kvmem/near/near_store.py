"""The calls of a place that owns its sequences, whatever carries them out: a worker, or several places together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from kvmem.arguments import brief, check_size
from kvmem.errors import SpecError
from kvmem.near.base import Near, Part, Shape, Traffic, check_step
from kvmem.near.sparse import SparF

__all__ = ["NearStore"]


class NearStore(Near):
    """A place that owns its sequences, which the caller names by numbers of its own. Layers are filled one by one.

    shape: of each layer. layers: their numbers. All calls raise ``SpecError`` for arguments that do not fit, and
    ``TierError`` if the place fails or is closed; nothing has changed then.
    """

    def __init__(self, shape: Shape, layers: Iterable[int]) -> None:
        self.shape, self.layers, self.traffic = shape, frozenset(layers), Traffic()

    @abstractmethod
    def _call(self, call: str, *tensors: torch.Tensor, **arguments: Any) -> Any:
        """Carry out a call of ``kvmem.near.store.Store``; return its result: a ``Part`` or an int, else None."""

    @abstractmethod
    def close(self) -> None:
        """Release everything. Closing twice is no error."""

    def attend(
        self, layer: int, sequences: Sequence[int], q: torch.Tensor, new_k: torch.Tensor | None = None,
        new_v: torch.Tensor | None = None, *, counts: Sequence[int] | None = None, sparse: SparF | None = None,
    ) -> Part:  # fmt: skip
        """As ``Near.attend``. Cost: one read of the pages."""
        self.shape.check_queries(q)
        about = self._about(layer, sequences, counts, len(q), (new_k, new_v), sparse)
        new = [] if new_k is None or new_v is None else [new_k, new_v]
        if new:
            self.shape.check_rows(new_k, new_v, len(q))
        part: Part = self._call("attend", q, *new, **about, sparse=None if sparse is None else asdict(sparse))
        return part

    def append(
        self, layer: int, sequences: Sequence[int], new_k: torch.Tensor, new_v: torch.Tensor, *,
        counts: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """Append rows without attention: a prefill, layer by layer. Arguments as of ``attend``."""
        tokens = self.shape.check_rows(new_k, new_v)
        self._call("append", new_k, new_v, **self._about(layer, sequences, counts, tokens))

    def open(self, sequence: int) -> None:
        """Begin an empty sequence. ``SpecError`` if the number is in use."""
        self._call("open", sequence=check_size("sequence", sequence, 0))

    def num_tokens(self, sequence: int, layer: int) -> int:
        """Return how many tokens of the sequence the layer has."""
        about = self._about(layer, [sequence])
        return int(self._call("num_tokens", sequence=about["sequences"][0], layer=about["layer"]))

    def truncate(self, sequence: int, num_tokens: int, *, layer: int | None = None) -> None:
        """Drop all tokens from ``num_tokens`` on, of one layer, or of all that have more."""
        one = None if layer is None else self._about(layer, [])["layer"]
        which, tokens = check_size("sequence", sequence, 0), check_size("num_tokens", num_tokens, 0)
        self._call("truncate", sequence=which, num_tokens=tokens, layer=one)

    def free(self, sequence: int) -> None:
        """Drop the sequence, and give back all its pages."""
        self._call("free", sequence=check_size("sequence", sequence, 0))

    def used_pages(self) -> int:
        """Return how many pages sequences hold."""
        return int(self._call("used_pages"))

    def _about(
        self, layer: int, sequences: Sequence[int], counts: Sequence[int] | None = None, tokens: int = 0, *others: Any
    ) -> dict[str, Any]:
        ids, each = check_step(sequences, counts, tokens, *others)
        if check_size("layer", layer, 0) not in self.layers:
            raise SpecError(f"layer: got {layer}; must be one of {brief(sorted(self.layers))}")
        return {"layer": int(layer), "sequences": [check_size("sequences", i, 0) for i in ids], "counts": each}

    def __enter__(self) -> NearStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
