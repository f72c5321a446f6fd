"""The names and signatures that others write code against. A change here is a change for every user: add, do not
rename."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from typing import Any

import pytest

import kvmem

NAMES = [
    "Allocator", "Batch", "CacheSpec", "Component", "DeviceError", "Group", "KVMemError", "LiveSequence", "NotReady", "OutOfMemory", "PagePool",
    "Pin", "PrefixMatch", "SchedulerCache", "Sequence", "SpecError", "StaleHandle", "Stats",
    "TableChanges", "TierError",
]  # fmt: skip

# Parameters without annotations: name, "=" where there is a default, and "*" before what is keyword-only.
SIGNATURES = {
    "Allocator": "spec, *, backend=, device=, memory=, max_sequences, max_tokens, page_bytes=, interleave=, "
    "map_ahead_tokens=, tail_guard_tokens=, zero=, prefix_cache=, partial_reuse=, append_only=, policy=, cached_rows=, events=, event_key=, tiers=, pool=, "
    "record_ops=, debug=, driver=",
    "Allocator.sequence": "self, tokens=, *, salt=, extra_key=, adapter=, label=, load=",
    "Allocator.prefetch": "self, tokens, stream=, *, to=, salt=, extra_key=, adapter=",
    "Allocator.read_set": "self, layer, sequences, *, components=",
    "Allocator.block_set": "self, tokens, *, to, salt=, extra_key=, adapter=",
    "Allocator.ready": "self, sequences=",
    "Allocator.store": "self, tokens, *, salt=, extra_key=, adapter=",
    "Allocator.flush": "self, timeout=",
    "Allocator.hold": "self, tokens, *, salt=, extra_key=, adapter=",
    "Allocator.sequences": "self",
    "Allocator.free_tokens": "self",
    "Allocator.can_fit": "self, n",
    "Allocator.close": "self",
    "Allocator.admit_batch": "self, tokens, counts=, *, salt=, extra_key=, adapter=",
    "Allocator.match": "self, tokens, *, salt=, extra_key=, adapter=, load=",
    "Allocator.pin": "self, tokens, *, salt=, extra_key=, adapter=",
    "Allocator.pins": "self",
    "Allocator.clear_cache": "self",
    "Allocator.events": "self, max_events=, *, restart=",
    "Allocator.open_batch": "self, n",
    "Allocator.extend_batch": "self, ids, counts",
    "Allocator.try_extend_batch": "self, ids, counts",
    "Allocator.commit_batch": "self, ids, counts, tokens=",
    "Allocator.free_batch": "self, ids",
    "Allocator.batch": "self, sequences, *, new_tokens=, out=, pad_to=",
    "Allocator.make_batch": "self, *, max_sequences=, max_new_tokens, max_tokens=",
    "Allocator.fill": "self, ids, batch, *, new_tokens=, pad_to=",
    "Allocator.step": "self, ids, batch, *, counts=, tokens=, pad_to=",
    "Allocator.cascade_order": "self, sequences, *, group=",
    "Allocator.kv": "self, layer",
    "Allocator.tensor": "self, layer, component",
    "Allocator.rows": "self, layer, component=",
    "Allocator.sequence_tensor": "self, sequence, layer, component",
    "Allocator.set_memory": "self, memory",
    "Allocator.compact": "self, bytes=",
    "Allocator.trim": "self, bytes=",
    "Allocator.set_stream": "self, stream",
    "Allocator.stats": "self",
    "Allocator.check": "self",
    "Allocator.take_ops": "self",
    "Allocator.apply": "self, ops",
    "Sequence.extend": "self, n, *, group=",
    "Sequence.try_extend": "self, n, *, group=",
    "Sequence.commit": "self, tokens=, *, count=, group=",
    "Sequence.step": "self, n=, tokens=",
    "Sequence.truncate": "self, num_tokens",
    "Sequence.fork": "self",
    "Sequence.pin": "self, num_tokens=",
    "Sequence.retain": "self, start=, end=, *, priority, ttl=",
    "Sequence.snapshot": "self",
    "Pin.unpin": "self",
    "Sequence.free": "self",
    "Sequence.wait": "self, timeout=",
    "Sequence.detach": "self",
    "Sequence.kv": "self, layer",
    "Batch.group": "self, index",
    "Batch.full": "self, name",
    "Batch.cascade": "self, *, max_levels=, min_tokens=, queries=",
    "PagePool": "*, device=, memory, page_bytes=, shareable=, rdma=, driver=",
    "PagePool.set_memory": "self, memory",
    "PagePool.set_stream": "self, stream",
    "CacheSpec.from_config": "config, *, dtype=, block_size=, assume=",
    "CacheSpec.kv": "*, num_layers, num_kv_heads, head_dim, dtype, block_size=, window_tokens=, num_query_heads=",
}


def described(name: str) -> str:
    target = kvmem
    for part in name.split("."):
        target = getattr(target, part)
    words, keyword_only = [], False
    for parameter in inspect.signature(target).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            words.append("*")
        words.append(parameter.name + ("" if parameter.default is parameter.empty else "="))
    return ", ".join(words)


def test_all() -> None:
    assert kvmem.__all__ == NAMES
    assert all(hasattr(kvmem, name) for name in NAMES)


def test_signatures() -> None:
    assert {name: described(name) for name in SIGNATURES} == SIGNATURES


def test_every_public_method_is_pinned() -> None:
    for kind in (kvmem.Allocator, kvmem.Sequence):
        methods = {n for n, value in vars(kind).items() if inspect.isfunction(value) and not n.startswith("_")}
        assert {f"{kind.__name__}.{n}" for n in methods} <= SIGNATURES.keys()


def test_stats_fields() -> None:
    assert [f.name for f in dataclasses.fields(kvmem.Stats)] == [
        "reserved_bytes", "budget_bytes", "created_bytes", "free_bytes", "physical_bytes", "mapped_bytes", "used_bytes",
        "shared_bytes", "parked_bytes", "held_bytes", "cached_beside_bytes", "wasted_bytes", "driver_calls", "num_sequences", "max_sequences",
        "cached_bytes", "cached_blocks", "pinned_blocks", "evicted_blocks", "lookup_tokens", "hit_tokens",
        "device_free_bytes", "torch_allocated_bytes", "torch_reserved_bytes",
    ]  # fmt: skip


def test_sequence_properties() -> None:
    properties = {n for n, value in vars(kvmem.Sequence).items() if isinstance(value, property)}
    assert {"id", "num_tokens", "num_committed_tokens"} <= properties


def test_errors_are_what_python_calls_them() -> None:
    assert issubclass(kvmem.SpecError, (kvmem.KVMemError, ValueError)) and issubclass(kvmem.SpecError, ValueError)
    assert issubclass(kvmem.OutOfMemory, MemoryError) and issubclass(kvmem.DeviceError, RuntimeError)
    assert issubclass(kvmem.StaleHandle, RuntimeError) and issubclass(kvmem.TierError, OSError)
    for error in (kvmem.SpecError, kvmem.OutOfMemory, kvmem.DeviceError, kvmem.StaleHandle, kvmem.TierError):
        assert issubclass(error, kvmem.KVMemError)


# What a user imports beside `kvmem` itself. Each has an `__all__`.
DOCUMENTED = [
    "kvmem", "kvmem.allocator", "kvmem.allocator.batch", "kvmem.allocator.cascade", "kvmem.allocator.ops", "kvmem.allocator.prefetch", "kvmem.memory",
    "kvmem.memory.pool", "kvmem.integrations.cuda_python", "kvmem.integrations.dense_batch",
    "kvmem.integrations.transformers", "kvmem.near", "kvmem.plan", "kvmem.selectors",
]  # fmt: skip


def undocumented(name: str, target: Any) -> list[str]:
    """What lacks a docstring of `target`: itself, its public methods and properties, fields its docstring does not name."""
    found = [] if inspect.getdoc(target) else [name]
    if not inspect.isclass(target):
        return found
    fields = [field.name for field in dataclasses.fields(target)] if dataclasses.is_dataclass(target) else []
    for each, value in vars(target).items():
        described = isinstance(value, (property, staticmethod, classmethod)) or callable(value)
        if not each.startswith("_") and each not in fields and described and not inspect.getdoc(getattr(target, each)):
            found.append(f"{name}.{each}")
    return found + [f"{name}.{f}" for f in fields if not re.search(rf"\b{f}\b", target.__doc__ or "")]


@pytest.mark.parametrize("module", DOCUMENTED)
def test_every_public_name_is_documented(module: str) -> None:
    if module == "kvmem.integrations.transformers":
        pytest.importorskip("transformers", reason="transformers is an optional package")
    loaded = importlib.import_module(module)
    assert loaded.__doc__ and loaded.__all__
    public = [(f"{module}.{name}", getattr(loaded, name)) for name in loaded.__all__]
    described = [(name, value) for name, value in public if inspect.isclass(value) or inspect.isfunction(value)]
    assert [missing for name, value in described for missing in undocumented(name, value)] == []


def test_what_lacks_a_docstring_is_found() -> None:
    @dataclasses.dataclass
    class Sample:
        """named: int."""

        named: int
        unnamed: int

        @property
        def size(self) -> int:
            return 0

        def call(self) -> None: ...

        def told(self) -> None:
            """Is documented."""

    assert sorted(undocumented("S", Sample)) == ["S.call", "S.size", "S.unnamed"]


def test_fields_of_a_batch_say_shape_and_dtype() -> None:
    for name in kvmem.allocator.batch_buffers.FIELDS:
        for field in (name, f"{name}_cpu"):
            assert re.match(
                r"int(32|64|32 or int64) \[[A-Z0-9, +]+\]", inspect.getdoc(getattr(kvmem.Batch, field)) or ""
            ), field
