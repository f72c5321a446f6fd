"""``model.set_attn_implementation("kvmem")``: decoding reads a ``KVMemCache`` on the CPU where it lies.

Without it, each step of the paged backend gathers all tokens of a layer before torch's SDPA reads them. With it, the
cache gives attention a ``StoredTokens`` instead, and ``kvmem.kernels.cpu`` reads the blocks. Prompts, and what that
kernel does not compute (masks other than padding on the left, position biases, weights as output), are read out and
given to transformers' own SDPA. Importing ``kvmem.integrations.transformers`` registers it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvmem.allocator.batch import GroupBatch
from kvmem.errors import SpecError
from kvmem.kernels import cpu
from kvmem.kernels.base import Cache, Run

if TYPE_CHECKING:
    from kvmem.integrations.transformers.layer import KVMemLayer

__all__ = ["NAME", "StoredTokens", "attention", "register"]

NAME = "kvmem"


class StoredTokens(torch.Tensor):
    """K or V of all tokens of a layer, ``[B, heads, tokens, width]``, of which only the shape exists: the kernel reads
    the cache itself. Every operation but the shape raises ``SpecError``.
    """

    layer: KVMemLayer

    @staticmethod
    def of(layer: KVMemLayer, shape: tuple[int, ...], dtype: torch.dtype) -> StoredTokens:
        """One that stands for ``shape`` of ``layer``, until its next update."""
        stored = torch.empty(1, dtype=dtype).expand(shape).as_subclass(StoredTokens)
        stored.layer = layer
        return stored

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "size", "dim", "stride", "__repr__"):
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise SpecError(
            f"{name}: got K or V that lie in a KVMemCache and are read there; this attention is not "
            f'attn_implementation="{NAME}": set that, or another one before the step'
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StoredTokens(shape={tuple(self.shape)}, dtype={self.dtype})"


class DecodeStep:
    """Attention of one new token a row, over one group of a cache, for all layers of a step."""

    def __init__(self, batch: GroupBatch) -> None:
        self._batch = batch
        #: The least number of blocks that the memory of a layer must have.
        self.num_blocks = int(batch.kv_indices_cpu.max()) + 1 if batch.num_indices else 0
        self._mask: torch.Tensor | None = None
        self._first: torch.Tensor | None = None
        self._runs: dict[tuple[object, ...], Run] = {}

    def attention(
        self, query: torch.Tensor, memory: Cache, mask: torch.Tensor | None, begins: int, options: dict[str, Any]
    ) -> torch.Tensor | None:
        """``[B, 1, Hq, width of V]``; None if the batch has other new tokens than the queries, or if rows see anything
        but all tokens from some token on.

        query: ``[B, Hq, 1, D]``. memory: of the layer, ``Allocator.kv()``. mask: bool ``[B or 1, 1, 1, tokens]``, over
        the tokens from ``begins`` on.
        """
        batch = self._batch
        if batch.num_new_tokens != batch.num_rows or batch.num_rows != query.shape[0]:
            return None
        if mask is not None and mask is not self._mask:
            self._mask, self._first, self._runs = mask, _first_seen(mask), {}
        if mask is not None and self._first is None:
            return None
        k, v = memory
        shape = query.shape[1], k.shape[2], query.shape[3], v.shape[3], query.dtype, k.dtype
        key = (*shape, mask is None, begins, *options.items())
        if key not in self._runs:
            first = torch.zeros(1, dtype=torch.int32) if mask is None or self._first is None else self._first
            self._runs[key] = cpu.plan(
                batch, num_query_heads=shape[0], num_kv_heads=shape[1], head_dim=shape[2], value_dim=shape[3],
                dtype=query.dtype, kv_dtype=k.dtype, first_tokens=first + begins, return_lse=False, **options,
            )  # fmt: skip
        return self._runs[key](query[:, :, 0], (k, v))[0].unsqueeze(1)


def _first_seen(mask: torch.Tensor) -> torch.Tensor | None:
    """The first token that each row sees, int32 ``[B]`` or ``[1]``; None if it does not see all from there on, or if
    heads differ.
    """
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:3] != (1, 1):
        return None
    seen = mask[:, 0, 0]
    first = seen.shape[1] - seen.sum(-1, dtype=torch.int32)
    return first if torch.equal(seen, torch.arange(seen.shape[1]) >= first.unsqueeze(1)) else None


def attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, **options: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """``(out [B, n, Hq, width of V], None)``, as transformers' attention functions return it."""
    if isinstance(key, StoredTokens):
        if query.shape[2] == 1 and not _asks_more(options):
            how = {"scale": options.get("scaling"), "soft_cap": options.get("softcap"), "sinks": options.get("s_aux")}
            out = key.layer.attend(query, attention_mask, how)
            if out is not None:
                return out, None
        key, value = key.layer.read()
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return out, None


def _asks_more(options: dict[str, Any]) -> bool:
    """Whether the kernel cannot do what is asked for."""
    return bool(options.get("dropout") or options.get("output_attentions")) or options.get("position_bias") is not None


def register() -> None:
    """Make ``"kvmem"`` an ``attn_implementation`` of transformers, with the masks of its SDPA."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
