"""Bad input to memory and construction: how much there is, and what allocator can be made."""

from __future__ import annotations

from typing import Any

import pytest
from bad_input import make, refused, world
from support_world import PAGE, World, plain_spec

import kvmem
from kvmem import DeviceError, OutOfMemory, SpecError

__all__ = ["world"]


# --- memory ---


def test_out_of_memory_says_how_much_would_fit(world: World) -> None:
    """The number in the message is the truth: that much fits, and one page's worth more does not."""
    alloc = kvmem.Allocator(plain_spec(), backend=world.alloc.backend, memory=6 * PAGE, page_bytes=PAGE, interleave=1, max_sequences=2,
                            max_tokens=4000)  # fmt: skip
    sequence = alloc.sequence()
    with pytest.raises(
        OutOfMemory, match=r"from 0 by 4000 tokens.*page\(s\) of 4096 bytes.*of 6 .*set_memory"
    ) as caught:
        sequence.extend(4000)
    fits = int(str(caught.value).split("could grow by about ")[1].split(".")[0])
    assert isinstance(caught.value, MemoryError) and alloc.check() == [] and sequence.num_tokens == 0
    assert not sequence.try_extend(fits + 64) and sequence.num_tokens == 0
    assert 64 <= fits <= 192
    sequence.extend(fits)


def test_too_many_sequences(world: World) -> None:
    refused(world, OutOfMemory, "all 4 are in use: free one, or raise max_sequences", lambda: world.alloc.open_batch(3))
    world.alloc.open_batch(2)
    for call in (
        world.alloc.sequence,
        lambda: world.core.fork(min(world.sequences)),
        lambda: world.alloc.open_batch(1),
    ):
        with pytest.raises(OutOfMemory, match="all 4 are in use"):
            call()
    for n in (-1, True, 1.0, None):
        with pytest.raises(SpecError, match="n: got"):
            world.alloc.open_batch(n)  # type: ignore[arg-type]


def test_less_memory_than_sequences_hold(world: World) -> None:
    held = world.alloc.stats()
    least = (held.mapped_bytes - held.parked_bytes) // PAGE
    refused(world, OutOfMemory, f"{least}, which is the smallest", lambda: world.alloc.set_memory(PAGE))
    refused(world, SpecError, "one page is 4 KiB", lambda: world.alloc.set_memory(PAGE - 1))
    world.alloc.set_memory(least * PAGE)
    world.healthy()


@pytest.mark.parametrize(
    "text", ["", "lots", "12 parsecs", "-1GiB", "1e9", "GiB", "1,5GiB", "0x10", -1, 1.5, True, None, b"1GiB", "1GiB2"]
)
def test_memory_that_nobody_can_read(world: World, text: Any) -> None:
    refused(world, SpecError, "memory: got", lambda: world.alloc.set_memory(text))
    with pytest.raises(SpecError, match="memory: "):
        make(memory=text)
    if text is not None:
        refused(world, SpecError, "bytes: got", lambda: world.alloc.trim(text))


# --- construction ---


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(memory=100), SpecError, "100 B; one page is 4 KiB, which is the least"),
        (dict(memory=0), SpecError, "0 B; one page is 4 KiB"),
        (dict(page_bytes=0), SpecError, "page_bytes: got 0"),
        (dict(page_bytes=1000), SpecError, "page_bytes: got 1000; must be a positive multiple of 4096"),
        (dict(page_bytes=-4096), SpecError, "page_bytes: got -4096"),
        (dict(page_bytes=2**62, memory=2**63), SpecError, "."),
        (dict(page_bytes=True), SpecError, "page_bytes: got True"),
        (dict(max_sequences=0), SpecError, "max_sequences: got 0"),
        (dict(max_sequences=True), SpecError, "max_sequences: got True"),
        (dict(max_sequences=2.0), SpecError, "max_sequences: got 2.0"),
        (dict(max_sequences=2**31), SpecError, "."),
        (dict(max_sequences=2**62), SpecError, "."),
        (dict(max_tokens=0), SpecError, "max_tokens: got 0"),
        (dict(max_tokens=2**31 - 1, max_sequences=2**20), SpecError, "would reserve.*lower max_sequences, max_tokens"),
        (dict(max_tokens=2**50), SpecError, r"max_tokens: got \d+; the largest that works is 2147483647"),
        (dict(max_sequences=2**20 + 1), SpecError, "max_sequences: got 1048577; the largest that works is 1048576"),
        (dict(cached_rows=2**40), SpecError, "cached_rows: got 1099511627776; the largest"),
        (dict(tail_guard_tokens=2**31), SpecError, "tail_guard_tokens: got 2147483648; the largest"),
        (dict(map_ahead_tokens=2**31), SpecError, "map_ahead_tokens: got 2147483648; the largest"),
        (dict(max_tokens=2**62), SpecError, "."),
        (dict(backend="mmu"), SpecError, "backend: got 'mmu'; must be one of virtual, paged"),
        (dict(backend=None), SpecError, "backend: got None"),
        (dict(zero="sometimes"), SpecError, "zero: got 'sometimes'"),
        (dict(interleave=0), SpecError, 'interleave: got 0; must be "all", "none" or a number of layers from 1 to '),
        (dict(interleave="some"), SpecError, """interleave: got 'some'; must be "all", "none" or"""),
        (dict(interleave="None"), SpecError, """interleave: got 'None'; must be "all", "none" or"""),
        (dict(interleave=True), SpecError, "interleave: got True"),
        (dict(map_ahead_tokens=-1), SpecError, "map_ahead_tokens: got -1"),
        (dict(tail_guard_tokens=1.5), SpecError, "tail_guard_tokens: got 1.5"),
        (dict(device="tpu"), DeviceError, "device: got 'tpu'; must be"),
        (dict(device="cuda:x"), DeviceError, "device: got 'cuda:x'"),
        (dict(memory=None), SpecError, "memory: missing"),
        (dict(memory=4095), SpecError, "memory: got 4095 B; one page is 4 KiB"),
        (dict(events=2**31), SpecError, "events: got 2147483648; the largest"),
        (dict(events=10**5000), SpecError, "events: got a number of 16610 bits"),
        (dict(debug="yes"), SpecError, "debug: got 'yes'"),
        (dict(record_ops=1), SpecError, "record_ops: got 1"),
        (dict(driver=5), SpecError, "driver: got int"),
    ],
)
def test_an_allocator_that_cannot_be_made(options: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        make(**options)


def test_more_pages_than_can_be_numbered() -> None:
    with pytest.raises(SpecError, match="memory"):
        make(memory="1024PiB")


def test_the_pool_decides_what_is_the_pools() -> None:
    pool = kvmem.PagePool(memory=10 * PAGE, page_bytes=PAGE)
    for extra in (dict(device="cpu"), dict(page_bytes=PAGE)):
        with pytest.raises(SpecError, match="belong to the pool"):
            kvmem.Allocator(plain_spec(), pool=pool, max_sequences=1, max_tokens=16, **extra)
    with pytest.raises(SpecError, match="must be a CacheSpec"):
        kvmem.Allocator({"layers": 2}, pool=pool, max_sequences=1, max_tokens=16)  # type: ignore[arg-type]


def test_what_is_recorded_is_one_allocators(world: World) -> None:
    recorded = make(record_ops=True)
    with pytest.raises(SpecError, match="ops of a shared pool"):
        kvmem.Allocator(plain_spec(), pool=recorded.pool, max_sequences=4, max_tokens=300)
    shared = kvmem.PagePool(device="cpu", memory=60 * PAGE, page_bytes=PAGE)
    with pytest.raises(SpecError, match="ops of a shared pool"):
        kvmem.Allocator(plain_spec(), pool=shared, max_sequences=4, max_tokens=300, record_ops=True)


@pytest.mark.parametrize("library", ["/nowhere/libcuda.so.1", __file__])
def test_a_driver_library_that_is_missing_or_none(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setenv("KVMEM_CUDA_DRIVER", library)
    with pytest.raises(DeviceError, match="cuda|CUDA"):
        make(device="cuda:0", page_bytes=None)


def test_meta_has_no_memory_to_show() -> None:
    alloc = make(device="meta")
    sequence = alloc.sequence()
    sequence.extend(10)
    with pytest.raises(DeviceError, match="metadata only"):
        alloc.kv(0)
    assert alloc.check() == []
