"""Attention on the CPU over the cache as it lies, by kvmem's own kernel (``csrc/attend``).

K and V are read once, in place, for all query heads and new tokens: neither backend is gathered or copied. Meant for
decoding, where memory bandwidth is the limit; a long prompt is as right, and slower than torch's own SDPA.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache as cached

import torch

from kvmem import _core
from kvmem.allocator.batch import GroupBatch
from kvmem.errors import SpecError
from kvmem.kernels.base import Cache, Result, Run
from kvmem.kernels.checks import check_all_blocks, check_batch, check_queries, plain, window_left

__all__ = ["DTYPES", "attention", "described", "dtype_name", "plan"]

#: Of K and V. Queries are float32, bfloat16 or float16, whatever K and V are.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


def attention(
    q: torch.Tensor, cache: Cache, batch: GroupBatch, *, scale: float | None = None, causal: bool = True,
    window_tokens: int | None = None, queries: GroupBatch | None = None, k_scale: float = 1.0, v_scale: float = 1.0,
    soft_cap: float | None = None, sinks: torch.Tensor | None = None, threads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """``(out, lse)``: out ``[T, Hq, width of V]`` in q's dtype, lse float32 ``[T, Hq]``, natural logarithms.

    q: ``[T, Hq, D]``, float32, bfloat16 or float16, packed by ``cu_seqlens_q``; Hq is a multiple of the cache's heads.
    cache: ``Allocator.kv(layer)`` on the CPU, the new tokens already written; K and V have one dtype of ``DTYPES`` and
    may differ in width, which may be any. A batch may have several new tokens a sequence.

    scale: of the scores, default ``D ** -0.5``. window_tokens: tokens that a query sees, itself included; give it for a
    sliding-window group. queries: the batch that q is packed by where that is another group's (cross attention, with
    ``causal=False``). k_scale, v_scale: what a cache of 8 bits was divided by. soft_cap: scores become ``soft_cap *
    tanh(score / soft_cap)`` (Gemma 2). sinks: float32 ``[Hq]``, a score beside those of the keys, without a value
    (GPT-OSS); part of the lse. threads: default ``torch.get_num_threads()``; the result does not depend on it.

    Computed in float32, with an online softmax (Milakov and Gimelshein, arXiv:1805.02867); parts of long sequences are
    merged by their lse. Queries that see no token give zeroes, and an lse of -inf. ``SpecError`` for another dtype,
    width or device, and where a window has dropped tokens but is not given; ``StaleHandle`` for a batch that is no
    longer current. For the layers of one step, ``plan()`` divides the work once.
    """
    check_queries(q)
    check_all_blocks(cache)
    run = plan(
        batch, num_query_heads=q.shape[1], num_kv_heads=cache[0].shape[2], head_dim=q.shape[2], dtype=q.dtype,
        kv_dtype=cache[0].dtype, value_dim=cache[1].shape[3], scale=scale, causal=causal, window_tokens=window_tokens,
        queries=queries, k_scale=k_scale, v_scale=v_scale, soft_cap=soft_cap, sinks=sinks, threads=threads,
    )  # fmt: skip
    out, lse = run(q, cache)
    assert lse is not None
    return out, lse


def plan(
    batch: GroupBatch, *, num_query_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None, value_dim: int | None = None, scale: float | None = None, causal: bool = True,
    window_tokens: int | None = None, queries: GroupBatch | None = None, k_scale: float = 1.0, v_scale: float = 1.0,
    soft_cap: float | None = None, sinks: torch.Tensor | None = None, threads: int | None = None,
    first_tokens: torch.Tensor | None = None, return_lse: bool = True,
) -> Run:  # fmt: skip
    """``run(q, cache)`` for all layers of a step, which returns ``(out, lse)``; lse is None without ``return_lse``.

    Shapes and dtypes are those of each layer; value_dim: width of V, default that of K. first_tokens: int32 ``[rows]``
    or ``[1]``, the first token that the queries of a row see, where they do not see all that are held (padding on the
    left). Other arguments: as for ``attention``. The batch's numbers are copied: make a new plan after the next fill.
    Cost: linear in the blocks of the batch.
    """
    held = batch.first_tokens
    first = held if first_tokens is None else torch.maximum(held, first_tokens).contiguous()
    left = -1 if first_tokens is not None and window_tokens is None else window_left(batch, window_tokens, causal)
    packed = queries or batch
    _check_dtypes(dtype, kv_dtype or dtype)
    if num_query_heads % num_kv_heads:
        raise SpecError(f"q: got {num_query_heads} heads; must be a multiple of the cache's, {num_kv_heads}")
    if sinks is not None and (sinks.dtype != torch.float32 or sinks.shape != (num_query_heads,)):
        raise SpecError(f"sinks: got {tuple(sinks.shape)} {sinks.dtype}; must be float32 [{num_query_heads}]")
    work = _core.Attention(
        batch.block_table, batch.seq_lens, first, packed.cu_seqlens_q, block_size=batch.block_size,
        query_heads=num_query_heads, heads=num_kv_heads, width=head_dim, value_width=value_dim or head_dim,
        query=dtype_name(dtype), stored=dtype_name(kv_dtype or dtype),
        scale=(head_dim**-0.5 if scale is None else scale) * k_scale, value_scale=v_scale, soft_cap=soft_cap or 0.0,
        window=left + 1, causal=causal, sinks=sinks,
    )  # fmt: skip
    sizes = packed.num_new_tokens, num_query_heads, value_dim or head_dim
    return _Planned(work, batch, sizes, dtype, kv_dtype or dtype, threads, return_lse)


@dataclass(frozen=True)
class _Planned:
    """What ``plan`` returns. sizes: tokens, query heads, width of V."""

    work: _core.Attention
    batch: GroupBatch
    sizes: tuple[int, int, int]
    dtype: torch.dtype
    stored: torch.dtype
    threads: int | None
    return_lse: bool

    def __call__(self, q: torch.Tensor, cache: Cache) -> Result:
        check_batch(self.batch)
        k, v = cache
        if not (q.is_cpu and k.is_cpu and v.is_cpu):
            raise SpecError(f"got tensors on {q.device} and {k.device}; this kernel reads memory of the CPU")
        if q.dtype != self.dtype or k.dtype != self.stored or v.dtype != self.stored:
            raise SpecError(
                f"got queries of {q.dtype} and a cache of {k.dtype} and {v.dtype}; this plan was made for {self.dtype} "
                f"and {self.stored}"
            )
        out = torch.empty(self.sizes, dtype=self.dtype)
        lse = torch.empty(self.sizes[:2], dtype=torch.float32) if self.return_lse else None
        tensors = described(q), described(k), described(v), described(out)
        self.work.run(*tensors, 0 if lse is None else lse.data_ptr(), self.threads or torch.get_num_threads())
        return out, lse


def _check_dtypes(queries: torch.dtype, stored: torch.dtype) -> None:
    if queries not in DTYPES[:3] or stored not in DTYPES:
        floats, others = (", ".join(map(dtype_name, some)) for some in (DTYPES[:3], DTYPES[3:]))
        raise SpecError(
            f"q: got queries of {queries} and a cache of {stored}; this kernel takes queries of {floats} and a cache "
            f"of these or {others}: use kvmem.kernels.reference.sdpa"
        )


def described(tensor: torch.Tensor) -> tuple[int, ...]:
    """Address, shape and strides, as ``_core.Attention.run`` takes a tensor. REQUIRES: it is on the CPU."""
    tensor = plain(tensor)
    return (tensor.data_ptr(), *tensor.shape, *tensor.stride())


@cached
def dtype_name(dtype: torch.dtype) -> str:
    """As ``_core.Attention`` takes it: ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")
