"""What every kernel adapter offers: a ``Kernel`` that is prepared once a step and then run once a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvmem.allocator.batch import GroupBatch
from kvmem.allocator.cascade import Cascade

__all__ = ["HALVES", "Cache", "Form", "Kernel", "Result", "Run", "Step"]

#: K and V of a layer, as ``Allocator.kv(layer)`` or ``Allocator.rows(layer, ...)`` gives them; of MLA ckv and kpe.
Cache = tuple[torch.Tensor, torch.Tensor]
#: ``out [T, Hq, width of V]`` and the natural ``lse [T, Hq]`` in float32, or None where it is not returned.
Result = tuple[torch.Tensor, torch.Tensor | None]
Run = Callable[[torch.Tensor, Cache], Result]
Form = Literal["rows", "blocks"]

HALVES = (torch.float16, torch.bfloat16)
_WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends


@dataclass(frozen=True)
class Step:
    """What a kernel is prepared for: a batch, and the shapes and dtypes of its queries and its cache.

    batch: of the group that is read. num_query_heads, num_kv_heads, head_dim: of a layer; with MLA, 1 KV head of the
    latent's width. dtype, kv_dtype: of queries and cache. scale: of the scores, default ``head_dim ** -0.5``.
    window_tokens: tokens that a query sees, itself included. scales: ``{"k_scale": float, "v_scale": float}``, what a
    cache of 8-bit floats was divided by; else empty. cascade: of the batch, for a kernel of kind ``"shared"``.
    head_dim_kpe: of MLA's rotary key. return_lse: without it ``Run`` returns None for the lse. workspace: uint8 ``[128
    Mi]`` on the batch's device for FlashInfer's wrappers, shared by those that run one after the other; default a new
    one for each.
    """

    batch: GroupBatch
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    scale: float | None = None
    window_tokens: int | None = None
    scales: dict[str, float] | None = None
    cascade: Cascade | None = None
    head_dim_kpe: int = 0
    return_lse: bool = True
    workspace: torch.Tensor | None = None

    @property
    def heads(self) -> dict[str, Any]:
        """As FlashInfer's plans take them."""
        names = ("num_query_heads", "num_kv_heads", "head_dim", "dtype", "kv_dtype", "scale")
        return {name: getattr(self, name) for name in names}

    @property
    def device(self) -> torch.device:
        return self.batch.seq_lens.device

    def open_workspace(self) -> torch.Tensor:
        if self.workspace is not None:
            return self.workspace
        return torch.zeros(
            _WORKSPACE_BYTES if self.device.type == "cuda" else 16, dtype=torch.uint8, device=self.device
        )


@dataclass(frozen=True)
class Kernel:
    """A kernel by name, what it needs, and how it is run.

    module: the adapter, a file of ``kvmem.kernels``. package: what it calls, by the name that it is imported by.
    prepare: ``prepare(library, step)`` plans a step, with the package or a stand-in for it, and returns ``run(q,
    cache)``. q: ``[T, Hq, D]`` in ``step.dtype``, packed; for kind ``"mla"`` of width ``head_dim + head_dim_kpe``; for
    kind ``"write"`` new K and V, ``[2, T, H, D]``, which are returned as they are.
    guard_tokens: how many tokens past a sequence's end it may touch, so that they must be mapped and finite.
    kind: ``"kv"``, ``"mla"``, ``"shared"`` (shared prefixes are read once) or ``"write"``.
    reads: what ``cache`` is: ``Allocator.kv(layer)``; the rows ``Allocator.rows(layer, "k")`` and ``"v"``; or
    ``Allocator.kv_by_head(layer)``, of a spec that the adapter's ``spec_for`` has made. The library of such a kernel is
    what the adapter's ``load()`` returns.
    contiguous: it needs sequences in rows (virtual backend). block_multiple: of the block sizes that it takes.
    queries: how many new tokens its rows may have: any numbers, ``"equal"`` ones, or ``"one"`` each. dtypes: of the
    queries; empty for any. windows: it can leave out what a sliding window has dropped. pads: it takes padded batches.
    """

    name: str
    module: str
    package: str
    prepare: Callable[[Any, Step], Run]
    guard_tokens: int = 0
    kind: Literal["kv", "mla", "shared", "write"] = "kv"
    reads: Literal["rows", "blocks", "heads"] = "blocks"
    contiguous: bool = False
    block_multiple: int = 1
    queries: Literal["any", "equal", "one"] = "any"
    dtypes: tuple[torch.dtype, ...] = HALVES
    windows: bool = True
    pads: bool = True
