"""What layouts read, and what the ledger counts, against memory itself: at the addresses that ``read_set`` names lie the
bytes of the sequences, token by token.
"""

from __future__ import annotations

import ctypes
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from support import encoder_decoder, latent, plain, recurrent, shared_latent, unequal, windows

import kvmem
from kvmem.errors import SpecError, StaleHandle
from kvmem.geometry.views import plain as plain_tensor
from kvmem.layouts import TokenReader, read_set
from kvmem.memory.ledger import Ledger

SPECS = [plain, latent, unequal, windows, shared_latent, recurrent, encoder_decoder]
every_interleave = pytest.mark.parametrize("interleave", ["all", 1, "none"])
every_spec = pytest.mark.parametrize("spec_of", SPECS, ids=lambda f: f.__name__)


def world(spec: kvmem.CacheSpec, backend: str, interleave: Any) -> tuple[kvmem.Allocator, list[kvmem.Sequence]]:
    """190 tokens; their fork, with 7 new ones; 3 new ones. All of random bytes."""
    sizes = {"memory": "4MiB", "max_sequences": 6, "max_tokens": 400, "page_bytes": 4096}
    alloc = kvmem.Allocator(spec, backend=backend, device="cpu", interleave=interleave, **sizes)
    old, fresh = alloc.sequence(), alloc.sequence()
    for seq in (old, fresh):
        for g in [i for i, group in enumerate(spec.groups) if group.growth == "prefill"]:
            seq.extend(11, group=g)
            seq.commit(count=11, group=g)
    for _ in range(19):  # in pieces, so that windows move on
        old.extend(10)
        old.commit(count=10)
    (fork := old.fork()).extend(7)
    fresh.extend(3)
    for place in held(alloc, seqs := [old, fork, fresh]):
        put(alloc, *place, lambda shape: torch.randint(0, 256, shape, dtype=torch.uint8))
    return alloc, seqs


def put(alloc: kvmem.Allocator, layer: int, name: str, row: int, group: Any, draw: Any) -> None:
    """Write bytes, ``draw(shape)``, into all tokens that a sequence holds of a component."""
    blocks, tokens = alloc.tensor(layer, name), torch.arange(int(group.first_tokens[row]), int(group.seq_lens[row]))
    shape = (len(tokens), *blocks.shape[2:-1], blocks.shape[-1] * blocks.element_size())
    places = group.block_table[row, tokens // group.block_size].long(), tokens % group.block_size
    blocks[places] = draw(shape).view(blocks.dtype)


def held(alloc: kvmem.Allocator, seqs: list[kvmem.Sequence]) -> list[tuple[int, str, int, Any]]:
    """Layer, component, row and the group's batch of all that is stored; a shared copy once."""
    groups = zip(alloc.spec.groups, alloc.batch(seqs).groups, strict=True)
    return [
        (layer, c.name, row, batch)
        for group, batch in groups
        for c in group.components
        for layer in (group.layers[:1] if c.scope == "shared" else group.layers)
        for row in range(len(seqs))
    ]


def stored(alloc: kvmem.Allocator, seq: kvmem.Sequence, layer: int, name: str) -> torch.Tensor:
    """uint8 ``[tokens, bytes of a token]``, as the allocator shows one sequence; from the first token still held."""
    rows = alloc.sequence_tensor(seq, layer, name)
    return rows.contiguous().view(torch.uint8).flatten(1).as_subclass(torch.Tensor)


@every_spec
@every_interleave
def test_the_bytes_of_a_step(spec_of: Any, interleave: Any, backend: str) -> None:
    spec = spec_of(8)
    alloc, seqs = world(spec, backend, interleave)
    batch = alloc.batch(seqs, pad_to=5)
    for layer in range(spec.num_layers):
        names, want = [c.name for c in reversed(spec.layer_components(layer))], []
        for seq, new in zip(seqs, (0, 7, 3), strict=True):
            arenas: dict[int, list[tuple[int, torch.Tensor]]] = {}
            for name in names:
                rows, memory = stored(alloc, seq, layer, name), plain_tensor(alloc.tensor(layer, name))
                if window := spec.groups[spec.group_of(layer, name)].window_tokens:
                    rows = rows[-(window + new - 1) :]  # the first new token sees window - 1 before its own
                arenas.setdefault(memory.untyped_storage().data_ptr(), []).append((memory.data_ptr(), rows))
            for parts in arenas.values():  # side by side in each token
                want.append(torch.cat([rows for _, rows in sorted(parts, key=lambda part: part[0])], 1))
        found = read_set(alloc, batch, layer, tuple(names))
        spans = list(zip(found.begin.tolist(), found.end.tolist(), strict=True))
        assert b"".join(ctypes.string_at(a, b - a) for a, b in spans) == b"".join(w.numpy().tobytes() for w in want)
        assert found.bytes == sum(w.numel() for w in want)
        assert all(a < b for a, b in spans) and all(x[1] != y[0] for x, y in pairwise(spans))
    reader = TokenReader(alloc, batch, 0, 0)
    seqs[1].free()
    for read in (lambda: read_set(alloc, batch, 0, ()), lambda: reader.span(spec.layer_components(0)[0].name)):
        with pytest.raises(StaleHandle):
            read()


@pytest.mark.parametrize(("layers", "interleave", "ranges"), [(1, "all", 1), (2, "none", 2), (2, "all", 9)])
def test_ranges_that_touch_are_one(layers: int, interleave: str, ranges: int) -> None:
    spec = kvmem.CacheSpec.kv(num_layers=layers, num_kv_heads=1, head_dim=8, dtype=torch.float16)
    alloc = kvmem.Allocator(
        spec, backend="virtual", device="cpu", memory="1MiB", max_sequences=2, max_tokens=99, interleave=interleave
    )
    (seq := alloc.sequence()).extend(9)
    assert len(read_set(alloc, alloc.batch([seq]), layers - 1).begin) == ranges
    assert len(read_set(alloc, alloc.batch([alloc.sequence()]), 0).begin) == 0


@every_spec
@every_interleave
def test_what_a_reader_reads_and_counts(spec_of: Any, interleave: Any, backend: str, rng: random.Random) -> None:
    alloc, seqs = world(spec_of(8), backend, interleave)
    batch = alloc.batch(seqs)
    for layer, name, row, group in held(alloc, seqs):
        reader, rows = TokenReader(alloc, batch, layer, row), stored(alloc, seqs[row], layer, name)
        low, length = int(group.first_tokens_cpu[row]), int(group.seq_lens_cpu[row])
        assert (reader.span(name), reader.length) == ((low, length), seqs[row].num_tokens)
        first = rng.randint(low, length)
        for a, b in [(first, rng.randint(first, length)), (low, length), (length, length), (length - 1, None)]:
            alloc.ledger.reset()
            got = reader.rows(name, a, b).contiguous().view(torch.uint8).flatten(1)
            assert torch.equal(got, rows[a - low : None if b is None else b - low])
            assert alloc.ledger.read == {(name, "device"): got.numel()} and not alloc.ledger.moved
        blocks, ids = reader.blocks(name)
        assert len(ids) == length // group.block_size and alloc.ledger.read == {(name, "device"): got.numel()}
        whole = blocks[ids].flatten(0, 1)[low:].contiguous().view(torch.uint8).flatten(1)
        assert torch.equal(whole, rows[: len(whole)])
        for a, b in [(low - 1, length), (low, length + 1), (length, length - 1)]:
            with pytest.raises(SpecError, match=rf"{name}: got tokens \[{a}, {b}\); .*\[{low}, {length}\)"):
                reader.rows(name, a, b)


def own_bytes(alloc: kvmem.Allocator, seqs: list[kvmem.Sequence]) -> dict[tuple[str, str], int]:
    """Each sequence writes its number into all of its bytes. Those that it still finds are counted: shared ones once."""
    found: dict[tuple[str, str], int] = {}
    for place in (places := held(alloc, seqs)):  # rows ascend
        put(alloc, *place, lambda shape, row=place[2]: torch.full(shape, row + 1, dtype=torch.uint8))
    for layer, name, row, _ in places:
        own = int((stored(alloc, seqs[row], layer, name) == row + 1).sum())
        found[name, "device"] = found.get((name, "device"), 0) + own
    return found


@every_spec
@every_interleave
def test_what_is_held(spec_of: Any, interleave: Any, backend: str) -> None:
    alloc, seqs = world(spec_of(8), backend, interleave)
    found, layers = own_bytes(alloc, seqs), alloc.spec.num_layers
    for key, bytes in alloc.ledger.held.items():  # shared pages end within a token
        assert abs(bytes - found[key]) < (layers * 4096 if backend == "virtual" else 1)
    seqs.pop(1).free()
    found = own_bytes(alloc, seqs)
    assert alloc.ledger.held == found
    alloc.ledger.hold("scratch", 77)
    assert alloc.ledger.held == found | {("scratch", "device"): 77}
    alloc.ledger.hold("scratch", 0)
    assert alloc.ledger.held == found
    with pytest.raises(SpecError, match="bytes: got -1"):
        alloc.ledger.hold("scratch", -1)


def test_the_ledger_by_tier() -> None:
    ledger = Ledger(lambda: {"k": 5})
    ledger.count_read("k", 3)
    ledger.count_read("k", 4, "host")
    ledger.count_read("k", 4)
    ledger.count_moved("k", 9, "host")
    ledger.hold("k", 2, "host")
    assert ledger.read == {("k", "device"): 7, ("k", "host"): 4} and ledger.moved == {("k", "host"): 9}
    ledger.reset()
    assert ledger.held == {("k", "device"): 5, ("k", "host"): 2} and not ledger.read and not ledger.moved
