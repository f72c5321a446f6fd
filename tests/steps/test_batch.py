"""Batches against an oracle that builds every field from lengths alone, and the refusal of arrays that would be
converted."""

from __future__ import annotations

import array
from typing import Any

import numpy as np
import pytest
import torch
from lockstep import Lockstep
from support import BACKENDS, LAYOUTS, i32, make_allocator, plain

import kvmem
from kvmem import _core
from kvmem.allocator.batch import GroupBatch

pytestmark = pytest.mark.core


def oracle(pair: Lockstep, g: int, handles: list[int], new: list[int] | None, rows: int) -> dict[str, list[Any]]:
    """Every field but the block ids, from the model's lengths."""
    size = pair.model.groups[g].block_tokens
    want: dict[str, list[Any]] = {
        k: [] for k in ("seq_lens", "first_tokens", "positions", "batch_indices", "kv_last_page_len")
    }
    q, k, blocks = [0], [0], [0]
    for row in range(rows):
        if row < len(handles):
            held = pair.model.sequences[handles[row]][g]
            fresh = 0 if pair.model.groups[g].growth == "fixed" else held.tokens - held.committed
            length, first = held.tokens, held.first
            if new is not None and pair.model.groups[g].growth == "token":
                fresh, length = new[row], held.committed + new[row]
        else:
            fresh, length, first = 1, 1, 0
        want["seq_lens"].append(length)
        want["first_tokens"].append(first)
        want["positions"] += range(length - fresh, length)
        want["batch_indices"] += [row] * fresh
        want["kv_last_page_len"].append((length - 1) % size + 1 if length else 0)
        q.append(q[-1] + fresh)
        k.append(k[-1] + length)
        blocks.append(blocks[-1] + -(-length // size))
    return want | {"cu_seqlens_q": q, "cu_seqlens_k": k, "kv_indptr": blocks}


def check_fields(
    pair: Lockstep, batch: kvmem.Batch, handles: list[int], new: list[int] | None = None, rows: int = 0
) -> None:
    rows = max(rows, len(handles))
    for g, rules in enumerate(pair.model.groups):
        fields, want = batch.group(g), oracle(pair, g, handles, new, rows)
        for name, values in want.items():
            assert getattr(fields, name).tolist() == values, (g, name)
            assert getattr(fields, name + "_cpu").tolist() == values
        assert (fields.num_rows, fields.num_new_tokens) == (rows, want["cu_seqlens_q"][-1])
        assert fields.max_seqlen_q == max(np.diff(want["cu_seqlens_q"]), default=0)
        assert fields.max_seqlen_k == max(want["seq_lens"], default=0)
        check_blocks(pair, fields, g, handles, want)
        assert fields.block_size == rules.block_tokens


def check_blocks(pair: Lockstep, fields: GroupBatch, g: int, handles: list[int], want: dict[str, list[Any]]) -> None:
    """Block ids: consistent among the fields, never those of another sequence, and right by the row where there are
    rows."""
    size = pair.model.groups[g].block_tokens
    table, slots = fields.block_table.tolist(), fields.slot_mapping.tolist()
    owner: dict[int, int] = {}
    for row, length in enumerate(want["seq_lens"]):
        count, dropped = -(-length // size), want["first_tokens"][row] // size
        assert table[row][count:] == [0] * (len(table[row]) - count) and table[row][:dropped] == [0] * dropped
        start = want["kv_indptr"][row]
        assert fields.kv_indices.tolist()[start : start + count] == table[row][:count]
        if row >= len(handles):
            assert table[row] == [0] * len(table[row])
            continue
        for block in table[row][dropped:count]:
            assert block >= 2 and owner.setdefault(block, row) == row, "no block in two sequences (none is forked here)"
        if pair.virtual:
            assert fields.rows[row] == pair.alloc.core.row(handles[row], g)
            per_row = pair.alloc._geometry[g].row_tokens // size
            assert table[row][dropped:count] == [int(fields.rows[row]) * per_row + i for i in range(dropped, count)]
            assert fields.row_starts[row] == int(fields.rows[row]) * per_row * size
    for slot, position, row in zip(slots, want["positions"], want["batch_indices"], strict=True):
        inside = row < len(handles)
        assert slot == (table[row][position // size] * size + position % size if inside else size), (
            "padding writes to block 1"
        )
    if not pair.virtual:
        assert fields.rows is None and fields.row_starts is None


@pytest.fixture(params=[(b, name) for b in BACKENDS for name in LAYOUTS], ids=lambda p: "-".join(p).replace(" ", "_"))
def pair(request: pytest.FixtureRequest) -> Lockstep:
    backend, name = request.param
    layout = LAYOUTS[name]
    pair = Lockstep(make_allocator(layout.spec(16), backend, interleave=layout.interleave, page_bytes=4096))
    for lengths in ([100, 7], [16, 3], [1, 1], [0, 0]):
        handle = pair.open()
        if lengths[0]:
            pair.extend({handle: lengths[0]})
            pair.commit({handle: lengths[0]})
            pair.extend({handle: lengths[1]})
            for g, rules in enumerate(pair.model.groups):
                if rules.growth == "prefill":
                    pair.prefill(handle, lengths[0] % 40 + 1, g)
    return pair


def test_every_field(pair: Lockstep) -> None:
    handles = pair.handles
    check_fields(pair, pair.alloc.batch(handles), handles)
    check_fields(pair, pair.alloc.batch(handles[::-1]), handles[::-1])
    check_fields(pair, pair.alloc.batch(i32(handles[1])), handles[1:2])
    check_fields(pair, pair.alloc.batch([]), [])


def test_chosen_new_tokens(pair: Lockstep) -> None:
    """Chunked prefill: the step computes some of what is reserved; lengths end there."""
    handles = pair.handles
    for new in ([7, 3, 1, 0], [2, 0, 1, 0], [0, 0, 0, 0]):
        check_fields(pair, pair.alloc.batch(handles, new_tokens=new), handles, new)
    for wrong in ([8, 0, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1], [1, 1]):
        with pytest.raises(kvmem.SpecError):
            pair.alloc.batch(handles, new_tokens=wrong)


def test_padding(pair: Lockstep) -> None:
    handles = pair.handles
    check_fields(pair, pair.alloc.batch(handles, pad_to=9), handles, rows=9)
    with pytest.raises(kvmem.SpecError, match=f"^pad_to: got 2; the batch has {len(handles)} sequences"):
        pair.alloc.batch(handles, pad_to=2)
    for g, group in enumerate(pair.alloc.spec.groups):  # what a padding row reads is zero
        component, layer = group.components[0].name, group.layers[0]
        view = pair.alloc.tensor(layer, component)
        assert not view[0].any() and len(view) >= 2, g
    pair.lengths_agree()
    assert pair.alloc.check() == []


def test_refill_in_place(pair: Lockstep) -> None:
    alloc, handles = pair.alloc, pair.handles
    out = alloc.make_batch(max_sequences=6, max_new_tokens=200, max_tokens=300)
    before = {
        (g, n): out.group(g).full(n).data_ptr()
        for g in range(len(alloc.spec.groups))
        for n in ("block_table", "seq_lens", "slot_mapping", "cu_seqlens_q", "kv_indptr", "kv_indices")
    }
    assert alloc.batch(handles, out=out) is out
    check_fields(pair, out, handles)
    pair.extend(dict.fromkeys(handles, 20))
    alloc.fill(i32(*handles), out, pad_to=6)
    check_fields(pair, out, handles, rows=6)
    alloc.fill(i32(handles[0]), out)
    check_fields(pair, out, handles[:1])
    assert before == {(g, n): out.group(g).full(n).data_ptr() for g, n in before}, "invariant 6, for captured graphs"


def test_a_batch_too_small_is_refused(pair: Lockstep) -> None:
    alloc, handles = pair.alloc, pair.handles
    for sizes in (
        {"max_sequences": 3, "max_new_tokens": 200},
        {"max_sequences": 4, "max_new_tokens": 5},
        {"max_sequences": 4, "max_new_tokens": 200, "max_tokens": 64},
    ):
        with pytest.raises(kvmem.SpecError):
            alloc.batch(handles, out=alloc.make_batch(**sizes))
    with pytest.raises(kvmem.SpecError):
        alloc.batch(handles, out=alloc.make_batch(max_sequences=4, max_new_tokens=200), pad_to=5)
    pair.agree()


# ---- Arrays never convert ------------------------------------------------------------------------


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


WRONG_INPUT = {
    "float32": lambda n: np.zeros(n, np.float32),
    "two-dimensional": lambda n: np.zeros((n, 1), np.int32),
}
WRONG_OUTPUT = WRONG_INPUT | {
    "int64": lambda n: np.zeros(n, np.int64),
    "strided": lambda n: np.zeros(2 * n, np.int32)[::2],
    "list": lambda n: [0] * n,
    "read-only": lambda n: _read_only(np.zeros(n, np.int32)),
}
FORMS = {
    "int64": lambda values: np.array(values, np.int64),
    "strided": lambda values: np.repeat(np.array(values, np.int32), 2)[::2],
    "list": lambda values: [int(value) for value in values],
    "tuple": lambda values: tuple(int(value) for value in values),
    "array": lambda values: array.array("i", [int(value) for value in values]),
    "torch int64": lambda values: torch.tensor([int(value) for value in values]),
}


def _calls(core: _core.Allocator, out: _core.BatchBuffers, good: np.ndarray) -> dict[str, Any]:
    """Every array argument of the core: its name, and the call with that one wrong."""
    wide = np.zeros(len(good), np.int64)
    return {
        "extend_batch.handles": lambda a: core.extend_batch(a, good),
        "extend_batch.counts": lambda a: core.extend_batch(good, a),
        "commit_batch.handles": lambda a: core.commit_batch(a, good),
        "commit_batch.counts": lambda a: core.commit_batch(good, a),
        "free_batch.handles": lambda a: core.free_batch(a),
        "lengths.handles": lambda a: core.lengths(a, 0, wide, wide.copy()),
        "fill.handles": lambda a: core.fill(a, None, 0, -1, out),
        "fill.new_tokens": lambda a: core.fill(good, a, 0, -1, out),
    }


@pytest.mark.parametrize("wrong", WRONG_INPUT)
def test_inputs_that_are_no_integers_are_refused(backend: str, wrong: str) -> None:
    alloc = make_allocator(plain(16), backend)
    handles = alloc.open_batch(2)
    for name, call in _calls(alloc.core, alloc.make_batch(max_new_tokens=4).group(0).buffers, handles).items():
        field = {"handles": "ids|handles"}.get(name.split(".")[1], name.split(".")[1])
        with pytest.raises(kvmem.SpecError, match=f"^({field}): got"):
            call(WRONG_INPUT[wrong](2))
    assert alloc.stats().num_sequences == 2


@pytest.mark.parametrize("form", FORMS)
def test_inputs_of_every_form_mean_the_same(backend: str, form: str) -> None:
    alloc = make_allocator(plain(16), backend)
    handles = alloc.open_batch(2)
    calls = _calls(alloc.core, alloc.make_batch(max_new_tokens=4).group(0).buffers, handles)
    free = calls.pop("free_batch.handles")
    for name, call in calls.items():
        call(FORMS[form](handles if name.endswith("handles") else [0, 0]))
    assert [alloc.core.committed(int(handle)) for handle in handles] == handles.tolist()
    free(FORMS[form](handles))
    assert alloc.stats().num_sequences == 0


@pytest.mark.parametrize("wrong", WRONG_OUTPUT)
def test_outputs_never_convert(backend: str, wrong: str) -> None:
    """A converted output would be written, and thrown away."""
    alloc = make_allocator(plain(16), backend)
    with pytest.raises((TypeError, kvmem.SpecError)):
        alloc.core.open_batch(WRONG_OUTPUT[wrong](2))
    assert alloc.stats().num_sequences == 0, "refused before anything was opened"
    handles, wide = alloc.open_batch(2), np.zeros(2, np.int64)
    bad = (
        _read_only(np.zeros(2, np.int64))
        if wrong == "read-only"
        else np.zeros(2, np.int32)
        if wrong == "int64"
        else WRONG_OUTPUT[wrong](2)
    )
    with pytest.raises((TypeError, kvmem.SpecError)):
        alloc.core.lengths(handles, 0, bad, wide)
    with pytest.raises((TypeError, kvmem.SpecError)):
        alloc.core.lengths(handles, 0, wide, bad)


FIELDS = ("block_table", "seq_lens", "first_tokens", "slot_mapping", "positions", "batch_indices", "cu_seqlens_q",
"cu_seqlens_k",
          "kv_indptr", "kv_indices", "kv_last_page_len", "rows", "row_starts")  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_batch_buffers_never_convert(field: str) -> None:
    right, other = (np.int64, np.int32) if field == "slot_mapping" else (np.int32, np.int64)
    if field in ("cu_seqlens_k", "row_starts"):  # either does
        other = np.int16
    sizes = {"max_sequences": 2, "max_new_tokens": 4, "max_blocks": 3, "max_indices": 6}
    _core.BatchBuffers(**sizes, **{field: np.zeros(6, right)})
    for bad in (
        np.zeros(6, other),
        np.zeros(12, right)[::2],
        _read_only(np.zeros(6, right)),
        [0] * 6,
        np.zeros(1, right),
    ):
        with pytest.raises((TypeError, kvmem.SpecError)):
            _core.BatchBuffers(**sizes, **{field: bad})


def test_torch_tensors_are_taken_as_they_are() -> None:
    alloc = make_allocator(plain(16), "virtual")
    handles = torch.zeros(2, dtype=torch.int32)
    alloc.core.open_batch(handles)
    alloc.extend_batch(handles, torch.tensor([3, 4], dtype=torch.int32))  # type: ignore[arg-type]
    assert [alloc.core.tokens(int(h)) for h in handles] == [3, 4]
