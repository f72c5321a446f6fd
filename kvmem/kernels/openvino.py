"""OpenVINO's paged attention on CPUs, from the package ``openvino``, over kvmem's memory.

A model that OpenVINO has transformed takes its cache and its tables as inputs: ``table_inputs(batch)`` and
``cache_inputs(alloc)`` are these, for any such model. ``compile_attention`` makes a model of one attention layer, so
that the kernel can be called by itself::

    spec = openvino.spec_for(spec)                                # head-major blocks of 32 tokens
    alloc = kvmem.Allocator(spec, interleave="none", ...)         # either backend
    attend = openvino.compile_attention(openvino.load(), num_query_heads=9, num_kv_heads=3, head_dim=64)
    ...
    out = attend(q, k, v, alloc.kv_by_head(layer), batch)         # writes k and v to the cache, and attends

The kernel writes the new K and V itself, where the table says. Elements lie in blocks as they are (``KV_CACHE_PRECISION
= f32``), so blocks are not packed: ``write_kv`` and kvmem's other kernels read and write the same cache. What lies past
a sequence's end may be anything, NaN too, and blocks that no table names may be unmapped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import torch

from kvmem.allocator import Allocator
from kvmem.allocator.batch import GroupBatch
from kvmem.arguments import check_size
from kvmem.errors import SpecError
from kvmem.kernels.base import Cache, Result, Run, Step
from kvmem.kernels.checks import check_batch, check_by_head, check_heads, check_new, check_queries, plain, window_left
from kvmem.kernels.write import to_cache_dtype
from kvmem.spec import CacheSpec, dtype_name

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "BLOCK_SIZE", "NAMES", "VERSION", "Attention", "OpenVino", "cache_inputs", "compile_attention", "load",
    "prepare_attention", "spec_for", "table_inputs",
]  # fmt: skip

#: The only block size of the kernel on CPUs.
BLOCK_SIZE: Final = 32
#: What this file was written for, and every foreign name that it uses, by module. The transformation is a private one.
VERSION: Final = "2026.4.1"
NAMES: Final = {
    "openvino": ("Core", "Model", "PartialShape", "Tensor", "Type"),
    "openvino.opset6": ("assign", "read_value"),
    "openvino.opset13": (
        "broadcast", "concat", "constant", "convert", "gather", "parameter", "reshape", "result",
        "scaled_dot_product_attention", "shape_of", "transpose", "unsqueeze", "variadic_split",
    ),
    "openvino._offline_transformations": ("paged_attention_transformation",),
}  # fmt: skip
_TABLES: Final = (
    "position_ids", "past_lens", "subsequence_begins", "block_indices", "block_indices_begins", "max_context_len",
)  # fmt: skip
_ATTENTION, _WINDOW_INPUT = "PagedAttentionExtension", 10
_INSTALL: Final = f"kvmem.kernels.openvino needs openvino {VERSION}: `pip install openvino=={VERSION}`"


@dataclass(frozen=True)
class OpenVino:
    """The modules of the package that are used here."""

    api: Any
    stateful: Any
    ops: Any
    transformations: Any


def load() -> OpenVino:
    """Import the package; ``SpecError``, with the version to install, where it or a name in it is missing."""
    modules = []
    for module, names in NAMES.items():
        try:
            modules.append(import_module(module))
        except ImportError as error:
            raise SpecError(f"openvino: {module} cannot be imported ({error}); {_INSTALL}") from error
        if missing := [name for name in names if not hasattr(modules[-1], name)]:
            raise SpecError(f"openvino: {module} has no {', '.join(missing)}; {_INSTALL}")
    return OpenVino(*modules)


def spec_for(spec: CacheSpec) -> CacheSpec:
    """``spec`` with the blocks that the kernel reads: head-major, of 32 tokens. The allocator needs
    ``interleave="none"``, since the kernel takes one dense tensor for K and one for V. ``SpecError`` where a group
    stores other things than K and V in float32.
    """
    for group in spec.groups:
        if [c.name for c in group.components] != ["k", "v"] or any(c.dtype != torch.float32 for c in group.components):
            names = ", ".join(f"{c.name} {dtype_name(c.dtype)}" for c in group.components)
            raise SpecError(f"group {group.name!r}: got {names}; OpenVINO's kernel is given k and v in float32 here")
    return spec.with_blocks("heads", block_size=BLOCK_SIZE)


def table_inputs(batch: GroupBatch) -> dict[str, npt.NDArray[np.integer[Any]]]:
    """The inputs of a paged model that say where tokens lie, as NumPy arrays by name: lengths, and block ids in CSR
    form. Rows without new tokens are left out. ``SpecError`` for a padded batch: the kernel would write to the null
    block; and for another block size than 32.
    """
    check_batch(batch)
    if batch.block_size != BLOCK_SIZE:
        raise SpecError(f"block_size: got {batch.block_size}; OpenVINO's kernel has {BLOCK_SIZE}: openvino.spec_for()")
    if bool(((batch.seq_lens == 1) & (batch.block_table[:, 0] == 0)).any()):
        raise SpecError("batch: got padding rows; OpenVINO's kernel would write them to the null block: fill without")
    new = batch.cu_seqlens_q.diff()
    rows = (new > 0).nonzero().flatten()
    counts = batch.kv_indptr.diff()
    kept = torch.repeat_interleave(new > 0, counts.long())
    longest = batch.seq_lens[rows].max() if len(rows) else torch.zeros((), dtype=torch.int32)
    found = (
        batch.positions.long(), (batch.seq_lens - new)[rows], _running_sum(new[rows]), batch.kv_indices[kept],
        _running_sum(counts[rows]), longest,
    )  # fmt: skip
    return {name: tensor.numpy() for name, tensor in zip(_TABLES, found, strict=True)}


def cache_inputs(alloc: Allocator, layers: list[int] | None = None) -> dict[str, npt.NDArray[np.float32]]:
    """The inputs ``key_cache.N`` and ``value_cache.N`` of a paged model, as NumPy arrays over the allocator's memory
    (``openvino.Tensor(array, shared_memory=True)``). layers: of the spec, for N = 0, 1 ...; default all. They end at
    the last mapped block, so ask again after growth. ``SpecError`` where K and V are not dense.
    """
    found = {}
    for number, layer in enumerate(range(alloc.spec.num_layers) if layers is None else layers):
        k, v = alloc.kv_by_head(layer)
        heads, size, width = k.shape[1:]
        found[f"key_cache.{number}"], found[f"value_cache.{number}"] = _dense((k, v), heads, size, width)
    return found


class Attention:
    """One attention layer as a compiled model; ``compile_attention`` makes it. Thread-safe: calls take turns."""

    def __init__(
        self, library: OpenVino, num_query_heads: int, num_kv_heads: int, head_dim: int, window: int, scale: float
    ) -> None:  # fmt: skip
        self._library, self._sizes, self._window = library, (num_query_heads, num_kv_heads, head_dim), window
        model = _paged(library, _layer(library, *self._sizes, scale), window)
        precisions = {"KV_CACHE_PRECISION": "f32", "INFERENCE_PRECISION_HINT": "f32"}
        self._request = library.api.Core().compile_model(model, "CPU", precisions).create_infer_request()
        self._lock = Lock()  # compile_attention gives one object to whoever has such a layer

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: Cache, batch: GroupBatch
    ) -> torch.Tensor:  # fmt: skip
        """Writes k and v to the cache and returns attention over it, causal, ``[T, Hq, D]`` in float32.

        q: ``[T, Hq, D]``; k, v: ``[T, H, D]``; all packed, and converted to float32. cache:
        ``Allocator.kv_by_head(layer)``. ``SpecError`` for what does not fit; ``StaleHandle`` for a stale batch.
        """
        query_heads, heads, width = self._sizes
        left = window_left(batch, self._window or None, True)
        assert left + 1 == self._window
        check_queries(q)
        tokens = batch.num_new_tokens
        for name, tensor, count in (("q", q, query_heads), ("k", k, heads), ("v", v, heads)):
            check_new(name, tensor, (tokens, count, width))
        key, value = _dense(cache, heads, BLOCK_SIZE, width)
        inputs = table_inputs(batch)
        if tokens == 0:
            return torch.empty(0, query_heads, width)
        new = torch.cat([to_cache_dtype(t.detach(), torch.float32).flatten(1) for t in (q, k, v)], 1)
        inputs |= {"inputs_embeds": new.numpy(), "key_cache.0": key, "value_cache.0": value}
        with self._lock:
            for name, array in inputs.items():
                self._request.set_tensor(name, self._library.api.Tensor(array, shared_memory=True))
            self._request.infer()
            out = torch.from_numpy(self._request.get_output_tensor(0).data.copy())
        return out.view(tokens, query_heads, width)


@lru_cache(maxsize=16)
def compile_attention(
    library: OpenVino, *, num_query_heads: int, num_kv_heads: int, head_dim: int, window_tokens: int | None = None,
    scale: float | None = None,
) -> Attention:  # fmt: skip
    """The kernel as a function, ``attend(q, k, v, cache, batch)``; the last 16 are kept. Takes a tenth of a second.

    library: what ``load()`` returns. window_tokens: tokens that a query sees, itself included. scale: default
    ``head_dim ** -0.5``. ``SpecError`` where the package transforms the layer into something else than it used to.
    """
    check_heads(num_query_heads, num_kv_heads, head_dim)
    if window_tokens is not None:
        check_size("window_tokens", window_tokens)
    scale = head_dim**-0.5 if scale is None else scale
    return Attention(library, num_query_heads, num_kv_heads, head_dim, window_tokens or 0, scale)


def prepare_attention(library: OpenVino, step: Step) -> Run:
    """library: what ``load()`` returns. The kernel writes K and V again that the cache has already."""
    attend = compile_attention(
        library, num_query_heads=step.num_query_heads, num_kv_heads=step.num_kv_heads, head_dim=step.head_dim,
        window_tokens=step.window_tokens, scale=step.scale,
    )  # fmt: skip
    slots, size = step.batch.slot_mapping, step.batch.block_size

    def run(q: torch.Tensor, cache: Cache) -> Result:
        k, v = (plain(blocks)[slots // size, :, slots % size] for blocks in cache)
        return attend(q, k, v, cache, step.batch).to(q.dtype), None

    return run


def _running_sum(counts: torch.Tensor) -> torch.Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


def _dense(cache: Cache, heads: int, block_size: int, width: int) -> tuple[Any, Any]:
    k, v = check_by_head(cache, heads, block_size, width, torch.float32)
    if not k.is_contiguous() or not v.is_contiguous():
        raise SpecError(
            "cache: K and V have other bytes between their blocks; OpenVINO's kernel takes dense tensors: make the "
            'allocator with interleave="none", of openvino.spec_for(spec)'
        )
    return k.numpy(), v.numpy()


# ---- The model of one layer ------------------------------------------------------------------------


def _layer(library: OpenVino, query_heads: int, heads: int, width: int, scale: float) -> Any:
    """Attention with a cache as OpenVINO's own converters write it, which the transformation knows: inputs_embeds is Q,
    K and V of each token side by side.
    """
    op, api = library.ops, library.api
    kinds = {
        "inputs_embeds": ([-1, -1, (query_heads + 2 * heads) * width], api.Type.f32),
        "beam_idx": ([-1], api.Type.i32),
    }
    kinds |= {name: ([-1, -1], api.Type.i64) for name in ("attention_mask", "position_ids")}
    inputs = {name: op.parameter(shape, kind, name=name) for name, (shape, kind) in kinds.items()}
    for name, parameter in inputs.items():
        parameter.output(0).set_names({name})
    first = op.constant(0)
    batch = op.gather(op.shape_of(inputs["inputs_embeds"]), op.constant([0]), first)
    stored = []

    def by_head(tokens: Any, count: int) -> Any:
        return op.transpose(op.reshape(tokens, op.constant([0, 0, count, width]), True), op.constant([0, 2, 1, 3]))

    def cached(new: Any, name: str) -> Any:
        nothing = op.broadcast(op.constant(0.0, api.Type.f32), op.concat([batch, op.constant([heads, 0, width])], 0))
        shape = api.PartialShape([-1, heads, -1, width])
        past = op.gather(library.stateful.read_value(nothing, name, api.Type.f32, shape), inputs["beam_idx"], first)
        held = op.concat([past, new], 2)
        stored.append(library.stateful.assign(held, name))
        return held if query_heads == heads else _repeated(op, held, query_heads, heads, width)

    counts = (query_heads, heads, heads)
    parts = op.variadic_split(
        inputs["inputs_embeds"], op.constant(2), op.constant([n * width for n in counts])
    ).outputs()
    q, k, v = (by_head(part, count) for part, count in zip(parts, counts, strict=True))
    mask = op.unsqueeze(op.convert(inputs["attention_mask"], "f32"), op.constant([1, 2]))
    out = op.scaled_dot_product_attention(
        q, cached(k, "key"), cached(v, "value"), mask, op.constant(scale, api.Type.f32), causal=False
    )
    flat = op.reshape(op.transpose(out, op.constant([0, 2, 1, 3])), op.constant([0, 0, query_heads * width]), True)
    return api.Model([op.result(flat)], stored, list(inputs.values()), "attention")


def _repeated(op: Any, held: Any, query_heads: int, heads: int, width: int) -> Any:
    """``[batch, query heads, tokens, width]`` of ``[batch, heads, tokens, width]``, as GQA is written."""
    sizes, first = op.shape_of(held), op.constant(0)
    before, behind = (op.gather(sizes, op.constant(dims), first) for dims in ([0, 1], [2, 3]))
    shape = op.concat([before, op.constant([query_heads // heads]), behind], 0)
    repeated = op.broadcast(op.unsqueeze(held, op.constant(2)), shape, "BIDIRECTIONAL")
    return op.reshape(repeated, op.constant([0, query_heads, -1, width]), True)


def _paged(library: OpenVino, model: Any, window: int) -> Any:
    library.transformations.paged_attention_transformation(model)
    found = {name for model_input in model.inputs for name in model_input.get_names()}
    wanted = {"inputs_embeds", "key_cache.0", "value_cache.0", *_TABLES}
    nodes = [node for node in model.get_ops() if node.get_type_name() == _ATTENTION]
    if found != wanted or len(nodes) != 1:
        raise SpecError(
            f"openvino: the paged layer has inputs {sorted(found)} and {len(nodes)} {_ATTENTION}; expected "
            f"{sorted(wanted)} and 1; {_INSTALL}"
        )
    if window:
        constant = library.ops.constant(window, library.api.Type.i32)
        nodes[0].input(_WINDOW_INPUT).replace_source_output(constant.output(0))
        model.validate_nodes_and_infer_types()
    return model
