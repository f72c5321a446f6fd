"""The step in one call, and batches that are refilled in place: what a fill leaves in the buffers is what a fresh batch
would hold, whatever was in them, and what it says it changed is all it changed."""

from __future__ import annotations

import array
import random

import numpy as np
import pytest
import torch
from lockstep_prefix import PrefixLockstep, make_pair
from prefix_walk import author, step
from support import LAYOUTS, LONG, SIZES, Steps, i32, make_allocator, plain

import kvmem
from kvmem.allocator.batch import Batch, GroupBatch
from kvmem.allocator.batch_buffers import FIELDS

LAYOUTS_HERE = ["kv interleaved", "kv G=1", "full and window", "window G=1", "recurrent", "encoder decoder"]


def assert_equal(refilled: Batch, fresh: Batch) -> None:
    for mine, other in zip(refilled.groups, fresh.groups, strict=True):
        for name in FIELDS:
            a, b = getattr(mine, name), getattr(other, name)
            if a is None:
                assert b is None
            elif name == "block_table":  # the fresh one is as wide as it must be
                width = b.shape[1]
                assert torch.equal(a[:, :width], b) and not a[:, width:].any()
            else:
                assert torch.equal(a, b), name
        assert (mine.max_seqlen_q, mine.max_seqlen_k) == (other.max_seqlen_q, other.max_seqlen_k)


class Shadow:
    """The block tables of a batch, kept by ``table_deltas`` alone."""

    def __init__(self, batch: Batch) -> None:
        self.tables = [group.full("block_table").clone() for group in batch.groups]
        self.told = 0

    def follow(self, batch: Batch) -> None:
        for table, group in zip(self.tables, batch.groups, strict=True):
            self.tell(table, group)

    def tell(self, table: torch.Tensor, group: GroupBatch) -> None:
        if (deltas := group.table_deltas) is None:
            table.copy_(group.full("block_table"))
            return
        places, blocks = deltas
        assert len(set(places.tolist())) == len(places)
        table.view(-1)[places] = blocks
        self.told += len(places)
        assert torch.equal(table[: group.num_rows], group.full("block_table")[: group.num_rows])


class Uploads:
    """Stands in for the event that says when an upload has been read; it is of the stream that the upload is put on."""

    def record(self, stream: str) -> None:
        assert stream == "the stream of the batch's device"

    def synchronize(self) -> None: ...


def as_on_a_gpu(batch: Batch) -> None:
    """Gives the batch device tensors apart from the host's, as on a GPU: only what is uploaded gets there."""
    for group in batch.groups:
        small = group._small
        small._device = small._host.clone()
        small.device = {
            name: small._device[host.storage_offset() : host.storage_offset() + len(host)]
            for name, host in small.host.items()
        }
        group._device = {name: host.clone() for name, host in group._host.items()} | small.device
        group._uploaded, group._stream = Uploads(), lambda: "the stream of the batch's device"


def uploads_agree(batch: Batch) -> None:
    for group in batch.groups:
        for name, host in group._host.items():
            used = group._used(name)
            assert torch.equal(group._device[name][:used], host[:used]), name


@pytest.mark.parametrize("layout", [name for name in LAYOUTS_HERE if name in LAYOUTS])
def test_a_refilled_batch_is_as_a_fresh_one(backend: str, layout: str, rng: random.Random) -> None:
    """Random programs; the same buffers again and again, for other sequences, orders, paddings and new tokens."""
    for plentiful in (False, True):
        pair = make_pair(layout, backend, rng.choice(sorted(SIZES)), plentiful=plentiful, contents=False, debug=False)
        pair.prepare_padding()
        alloc = pair.alloc
        batches = [alloc.make_batch(max_sequences=9, max_new_tokens=9 * alloc.max_tokens) for _ in range(2)]
        shadows = [Shadow(batch) for batch in batches]
        as_on_a_gpu(batches[1])
        writer, handles = author(pair, rng), list[int]()
        for _ in range(1000 if LONG else 150):
            step(pair, rng, writer)
            if rng.random() < 0.3:
                handles = rng.sample(pair.handles, min(7, len(pair.handles)))
            handles = [handle for handle in handles if handle in pair.model.sequences]
            new = None
            if rng.random() < 0.3:
                held = [pair.model.sequences[h][pair.model.main] for h in handles]
                new = [rng.randint(0, t.tokens - t.committed) for t in held]
            pad = rng.choice([None, None, len(handles), 9])
            which = rng.randrange(2)
            try:
                fresh = alloc.batch(handles, new_tokens=new, pad_to=pad)
            except kvmem.OutOfMemory:
                continue  # no room for the trash blocks
            alloc.fill(i32(*handles), batches[which], new_tokens=new, pad_to=pad)
            assert_equal(batches[which], fresh)
            uploads_agree(batches[which])
            shadows[which].follow(batches[which])
        assert sum(shadow.told for shadow in shadows) > 0


def twins(backend: str, layout: str, **options: object) -> list[PrefixLockstep]:
    spec, interleave = LAYOUTS[layout].spec(16), LAYOUTS[layout].interleave
    options = {"page_bytes": 4096, "max_sequences": 8, "max_tokens": 900} | options
    return [
        PrefixLockstep(make_allocator(spec, backend, interleave=interleave, device="meta", **options), contents=False)
        for _ in range(2)
    ]


@pytest.mark.parametrize("layout", ["kv interleaved", "full and window", "window G=1", "recurrent"])
def test_a_step_is_its_three_calls(backend: str, layout: str, rng: random.Random) -> None:
    """Committing, extending and filling in one call or in three: the same lengths, books, hits and tensors. With windows
    memory is plentiful: the one call makes room before windows move on, so it may be refused where three are not. For
    the same reason it may give up another cached block, so only whole blocks are found, which no prompt here repeats.
    """
    windows = "window" in layout
    memory = (2000 if windows else 18) * 4096
    one, three = (pair.alloc for pair in twins(backend, layout, memory=memory, partial_reuse=False))
    out = [alloc.make_batch(max_new_tokens=200) for alloc in (one, three)]
    ids: list[int] = []
    due: dict[int, int] = {}
    kept: list[kvmem.Sequence] = []  # garbage would be freed
    refused = 0
    loop = Steps(1500 if LONG else 250)
    while loop.next(windows or refused):
        if len(ids) < 6 and rng.random() < 0.2:
            prompt = [rng.randrange(3) for _ in range(rng.choice([0, 20, 40]))]
            made = [alloc.sequence(prompt) for alloc in (one, three)]
            assert made[0].id == made[1].id and made[0].num_cached_tokens == made[1].num_cached_tokens
            kept += made
            ids.append(made[0].id)
            due[made[0].id] = 0
        long = [h for h in ids if one.core.tokens(h) > 850]
        for gone in long + (rng.sample(ids, 1) if ids and not long and rng.random() < 0.05 else []):
            ids.remove(gone)
            one.free_batch(i32(gone)), three.free_batch(i32(gone))
        if not ids:
            continue
        counts = i32(*(rng.choice([0, 1, 1, 5, 30]) for _ in ids))
        known = rng.random() < 0.9
        tokens = i32(*(rng.randrange(3) for h in ids for _ in range(due[h]))) if known else None
        handles, amounts = i32(*ids), i32(*(due[h] for h in ids))
        if known:
            three.commit_batch(handles, amounts, tokens)
        else:
            three.commit_batch(handles, amounts)
        fits = three.try_extend_batch(handles, counts)
        if not fits:  # the one call changes nothing then; what it would have committed is committed by hand
            with pytest.raises(kvmem.OutOfMemory):
                one.step(handles, out[0], counts=counts, tokens=tokens)
            assert [one.core.committed(h) for h in ids] == [three.core.committed(h) - due[h] for h in ids]
            one.commit_batch(handles, amounts, *([tokens] if known else []))
            refused += 1
            due = dict.fromkeys(ids, 0)
            for alloc in (one, three):
                alloc.free_batch(i32(ids[0]))
            ids.pop(0)
            continue
        three.fill(handles, out[1])
        one.step(handles, out[0], counts=counts, tokens=tokens)
        due = dict(zip(ids, counts.tolist(), strict=True))
        for g in range(len(one.spec.groups)):
            for h in ids:
                assert one.core.tokens(h, g) == three.core.tokens(h, g)
                assert one.core.committed(h, g) == three.core.committed(h, g)
        assert torch.equal(out[0].seq_lens, out[1].seq_lens)
        assert torch.equal(out[0].positions, out[1].positions)
        assert one.check() == []
    assert one.stats().hit_tokens == three.stats().hit_tokens
    assert one.stats().used_bytes == three.stats().used_bytes
    assert not (windows and refused)


def test_a_batch_may_serve_two_allocators(backend: str) -> None:
    """As of a draft model and its target: equal handles, other blocks."""
    options = {"device": "meta", "memory": 100 * 4096, "page_bytes": 4096, "max_sequences": 4}
    one, two = (make_allocator(plain(16), backend, **options) for _ in range(2))
    batch, fresh, ids = one.make_batch(max_new_tokens=400), {}, i32()
    both = {alloc: [alloc.sequence() for _ in range(2)] for alloc in (one, two)}
    for alloc, seqs in both.items():
        for seq in seqs if alloc is one else reversed(seqs):
            seq.extend(40)
        ids = i32(*(seq.id for seq in seqs))
        fresh[alloc] = alloc.batch(ids)
    assert not torch.equal(fresh[one].block_table, fresh[two].block_table)
    for alloc in (one, two, one, one, two):
        alloc.fill(ids, batch)
        assert_equal(batch, fresh[alloc])


def test_a_step_that_is_refused_changes_nothing(backend: str) -> None:
    alloc = make_allocator(plain(16), backend, device="meta", memory=30 * 4096, page_bytes=4096, max_sequences=4)
    seqs = [alloc.sequence() for _ in range(3)]
    for seq in seqs:
        seq.extend(20)
        seq.commit(list(range(20)))
        seq.extend(2)
    ids, out = i32(*(seq.id for seq in seqs)), alloc.make_batch(max_new_tokens=8, max_tokens=64)
    alloc.step(ids, out, tokens=i32(*range(6)))
    assert [seq.num_committed_tokens for seq in seqs] == [22] * 3 and out.seq_lens.tolist() == [23] * 3

    def seen() -> list[object]:
        return [[(s.num_tokens, s.num_committed_tokens) for s in seqs], alloc.stats(), alloc.match(list(range(40)))]

    before = seen()
    small = alloc.make_batch(max_sequences=2, max_new_tokens=8)
    for kind, arguments, options in [
        (kvmem.SpecError, (ids, out), {"tokens": i32(1, 2)}),  # three are due
        (kvmem.SpecError, (ids, out), {"tokens": i32(1, 2, -3)}),
        (kvmem.SpecError, (ids, out), {"counts": i32(1, 1, -1)}),
        (kvmem.SpecError, (ids, out), {"counts": i32(1, 1)}),
        (kvmem.SpecError, (ids, out), {"counts": i32(3, 3, 3)}),  # more than the batch was made for
        (kvmem.SpecError, (ids, out), {"counts": i32(1, 1, 100_000)}),
        (kvmem.SpecError, (ids, out), {"counts": np.ones(3)}),
        (kvmem.SpecError, (ids, small), {}),
        (kvmem.SpecError, (i32(ids[0], ids[0]), out), {}),
        (kvmem.StaleHandle, (i32(ids[0], 77), out), {}),
        (kvmem.OutOfMemory, (ids, alloc.make_batch(max_new_tokens=10_000)), {"counts": i32(350, 350, 350)}),
    ]:
        with pytest.raises(kind):
            alloc.step(*arguments, **options)
        assert seen() == before
        assert alloc.check() == []
    alloc.step(ids, out, tokens=i32(7, 7, 7), pad_to=4)
    assert out.seq_lens.tolist() == [24] * 3 + [1]
    alloc.step(i32(), out)
    assert out.num_rows == 0


def test_a_step_of_one_sequence_is_its_two_calls(backend: str, rng: random.Random) -> None:
    """With and without ids, cached or not, in memory that runs out."""
    options = {"max_sequences": 6, "max_tokens": 600, "device": "meta", "page_bytes": 4096, "memory": "160KiB"}
    one, two = (make_allocator(plain(16), backend, **options) for _ in range(2))
    pairs: list[tuple[kvmem.Sequence, kvmem.Sequence]] = []
    refused = 0
    for turn in range(1500):
        if len(pairs) < 6 and rng.random() < 0.1:
            prompt = [rng.randrange(3) for _ in range(rng.randrange(90))]
            pairs.append((one.sequence(prompt), two.sequence(prompt)))
        if not pairs or rng.random() < 0.02:
            for sequence in pairs.pop(rng.randrange(len(pairs))) if pairs else ():
                sequence.free()
            continue
        a, b = rng.choice(pairs)
        due, n = a.num_tokens - a.num_committed_tokens, rng.choice([0, 1, 1, 1, 17])
        ids = [rng.randrange(3) for _ in range(due)]
        known = rng.random() < 0.9
        if a.num_tokens + n > 600:
            continue
        if fits := b.try_extend(n):
            b.commit(ids) if known else b.commit(count=due)
            a.step(n, ids if known else None)
        else:
            refused += 1
            before = one.stats().used_bytes
            with pytest.raises(kvmem.OutOfMemory):
                a.step(n, ids)
            assert one.stats().used_bytes == before
        assert (a.num_tokens, a.num_committed_tokens) == (b.num_tokens, b.num_committed_tokens), (turn, fits)
        assert one.stats().used_bytes == two.stats().used_bytes
    assert refused and one.stats().hit_tokens == two.stats().hit_tokens


def test_a_bad_step_of_one_sequence_changes_nothing(backend: str) -> None:
    alloc = make_allocator(plain(16), backend, max_tokens=64)
    sequence = alloc.sequence()
    sequence.extend(20)
    for n, tokens, says in ((1, [1] * 19, "19 token ids"), (-1, None, "truncate"), (45, None, "max_tokens"),
                            (1, [-1] * 20, "0 or more"), (1.5, None, "integer"), (2**40, None, "int32")):  # fmt: skip
        with pytest.raises(kvmem.SpecError, match=says):
            sequence.step(n, tokens)  # type: ignore[arg-type]
        assert (sequence.num_tokens, sequence.num_committed_tokens) == (20, 0)
    sequence.free()
    with pytest.raises(kvmem.StaleHandle):
        sequence.step()


def test_arguments_in_any_int32_buffer(backend: str) -> None:
    alloc = make_allocator(plain(16), backend)
    sequences = [alloc.sequence() for _ in range(3)]
    ids, batch = i32(*(s.id for s in sequences)), alloc.make_batch(max_new_tokens=12)
    alloc.step(torch.from_numpy(ids), batch, counts=array.array("i", [1, 2, 3]))
    alloc.step(memoryview(ids), batch, tokens=torch.arange(6, dtype=torch.int32))
    assert batch.seq_lens.tolist() == [2, 3, 4]
    assert [s.num_committed_tokens for s in sequences] == [1, 2, 3]
    for wrong in (ids.astype(np.float32), ids[None], [1.0, 2.0, 3.0], None):
        with pytest.raises(kvmem.SpecError):
            alloc.step(wrong, batch)  # type: ignore[arg-type]


def test_a_step_of_no_sequence_backs_what_its_padding_reads(backend: str) -> None:
    """An engine that idles replays its captured graph with padding rows only."""
    alloc = make_allocator(plain(16), backend, debug=False)
    out = alloc.make_batch(max_sequences=4, max_new_tokens=4)
    alloc.step(i32(), out, pad_to=4)
    assert alloc.stats().mapped_bytes > 0 and out.block_table.tolist() == [[0] * out.block_table.shape[1]] * 4
    k, v = alloc.kv(0)
    assert not k[0].as_subclass(torch.Tensor).any() and not v[0].as_subclass(torch.Tensor).any()
