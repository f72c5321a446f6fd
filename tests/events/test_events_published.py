"""What ``to_wire()`` gives by default is decoded by the event classes of the engines' published packages, strictly.

They are looked for where ``python -m benchmarks.peers`` has the packages (``build/peers``, or ``KVMEM_PEERS``), and where
``make events-peers`` puts SGLang's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from support import hybrid_windows, make_allocator
from support_published import published_classes
from test_events_wire import EVENTS, A, B, C, as64

from kvmem.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, to_wire

msgpack = pytest.importorskip("msgpack", reason="needs the extra kvmem[test]")
msgspec = pytest.importorskip("msgspec", reason="needs the extra kvmem[test]")

_BUILD = Path(__file__).resolve().parents[2] / "build"
FOLDERS = (Path(os.environ.get("KVMEM_PEERS", _BUILD / "peers")), _BUILD / "published")
MODULES = {"sglang": "sglang.srt.disaggregation.kv_events", "vllm": "vllm.distributed.kv_events"}


@pytest.fixture(params=sorted(MODULES))
def engine(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """Its name, and the class of its batches."""
    name = str(request.param)
    for folder in FOLDERS:
        if (folder / name / f"{MODULES[name].replace('.', '/')}.py").is_file():
            return name, published_classes(folder / name, MODULES[name]).KVEventBatch
    pytest.skip(f"{name} is in none of {FOLDERS}: `make events-peers`, or as `python -m benchmarks.peers` says")


def decode(batch: Any, events: list[Event], **options: str) -> list[Any]:
    data = msgpack.packb(to_wire(events, 12.5, 3, **options))  # type: ignore[arg-type]
    found = msgspec.msgpack.decode(data, type=batch, strict=True)
    assert found.ts == 12.5
    events_found: list[Any] = found.events
    return events_found


def test_the_default_is_read(engine: tuple[str, Any]) -> None:
    name, batch = engine
    first, second, removed, cleared = decode(batch, EVENTS)
    assert first.block_hashes == [as64(B), as64(C)] and first.parent_block_hash == as64(A)
    assert first.token_ids == [1, 2, 3, 150_000] and (first.block_size, first.medium) == (2, "GPU")
    assert (first.lora_name, second.lora_name, second.parent_block_hash) == (None, "lora", None)
    assert (removed.block_hashes, removed.medium) == ([as64(B)], "CPU")
    assert type(cleared).__name__ == "AllBlocksCleared"
    if name == "vllm":
        assert second.extra_keys == [None, ("image",)]
        assert (second.group_idx, second.kv_cache_spec_kind, second.kv_cache_spec_sliding_window) == (
            1,
            "sliding_window",
            40,
        )
        assert removed.group_idx == 1
        assert decode(batch, EVENTS, hashes="bytes")[0].block_hashes == [B, C]


def test_lists_are_for_others(engine: tuple[str, Any]) -> None:
    """If an engine takes them again, the document and the default should be looked at."""
    with pytest.raises(msgspec.ValidationError):
        decode(engine[1], EVENTS, form="array")


def test_a_life_of_events_is_read(engine: tuple[str, Any], backend: str) -> None:
    """A hybrid with adapters and images, until something is given up; and of a group with a state what it would be."""
    alloc = make_allocator(hybrid_windows(16), backend, page_bytes=4096, memory=60 * 4096, events=4096)
    for number in range(12):
        prompt = [*range(64), *[number] * 40, *range(200)]
        with alloc.sequence(prompt, adapter=("a", None)[number % 2], extra_key=f"image {number}") as sequence:
            if not sequence.try_extend(len(prompt) - sequence.num_cached_tokens):
                continue
            sequence.commit(prompt[sequence.num_cached_tokens :])
    alloc.clear_cache()
    events = alloc.events()
    state = BlockStored((B,), A, tuple(range(16)), 16, "GPU", 2, "mamba", None, None, 3)
    events += [state, BlockRemoved((B,), "GPU", 2)]
    assert {type(event) for event in events} == {BlockStored, BlockRemoved, AllBlocksCleared}
    found = decode(engine[1], events)
    assert [type(event).__name__ for event in found] == [type(event).__name__ for event in events]
    assert [getattr(event, "block_hashes", []) for event in found] == [
        list(map(as64, getattr(event, "block_hashes", []))) for event in events
    ]
