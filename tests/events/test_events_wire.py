"""The wire form of cache events, read back by decoders that were written after the consumers' own, not after ours.

The classes below have the fields, order and options of the event classes that engines had, whose packages nobody
installs any more: msgspec checks types strictly. Those of today are in test_events_published.py, from the packages
themselves. The positional reader checks what routers in other languages check by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import kvmem
from kvmem.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, to_wire

msgpack = pytest.importorskip("msgpack", reason="needs the extra kvmem[test]")
msgspec = pytest.importorskip("msgspec", reason="needs the extra kvmem[test]")

A, B, C = (bytes(range(i, i + 32)) for i in (0, 60, 200))
Hash = int | bytes


def stored(**changes: Any) -> BlockStored:
    fields: dict[str, Any] = dict(
        block_hashes=(B, C), parent_block_hash=A, token_ids=(1, 2, 3, 150_000), block_size=2, medium="GPU", group=0,
        group_kind="full_attention", window_tokens=None, extra_keys=None, ordinal=1,
    )  # fmt: skip
    return BlockStored(**{**fields, **changes})


EVENTS: list[Event] = [
    stored(),
    stored(
        parent_block_hash=None,
        group=1,
        group_kind="sliding_window",
        window_tokens=40,
        extra_keys=(None, ("image",)),
        adapter="lora",
    ),
    BlockRemoved((B,), "CPU", 1),
    AllBlocksCleared(),
]


def as64(digest: bytes) -> int:
    return int.from_bytes(digest, "big") & (2**64 - 1)


# ---- The engines' classes --------------------------------------------------------------------------------------------


class ArrayBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class FirstEvent(msgspec.Struct, array_like=True, omit_defaults=True, tag=True):
    """vLLM when events were new, and SGLang: block_hashes are integers, and there are no groups."""


class FirstStored(FirstEvent, tag="BlockStored"):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None = None


class FirstRemoved(FirstEvent, tag="BlockRemoved"):
    block_hashes: list[int]
    medium: str | None = None


class FirstCleared(FirstEvent, tag="AllBlocksCleared"):
    pass


class FirstBatch(ArrayBatch):
    events: list[FirstStored | FirstRemoved | FirstCleared]


class ListedEvent(msgspec.Struct, array_like=True, omit_defaults=True, tag=True):
    """vLLM with groups, events as lists."""


class ListedStored(ListedEvent, tag="BlockStored"):
    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None


class ListedRemoved(ListedEvent, tag="BlockRemoved"):
    block_hashes: list[Hash]
    medium: str | None
    group_idx: int | None = None


class ListedCleared(ListedEvent, tag="AllBlocksCleared"):
    pass


class ListedBatch(ArrayBatch):
    events: list[ListedStored | ListedRemoved | ListedCleared]


class NamedEvent(msgspec.Struct, omit_defaults=True, tag=True):
    """vLLM now: events as maps, in a batch that is a list."""


class NamedStored(NamedEvent, tag="BlockStored"):
    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None


class NamedRemoved(NamedEvent, tag="BlockRemoved"):
    block_hashes: list[Hash]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None


class NamedCleared(NamedEvent, tag="AllBlocksCleared"):
    pass


class NamedBatch(ArrayBatch):
    events: list[NamedStored | NamedRemoved | NamedCleared]


def packed(**options: Any) -> bytes:
    data: bytes = msgpack.packb(to_wire(EVENTS, 12.5, 3, **{"form": "array", **options}))
    return data


@pytest.mark.parametrize(("form", "kind"), [("array", ListedBatch), ("map", NamedBatch)])
@pytest.mark.parametrize("hashes", ["int", "bytes"])
def test_vllm_classes_read_it(form: str, kind: type[ArrayBatch], hashes: str) -> None:
    batch = msgspec.msgpack.decode(packed(form=form, hashes=hashes), type=kind, strict=True)
    as_hash = as64 if hashes == "int" else bytes
    assert (batch.ts, batch.data_parallel_rank) == (12.5, 3)
    first, second, removed, cleared = batch.events
    assert first.block_hashes == [as_hash(B), as_hash(C)] and first.parent_block_hash == as_hash(A)
    assert first.token_ids == [1, 2, 3, 150_000] and first.block_size == 2
    assert (first.lora_id, first.medium, first.lora_name, first.extra_keys) == (None, "GPU", None, None)
    assert (first.group_idx, first.kv_cache_spec_kind, first.kv_cache_spec_sliding_window) == (
        0,
        "full_attention",
        None,
    )
    assert second.parent_block_hash is None and second.extra_keys == [None, ("image",)] and second.lora_name == "lora"
    assert (second.group_idx, second.kv_cache_spec_sliding_window) == (1, 40)
    assert (removed.block_hashes, removed.medium, removed.group_idx) == ([as_hash(B)], "CPU", 1)
    assert type(cleared).__name__.endswith("Cleared")


@pytest.mark.parametrize(("form", "kind"), [("array", ListedBatch), ("map", NamedBatch)])
def test_these_classes_would_have_sent_the_same(form: str, kind: type[ArrayBatch]) -> None:
    """Encoded again by the engines' own encoder it is equal, field by field: nothing is missing or to spare."""
    again = msgspec.msgpack.encode(msgspec.msgpack.decode(packed(form=form), type=kind))
    assert msgpack.unpackb(again) == msgpack.unpackb(packed(form=form))


def test_sglang_classes_read_it() -> None:
    batch = msgspec.msgpack.decode(packed(), type=FirstBatch, strict=True)
    first, second, removed, cleared = batch.events
    assert first.block_hashes == [as64(B), as64(C)] and first.parent_block_hash == as64(A)
    assert (first.medium, second.parent_block_hash, second.block_size) == ("GPU", None, 2)
    assert removed.block_hashes == [as64(B)] and removed.medium == "CPU" and isinstance(cleared, FirstCleared)


def test_a_positional_reader_in_another_language_reads_it() -> None:
    """What Dynamo, AIBrix and llm-d demand between them: a triple with a float and an integer, each event a list that
    begins with its name, integers that fit u64 and u32, group and window as the only numbers behind position 8."""
    ts, events, rank = msgpack.unpackb(packed(), raw=False)
    assert type(ts) is float and type(rank) is int
    for event in events:
        assert isinstance(event, list) and event[0] in ("BlockStored", "BlockRemoved", "AllBlocksCleared")
        if event[0] == "AllBlocksCleared":
            assert event == ["AllBlocksCleared"]
            continue
        assert all(type(h) is int and 0 <= h < 2**64 for h in event[1])
        if event[0] == "BlockRemoved":
            assert isinstance(event[2], str) and event[3] in (0, 1) and len(event) == 4
            continue
        _, hashes, parent, tokens, size, lora_id, medium, lora_name, extra_keys, *tail = event
        assert parent is None or 0 <= parent < 2**64
        assert all(type(t) is int and 0 <= t < 2**32 for t in tokens) and len(tokens) == size * len(hashes)
        assert lora_id is None and lora_name in (None, "lora") and isinstance(medium, str)
        assert extra_keys is None or len(extra_keys) == len(hashes)
        assert tail in ([0, "full_attention", None], [1, "sliding_window", 40])


def test_64_bits_are_the_last_of_the_digest() -> None:
    """So a consumer that gets bytes and cuts them down, as llm-d does, arrives at the same number."""
    (removed,) = to_wire([BlockRemoved((A,), "GPU", 0)], 0.0)[1]
    (full,) = to_wire([BlockRemoved((A,), "GPU", 0)], 0.0, hashes="bytes")[1]
    assert full["block_hashes"] == [A] and removed["block_hashes"] == [int.from_bytes(A[-8:], "big")]


def test_a_salt_is_nowhere_on_the_wire() -> None:
    event = stored(extra_keys=(("image", 7), None), adapter="adapter")
    data = msgpack.packb(to_wire([event], 0.0))
    assert b"adapter" in data and b"image" in data
    assert not any("salt" in name for name in BlockStored.__dataclass_fields__)


def test_the_example_of_the_document_runs() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "events.md").read_text()
    runnable = [code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "import" in code]
    assert len(runnable) == 1 and runnable[0].count("assert") == 2
    exec(runnable[0], {})


def test_the_table_of_the_document_has_the_fields_in_their_order() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "events.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `(\w+)`( \*)? \|", text, re.M)
    names = [name for _, name, _ in rows]
    table = {"BlockStored": names[:12], "BlockRemoved": names[12:]}
    assert [int(position) for position, _, _ in rows] == [*range(12), *range(4)]
    for kind, event in (("BlockStored", ListedStored), ("BlockRemoved", ListedRemoved)):
        assert table[kind] == ["type", *event.__struct_fields__]
        assert table[kind] == list(to_wire([EVENTS[1 if kind == "BlockStored" else 2]], 0.0, form="map")[1][0])


def test_other_words_are_refused() -> None:
    for wrong in ({"hashes": "hex"}, {"form": "json"}):
        with pytest.raises(kvmem.SpecError):
            to_wire([], 0.0, **wrong)  # type: ignore[arg-type]
    assert to_wire([], 1) == [1.0, [], 0]
