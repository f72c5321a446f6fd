"""Token ids as the content index keeps them: packed at the width of the largest that ever came, and compared as if they
were not; and blocks whose hashes are equal, which only their ids tell apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from event_world import Router
from lockstep_prefix import NO_ROOT
from support import LONG, i32, make_allocator, plain
from support_prefix import agree, cached, grow, world

import kvmem
from benchmarks.workload import heap_bytes
from kvmem import _core
from kvmem.events.digests import block_digests

pytestmark = pytest.mark.core
BLOCK = 16
LARGEST = 2**31 - 1
#: What is added to ids below 50,000: they need 16 bits, then 17, 18, 29 (for which 32 are taken) and 31.
BASES = (0, 2**16, 2**17, 2**28, LARGEST - 50_000)
Make = Callable[..., kvmem.Allocator]


# ---- The packed blocks ---------------------------------------------------------------------------


def copied(blocks: _core.TokenBlocks, block: int, count: int) -> list[int]:
    out = np.full(count, -7, np.int32)
    blocks.copy(block, out)
    return out.tolist()


def some_ids(rng: np.random.Generator, bits: int, count: int) -> np.ndarray:
    """Of up to ``bits`` bits, the smallest and largest often; with 32, negative ones too."""
    ids = rng.integers(0, 1 << bits, count, dtype=np.uint32)
    edges = rng.integers(0, 4, count)
    ids[edges == 0] = (1 << bits) - 1
    ids[edges == 1] = 0
    return ids.view(np.int32)


def agrees(blocks: _core.TokenBlocks, kept: dict[int, np.ndarray], rng: np.random.Generator) -> None:
    """Every block reads as it was put, whatever came after it."""
    for block, ids in kept.items():
        count = int(rng.integers(0, len(ids) + 1))
        assert copied(blocks, block, count) == ids[:count].tolist()
        assert blocks.common(block, ids[:count]) == count
        assert blocks.common(block, ids) == len(ids)


@pytest.mark.parametrize("block_tokens", [1, 2, 3, 7, 16, 33, 100])
def test_blocks_read_as_they_were_put(block_tokens: int, seed: int) -> None:
    """Also those put before the width was raised, and those next to one that was put anew."""
    rng = np.random.default_rng(seed)
    for _ in range(20 if LONG else 4):
        blocks, kept = _core.TokenBlocks(block_tokens), {}
        for bits in sorted(rng.integers(1, 33, 6).tolist()):
            blocks.reserve(len(kept) + 10)
            for block in rng.integers(0, len(kept) + 10, 12).tolist():
                kept[block] = some_ids(rng, bits, block_tokens)
                blocks.put(block, kept[block])
            agrees(blocks, kept, rng)


@pytest.mark.parametrize("block_tokens", [1, 3, 16])
def test_one_bit_in_one_id_is_a_difference(block_tokens: int, seed: int) -> None:
    """Of the query's ids, above the width in use as well as below."""
    rng = np.random.default_rng(seed)
    for bits in (9, 16, 17, 18, 24, 28, 32):
        blocks = _core.TokenBlocks(block_tokens)
        blocks.reserve(3)
        for block in range(3):
            blocks.put(block, some_ids(rng, bits, block_tokens))
        ids = some_ids(rng, bits, block_tokens)
        blocks.put(1, ids)
        for place in range(block_tokens):
            for bit in range(32):
                other = ids.view(np.uint32).copy()
                other[place] ^= np.uint32(1 << bit)
                assert blocks.common(1, other.view(np.int32)) == place
                assert blocks.common(1, other.view(np.int32)[:place]) == place


def test_the_width_is_that_of_the_largest_id() -> None:
    blocks = _core.TokenBlocks(2)
    blocks.reserve(1)
    widths = []
    for ids in (
        [0, 0],
        [2**16 - 1, 5],
        [2**16, 0],
        [3, 2**17],
        [1, 1],
        [2**28 - 1, 0],
        [0, 2**28],
        [LARGEST, 1],
        [-1, 0],
    ):
        blocks.put(0, i32(*ids))
        assert copied(blocks, 0, 2) == ids
        widths.append(blocks.bits)
    assert widths == [16, 16, 17, 18, 18, 28, 32, 32, 32], "and it stays"


def test_a_block_takes_the_bytes_of_its_bits() -> None:
    """Also after it was widened, and after growth by a little: no table is doubled."""
    before = heap_bytes()
    seen = np.ones(8 << 20, np.uint8)
    if before is None or (heap_bytes() or 0) - before < seen.nbytes:
        pytest.skip("only glibc's own malloc tells what it has given out: another libc, or a sanitizer's")
    before = heap_bytes() or 0
    blocks = _core.TokenBlocks(BLOCK)
    blocks.reserve(40_000)
    for block in range(100):
        blocks.put(block, np.full(BLOCK, 128_000 + block, np.int32))
    blocks.reserve(50_000)
    used = (heap_bytes() or 0) - before
    assert blocks.bits == 17 and 0.95 * 50_000 * 34 < used < 1.05 * 50_000 * 34
    assert all(copied(blocks, block, BLOCK) == [128_000 + block] * BLOCK for block in range(100))


def test_what_does_not_fit_is_refused() -> None:
    blocks = _core.TokenBlocks(4)
    blocks.reserve(2)
    for block in (-1, 2):
        with pytest.raises(kvmem.SpecError, match="2 blocks of 4"):
            blocks.put(block, i32(1, 2, 3, 4))
        with pytest.raises(kvmem.SpecError, match="2 blocks of 4"):
            blocks.common(block, i32(1))
    for ids in (i32(1, 2, 3), i32(1, 2, 3, 4, 5)):
        with pytest.raises(kvmem.SpecError, match="2 blocks of 4"):
            blocks.put(0, ids)
    with pytest.raises(kvmem.SpecError, match="2 blocks of 4"):
        blocks.copy(0, np.zeros(5, np.int32))


# ---- In the index ----------------------------------------------------------------------------------


@pytest.fixture
def make(backend: str) -> Iterator[Make]:
    opened: list[kvmem.Allocator] = []

    def build(**options: object) -> kvmem.Allocator:
        sizes = {"page_bytes": 4096, "memory": 400 * 4096}
        opened.append(make_allocator(plain(BLOCK), backend, **{**sizes, **options}))
        return opened[-1]

    yield build
    for alloc in opened:
        assert alloc.check() == []


def prompt(base: int, count: int, seed: int = 1) -> list[int]:
    return (base + np.random.default_rng(seed).integers(0, 50_000, count)).tolist()


def test_wider_ids_leave_what_is_cached_as_it_was(make: Make) -> None:
    """Whole blocks, the equal part of one, and what is left of one that is cut: compared with the reference model, and
    every byte with who wrote it."""
    pair = world(make)
    grown: list[list[int]] = []
    for number, base in enumerate(BASES):
        for seed in (1, 2):
            grown.append(prompt(base, 3 * BLOCK + 5, seed))
            pair.free([grow(pair, grown[-1])])
        for old in grown:
            again = pair.open(old)
            assert cached(pair, again) == 3 * BLOCK
            branch = pair.open([*old[: 2 * BLOCK + 7], old[0] ^ 1, 3])
            assert cached(pair, branch) == 2 * BLOCK + 7
            agree(pair)
            pair.free([again, branch])
        # A block that is cut and completed by the same ids is the same block, so what was kept of it was right.
        other = grow(pair, old := prompt(base, 2 * BLOCK, 3))
        pair.truncate(other, BLOCK + number + 1)
        grow(pair, prompt(BASES[-1 - number], BLOCK, 4))
        assert pair.append(other, old[BLOCK + number + 1 :])
        agree(pair)
        assert cached(pair, pair.open([*old, 1])) == 2 * BLOCK
        pair.free(list(pair.handles))


def test_events_tell_the_ids_whatever_their_width(make: Make) -> None:
    """When a block is stored, and in the walk over what is resident."""
    alloc, router = make(events=256), Router()
    wanted = set()
    for base in BASES:
        ids = prompt(base, 2 * BLOCK)
        with alloc.sequence(ids) as sequence:
            sequence.extend(len(ids))
            sequence.commit(ids)
        told = alloc.events()
        assert [token for e in told for token in getattr(e, "token_ids", ())] == ids
        router.follow(told)
        wanted |= set(block_digests(alloc.spec, ids))
        resident = Router()
        resident.follow(alloc.events(restart=True))
        assert {held[2] for held in resident.held} == {held[2] for held in router.held} == wanted


@pytest.mark.parametrize("bits", ["1", "3", "64"])
def test_blocks_of_one_parent_are_told_apart_by_their_ids(
    make: Make, monkeypatch: pytest.MonkeyPatch, bits: str
) -> None:
    """Invariant 7, where the index looks a block up by its hash: beside others that continue the same tokens. With few
    bits it finds many of one hash, under this salt and another, and must take the one with these ids or none."""
    monkeypatch.setenv("KVMEM_HASH_BITS", bits)
    pair = world(make, max_sequences=64, memory=3000 * 4096, partial_reuse=False)
    start = prompt(0, BLOCK, 9)
    ends = [[*start, *prompt(0, BLOCK, 10 + i), 1] for i in range(24)]
    for root in (NO_ROOT, ("salt", None)):
        for end in ends:
            pair.free([grow(pair, end, root)])
    for end in ends:
        for root, known in ((NO_ROOT, 2), (("salt", None), 2), (("other", None), 0)):
            assert pair.match(end, root).num_tokens == known * BLOCK
        for place in (BLOCK, 2 * BLOCK - 1):
            stranger = end.copy()
            stranger[place] += 50_000
            assert pair.match(stranger).num_tokens == BLOCK
    pair.free([pair.open(end) for end in ends[::2]])
    pair.clear_cache()
    assert all(pair.match(end).num_tokens == 0 for end in ends)
    agree(pair)
