"""Attention where the bytes are: what a place that holds K and V answers, how answers are joined, what is counted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from kvmem.arguments import as_int32, brief
from kvmem.errors import SpecError
from kvmem.kernels.checks import check_queries
from kvmem.kernels.merge import merge_levels
from kvmem.near.sparse import SparF

__all__ = ["DTYPES", "Near", "Part", "Shape", "Traffic", "check_step", "merge"]

#: Of queries, and of K and V on a disk.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Part(NamedTuple):
    """The answer of one place: attention over the tokens that it holds.

    out: ``[T, query heads, width of V]``, in the dtype and on the device of the queries. lse: natural logarithm,
    ``[T, query heads]``, float32, or float64 for queries in float64; -inf, with zeros in ``out``, where a query sees no
    token. exact: whether the lse is; that of ``SparF`` is an estimate.
    """

    out: torch.Tensor
    lse: torch.Tensor
    exact: bool = True


def merge(parts: Iterable[Part | tuple[torch.Tensor, torch.Tensor]], *, approximate: bool = False) -> Part:
    """Return the attention over all tokens of the parts, which must be disjoint: exact, in any order. What a
    kernel returns, ``(out, lse)``, is a part too.

    approximate: allow parts whose lse is an estimate; their share of the result is then one too. Else ``SpecError`` for
    such a part beside another, and for no parts.
    """
    found = [Part(*part) for part in parts]
    if not found:
        raise SpecError("parts: got none; give the answer of each place, an empty one for a place without tokens")
    exact = all(part.exact for part in found)
    if len(found) > 1 and not exact and not approximate:
        raise SpecError(
            "parts: the lse of one is an estimate of sparse attention, and so would be its share of the result; pass "
            "approximate=True to accept that, or attend densely"
        )
    wide = found[0].lse.dtype  # joined in the precision of the lse, and rounded once
    out, lse = merge_levels((part.out.to(wide), part.lse) for part in found)
    return Part(out.to(found[0].out.dtype), lse, exact)


class Traffic(Counter[str]):
    """Bytes that crossed each boundary, and pages, by name, since it was made or ``clear()``. Not thread-safe.

    link_bytes: queries, new K and V on their way to the place, and outputs on their way back. lse_bytes: the lse,
    apart. control_bytes: headers of messages. media_read_bytes, media_written_bytes: whole pages of a disk, or rows and
    cache lines of host memory. delivered_bytes: what was left after filtering: the K and V that attention used.
    page_writes: pages of token rows. channel_page_writes: pages of the second, channel-indexed copy of K.
    """


@dataclass(frozen=True)
class Shape:
    """What a place holds of a layer: KV heads, the widths of K and V, and their dtype."""

    kv_heads: int
    k_width: int
    v_width: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """K and V of one token and head."""
        return (self.k_width + self.v_width) * self.dtype.itemsize

    def check_rows(self, k: object, v: object, tokens: int | None = None) -> int:
        """Return how many tokens the new rows are; ``SpecError`` unless they are as many as ``tokens`` and fit."""
        for name, rows, width in (("new_k", k, self.k_width), ("new_v", v, self.v_width)):
            fits = isinstance(rows, torch.Tensor) and rows.ndim == 3 and rows.dtype == self.dtype
            if fits and tokens is None:
                tokens = len(rows)  # type: ignore[arg-type]
            if not fits or tuple(rows.shape) != (tokens, self.kv_heads, width):  # type: ignore[attr-defined]
                got = f"{tuple(rows.shape)} {rows.dtype}" if isinstance(rows, torch.Tensor) else brief(rows)
                must = f"[{'tokens' if tokens is None else tokens}, {self.kv_heads}, {width}] in {self.dtype}"
                raise SpecError(f"{name}: got {got}; must be {must}")
        assert tokens is not None
        return tokens

    def check_queries(self, q: torch.Tensor) -> None:
        """``SpecError`` unless they are floats ``[T, a multiple of kv_heads, k_width]``."""
        check_queries(q)
        if q.dtype not in DTYPES:
            raise SpecError(f"q: got {q.dtype}; must be one of {', '.join(map(str, DTYPES))}")
        if q.shape[2] != self.k_width or q.shape[1] % self.kv_heads or not q.shape[1]:
            must = f"a multiple of {self.kv_heads} heads of width {self.k_width}"
            raise SpecError(f"q: got shape {tuple(q.shape)}; must have {must}")


def check_step(
    sequences: Sequence[Any], counts: Sequence[int] | None, tokens: int, new: tuple[object, object] = (None, None),
    sparse: object = None,
) -> tuple[list[Any], list[int]]:  # fmt: skip
    """Return the sequences, and how many of the ``tokens`` each has; counts None: equally many. ``SpecError`` where
    that does not fit, for a sequence that occurs twice, new K without V, and what is no ``SparF``.
    """
    try:
        given, repeated = list(sequences), len(set(sequences)) != len(sequences)
    except TypeError:
        given, repeated = [], True
    if repeated:
        raise SpecError(f"sequences: got {brief(sequences)}; must be a list, in which each occurs once")
    if (new[0] is None) != (new[1] is None):
        raise SpecError("new_k, new_v: got one without the other; give both, or neither where nothing is appended")
    if sparse is not None and not isinstance(sparse, SparF):
        raise SpecError(f"sparse: got {brief(sparse)}; must be a SparF, or None")
    number = len(given)
    if counts is None:
        if tokens % max(number, 1) or (tokens and not number):
            raise SpecError(f"counts: missing; {tokens} tokens are not the same number for each of {number} sequences")
        return given, [tokens // max(number, 1)] * number
    found: list[int] = as_int32("counts", counts).tolist()
    if len(found) != number or sum(found) != tokens or min(found, default=0) < 0:
        raise SpecError(f"counts: got {brief(found)}; must be {number} numbers from 0 on, whose sum is {tokens}")
    return given, found


class Near(ABC):
    """A place that holds K and V, and attends over them there: only queries, new rows, outputs and lse leave or reach
    it. The scores are scaled by ``width ** -0.5``; where a model wants another scale, multiply its queries before.

    traffic: what was moved and read.
    """

    traffic: Traffic

    @abstractmethod
    def attend(
        self, layer: int, sequences: Sequence[Any], q: torch.Tensor, new_k: torch.Tensor | None = None,
        new_v: torch.Tensor | None = None, *, counts: Sequence[int] | None = None, sparse: SparF | None = None,
    ) -> Part:  # fmt: skip
        """Append the new rows, then return the attention of the queries over what the place holds of each sequence.

        q: ``[T, query heads, width]``, packed, of the newest tokens of each sequence. counts: how many of them each
        has; default equally many. new_k, new_v: ``[T, KV heads, width]``; a query sees its own token and those before.
        Without them nothing is appended, and every query sees all: another place has the newest tokens. sparse: read
        less, approximately.

        ``SpecError`` for arguments that do not fit, ``TierError`` if the place fails; nothing has changed then.
        """
