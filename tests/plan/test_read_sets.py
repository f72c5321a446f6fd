"""Which bytes attention reads, against a reference whose every element of K and V says where it lies."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from prefetch_world import BLOCK, HEADS, LAYERS, LAYOUTS, WIDTH, bytes_in_order, grow, make

import kvmem
from kvmem import CacheSpec, SpecError, StaleHandle, _core
from kvmem.allocator.prefetch import Ranges
from kvmem.allocator.prefetch.ranges import first_seen
from kvmem.geometry import plain
from kvmem.kernels import reference


def populate(alloc: kvmem.Allocator, rng: random.Random) -> list[kvmem.Sequence]:
    """Sequences of unequal lengths, some of which share prefixes: by fork, by prompt, and by fork of a fork."""
    prompt = [rng.randrange(1000) for _ in range(rng.randrange(150, 400))]
    first = alloc.sequence()
    first.extend(len(prompt))
    first.commit(prompt)
    found = [first, first.fork(), alloc.sequence(), alloc.sequence(prompt[: rng.randrange(60, len(prompt))])]
    for sequence in found:
        grow(sequence, rng.randrange(1, 60), rng)
    found.append(found[1].fork())
    if alloc.spec.groups[0].window_tokens is None:
        found[0].truncate(rng.randrange(100, found[0].num_tokens))
    grow(found[-1], rng.randrange(1, 30), rng)
    found.append(alloc.sequence())
    rng.shuffle(found)
    return found


def stamp(alloc: kvmem.Allocator, sequences: list[kvmem.Sequence]) -> set[float]:
    """Write a number of its own to every element that a sequence has; return those of tokens that are not committed."""
    batch, number, new = alloc.batch(sequences), 1, set[float]()
    for layer in range(alloc.spec.num_layers):
        for name in "kv":
            tensor = plain(alloc.tensor(layer, name))
            for row, sequence in enumerate(sequences):
                for token in range(int(batch.first_tokens_cpu[row]), sequence.num_tokens):
                    cells = tensor[int(batch.block_table[row, token // BLOCK]), token % BLOCK]
                    if cells[0, 0] == 0:  # not seen as another sequence's
                        cells.view(-1).copy_(torch.arange(number, number + HEADS * WIDTH))
                        number += HEADS * WIDTH
                    if token >= sequence.num_committed_tokens:
                        new |= set(cells.flatten().tolist())
    assert number < 2**24  # float32 counts so far
    return new


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[float]:
    """Every element of K and V that the reference computes with."""
    found = set[float]()

    def watched(name: str, place: int) -> Any:
        call = getattr(reference, name)

        def watch(*args: Any) -> Any:
            found.update(args[place].flatten().tolist())
            return call(*args)

        return watch

    monkeypatch.setattr(reference, "_scores", watched("_scores", 1))
    monkeypatch.setattr(reference, "_weighted", watched("_weighted", 1))
    return found


def elements(ranges: Ranges) -> Counter[float]:
    data = b"".join(_core.read_bytes(begin, end - begin) for begin, end in ranges.pieces().tolist())
    return Counter(np.frombuffer(data, np.float32).tolist())


@pytest.mark.parametrize(("interleave", "layers"), [("all", 2), ("none", 2), (1, 2), ("all", 3), (2, 3)])
@pytest.mark.parametrize("window", [None, 1, 37])
def test_a_read_set_is_what_the_reference_reads(
    backend: str, interleave: Any, layers: int, window: int | None, rng: random.Random, seen: set[float]
) -> None:
    alloc = make(backend, interleave, window, layers)
    sequences = populate(alloc, rng)
    for sequence in sequences:
        sequence.extend(rng.randrange(1, 5))
    batch, new = alloc.batch(sequences), stamp(alloc, sequences)
    q = torch.randn(batch.num_new_tokens, 2 * HEADS, WIDTH)
    for layer in range(layers):
        seen.clear()
        reference.oracle(q, alloc.kv(layer), batch, window_tokens=window)
        found = alloc.read_set(layer, batch)
        assert found.num_bytes == 4 * elements(found).total()
        assert set(elements(found)) == seen - new and new & seen
        assert elements(Ranges(found.table)) == elements(found)
        # Shared memory is there once; on the virtual backend, pages of whole blocks without a window.
        if backend == "paged" or (window is None and layers == 2):
            assert max(elements(found).values(), default=1) == 1
            assert sum(s.num_committed_tokens for s in sequences) * 64 > found.num_bytes or window is not None
        assert alloc.read_set(layer, [s.id for s in sequences]).rows.tolist() == found.rows.tolist()


@pytest.mark.parametrize("interleave", LAYOUTS)
def test_order_and_number_of_ranges(backend: str, interleave: Any) -> None:
    """One sequence after the other, K of a run of tokens before its V, as few rows as the memory allows."""
    alloc = make(backend, interleave)
    first, second = alloc.sequence(), alloc.sequence()
    for _ in range(10):  # on the paged backend, their blocks alternate
        for sequence in (second, first):
            sequence.extend(BLOCK)
            sequence.commit(count=BLOCK)
    found = alloc.read_set(1, [first, second])
    per_run = 2 if interleave == "none" else 1
    assert len(found.rows) == per_run * (2 if backend == "virtual" else 20)
    owners = found.where[:, 1].tolist()
    assert owners == sorted(owners, key=[first.id, second.id].index)
    read = iter(found.table[:, 0].tolist())
    for sequence in (first, second):
        k, v = sequence.kv(1) if backend == "virtual" else (None, None)
        if k is not None:
            assert next(read) == k.data_ptr()
            assert interleave != "none" or next(read) == v.data_ptr()
    assert alloc.read_set(1, [first, second.id, first]).rows.tolist() == found.rows.tolist()
    only_v = alloc.read_set(1, [first], components=["v"])
    assert only_v.num_bytes == found.num_bytes // 4


def test_a_long_sequence_is_one_row() -> None:
    alloc = make("virtual", max_tokens=1 << 15, memory=64 << 20)
    sequence = alloc.sequence()
    sequence.extend(1 << 15)
    sequence.commit(count=1 << 15)
    assert len(alloc.read_set(0, [sequence]).rows) == 1


def test_groups_of_other_kinds(backend: str) -> None:
    """Cross attention, whose tokens are fixed after prefill, and a state of fixed size."""
    kv = [kvmem.Component(name, heads=2, width=4, dtype=torch.float32) for name in ("k", "v")]
    cross = [kvmem.Component(f"cross_{c.name}", heads=2, width=4, dtype=torch.float32, growth="prefill") for c in kv]
    state = kvmem.Component("state", heads=1, width=8, dtype=torch.float32, growth="fixed")
    groups = (
        kvmem.Group("self", tuple(kv), (0, 1)),
        kvmem.Group("cross", tuple(cross), (0, 1), max_tokens=64),
        kvmem.Group("state", (state,), (1,)),
    )
    alloc = kvmem.Allocator(
        CacheSpec(groups, block_size=4), backend=backend, device="cpu", memory=1 << 20, max_sequences=2, max_tokens=64,
        page_bytes=4096,
    )  # fmt: skip
    sequence = alloc.sequence()
    assert alloc.read_set(1, [sequence]).num_bytes == 0
    sequence.extend(9, group=1)
    sequence.extend(5)
    sequence.commit(count=9, group=1)
    sequence.commit(count=5)
    sequence.extend(1)
    assert alloc.read_set(0, [sequence]).num_bytes == (5 + 9) * 64
    assert alloc.read_set(1, [sequence]).num_bytes == (5 + 9) * 64 + 32
    assert set(alloc.read_set(1, [sequence]).where[:, 0].tolist()) == {0, 1, 2}


def test_bad_input(backend: str) -> None:
    alloc = make(backend)
    sequence = alloc.sequence()
    for layer, what in ((LAYERS, "layer"), (True, "layer"), (-1, "layer")):
        with pytest.raises(SpecError, match=what):
            alloc.read_set(layer, [sequence])
    with pytest.raises(SpecError, match="several"):
        alloc.read_set(0, sequence)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="component"):
        alloc.read_set(0, [sequence], components=["state"])
    assert alloc.read_set(0, []).num_bytes == len(alloc.read_set(0, [])) == 0
    sequence.free()
    with pytest.raises(StaleHandle):
        alloc.read_set(0, [sequence])
    with pytest.raises(SpecError, match="dense"):
        Ranges.of(torch.empty(4, 6)[:, ::2])
    assert Ranges.of(torch.empty(0)).num_bytes == 0
    weight = torch.empty(4, 6, dtype=torch.float16)
    assert Ranges.of(weight.T).rows.tolist() == [[weight.data_ptr(), 48, 1, 48]]


def test_cuts_and_differences_of_ranges(rng: random.Random) -> None:
    """Against lists of addresses."""
    for _ in range(50):
        rows = [(rng.randrange(200), rng.randrange(1, 9), rng.randrange(1, 9), rng.randrange(9, 13)) for _ in range(3)]
        ranges, other = (Ranges(np.array(some, np.int64)) for some in (rows[:1], rows[1:2]))
        mine, others = bytes_in_order(ranges), bytes_in_order(other)
        for n in (0, 1, rng.randrange(len(mine) + 1), len(mine), len(mine) + 5):
            assert bytes_in_order(ranges.cut(n)) == mine[:n]
            assert ranges.cut(n).num_bytes == min(n, len(mine))
        rest = [at for at in mine if at not in set(others)]
        assert sorted(bytes_in_order(ranges.without([other]))) == sorted(rest)
        assert bytes_in_order(Ranges(ranges.table)) == mine
        spans = np.array([(b, b + rng.randrange(1, 20)) for b in (rng.randrange(60) for _ in range(6))], np.int64)
        source, parts = first_seen(spans)
        owners = {at: i for i, (b, e) in reversed(list(enumerate(spans.tolist()))) for at in range(b, e)}
        assert {
            at: i for i, (b, e) in zip(source.tolist(), parts.tolist(), strict=True) for at in range(b, e)
        } == owners
        assert source.tolist() == sorted(source.tolist())
