"""Export and import: the same bytes on both backends, shared only where they are exact, refused where they are not."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from chunk_world import ME, OTHER, filled, holds, make, plain, rows, same, write
from support import LAYOUTS

import kvmem
from kvmem.chunks import Chunk, export, export_layers, import_, import_layers
from kvmem.errors import OutOfMemory, SpecError, StaleHandle
from kvmem.layouts.quantised import QuantisedKV
from kvmem.layouts.rope import Rope
from kvmem.spec.dtypes import EXPONENT_BITS

IDS = list(range(100, 170))
WHOLE = [name for name in LAYOUTS if name not in ("encoder decoder", "recurrent")]


def same_again(spec: kvmem.CacheSpec, backend: str, interleave: Any = "all") -> None:
    """A chunk from one backend, imported into the other, exported: the same bytes; the sequence too."""
    keep = min([g.window_tokens for g in spec.groups if g.window_tokens] + [len(IDS)])
    alloc, seq = filled(spec, IDS[:keep], backend, interleave=interleave)
    first = max(alloc.core.first_token(seq.id, i) for i in range(len(spec.groups)))
    chunk = export(alloc, seq, IDS[:keep], identity=ME, first=first)
    assert chunk.num_bytes == spec.bytes_per_token * (keep - first)
    other = make(spec, OTHER[backend])
    copy = other.sequence()
    import_(other, copy, chunk)
    if first == 0:
        assert holds(other, copy) == holds(alloc, seq)
        again = export(other, copy, IDS[:keep], identity=ME)
        assert same(again, chunk) and again.head.before == chunk.head.before
        assert other.match(IDS[:keep]).num_tokens == alloc.match(IDS[:keep]).num_tokens
    assert copy.num_committed_tokens == keep - first and other.check() == []


@pytest.mark.parametrize("name", WHOLE)
def test_every_layout_on_both_backends(name: str, backend: str) -> None:
    same_again(LAYOUTS[name].spec(16), backend, LAYOUTS[name].interleave)


@pytest.mark.parametrize("dtype", EXPONENT_BITS)
def test_every_dtype(dtype: str, backend: str) -> None:
    same_again(plain(dtype, head_dim=5, num_kv_heads=3), backend)  # rows of odd sizes: parts begin unaligned


def test_the_bytes_are_in_canonical_order(backend: str) -> None:
    """``[layer][component][token][head][width]``, whatever the interleave."""
    spec = plain()
    for interleave in (1, "all", "none"):
        alloc, seq = filled(spec, IDS, backend, interleave=interleave)
        chunk = export(alloc, seq, IDS, identity=ME, first=7, end=40)
        expected = b"".join(
            rows(alloc, seq, layer, name)[7:40].view(torch.uint8).numpy().tobytes()
            for layer in range(3) for name in "kv"
        )  # fmt: skip
        assert b"".join(s.numpy().tobytes() for s in chunk.sections) == expected
        assert chunk.head.position == 7 and chunk.head.tokens.tolist() == IDS[7:40]


def test_a_chain_of_chunks_is_found_by_other_prompts(backend: str) -> None:
    alloc, seq = filled(plain(), IDS, backend)
    chunks = [export(alloc, seq, IDS, identity=ME, first=a, end=b) for a, b in ((0, 32), (32, 70))]
    other = make(plain(), backend)
    copy = other.sequence()
    import_(other, copy, chunks[0])
    import_(other, copy, chunks[1], prefix=IDS[:32])
    assert holds(other, copy) == holds(alloc, seq)
    assert other.match(IDS).num_tokens == alloc.match(IDS).num_tokens >= 64


def test_what_may_not_be_exact_is_never_found_by_other_prompts(backend: str) -> None:
    """A chunk after other tokens, at another position, without the ids before it, or through a lossy codec."""
    spec, rope = plain(), Rope.default(8)
    alloc, seq = filled(spec, IDS, backend)
    first, second = (export(alloc, seq, IDS, identity=ME, first=a, end=b) for a, b in ((0, 32), (32, 64)))
    lossy = Chunk(replace(first.head, exact=False), first.sections)
    other_ids = [1, *IDS[1:32]]
    cases: list[tuple[list[int], Any]] = [
        (IDS[:32], lambda a, s: import_(a, s, second)),
        (other_ids, lambda a, s: import_(a, s, second, prefix=other_ids)),
        (IDS[:16], lambda a, s: import_(a, s, second, prefix=IDS[:16], rope=rope)),
        ([], lambda a, s: import_(a, s, second, rope=rope)),
        ([], lambda a, s: import_(a, s, lossy)),
    ]
    for before, call in cases:
        target = make(spec, backend)
        copy = target.sequence()
        if before:
            write(target, copy, before)
        found = target.match([*before, *IDS[32:64], 5]).num_tokens
        call(target, copy)
        assert copy.num_committed_tokens == len(before) + 32
        assert target.match([*before, *IDS[32:64], 5]).num_tokens == found <= len(before)
        assert target.match([*IDS, 5]).num_tokens <= len(before)


def test_the_start_of_a_chunk_can_be_skipped(backend: str) -> None:
    alloc, seq = filled(plain(), IDS, backend)
    chunk = export(alloc, seq, IDS, identity=ME, end=64)
    other = make(plain(), OTHER[backend])
    copy = other.sequence()
    import_(other, copy, export(alloc, seq, IDS, identity=ME, end=20))
    import_(other, copy, chunk, prefix=IDS[:20], skip=20)
    assert same(export(other, copy, IDS, identity=ME), chunk) and other.match(IDS).num_tokens == 64


def test_rotation_to_another_position(backend: str) -> None:
    """ "post" is rotated, in each layer by its own rope; "pre" and "none" keep their bytes."""
    k = kvmem.Component("k", heads=2, width=8, dtype=torch.float64, rope=("post", "pre", "none", "post"))
    v = kvmem.Component("v", heads=2, width=8, dtype=torch.float64)
    spec = kvmem.CacheSpec(components=[k, v], num_layers=4)
    ropes = {0: Rope.default(8), 3: Rope.default(4, theta=50.0)}
    normal: Any = lambda shape, dtype: torch.randn(shape, dtype=dtype)  # noqa: E731
    alloc, target = make(spec, backend), make(spec, OTHER[backend])
    seq, copy = alloc.sequence(), target.sequence()
    write(alloc, seq, IDS, normal), write(target, copy, [1] * 13, normal)
    import_(target, copy, export(alloc, seq, IDS, identity=ME, first=20), rope=ropes)
    for layer in range(4):
        old, new = (rows(a, s, layer, "k") for a, s in ((alloc, seq), (target, copy)))
        by = ropes.get(layer)
        expected = old[20:] if by is None else by.shift(old[20:], 13 - 20)
        torch.testing.assert_close(new[13:], expected, rtol=1e-13, atol=1e-13)
        assert torch.equal(rows(alloc, seq, layer, "v")[20:], rows(target, copy, layer, "v")[13:])


def test_layers_arrive_one_at_a_time(backend: str) -> None:
    """Of the sections in host memory at most two live at any time, in export and in import."""
    spec = plain(num_layers=8)
    alloc, seq = filled(spec, IDS, backend)
    other = make(spec, OTHER[backend])
    head, sections = export_layers(alloc, seq, IDS, identity=ME)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watched() -> Any:
        nonlocal most
        for data in sections:
            alive.append(weakref.ref(data))
            most = max(most, sum(one() is not None for one in alive))
            yield data
            del data

    gc.collect()
    copy = other.sequence()
    import_layers(other, copy, head, watched())
    assert len(alive) == 8 and most <= 2
    assert holds(other, copy) == holds(alloc, seq)


def test_a_stream_that_fails_leaves_the_sequence_as_it_was(backend: str) -> None:
    alloc, seq = filled(plain(), IDS, backend)
    chunk = export(alloc, seq, IDS, identity=ME, first=30)
    target, copy = filled(plain(), [1] * 30, backend)
    before = holds(target, copy)

    def stops(count: int, error: Exception | None) -> Any:
        yield from chunk.sections[:count]
        if error is not None:
            raise error

    for count, error, kind in (
        (2, None, SpecError),
        (1, KeyboardInterrupt(), KeyboardInterrupt),
        (0, OSError(), OSError),
    ):
        with pytest.raises(kind):
            import_layers(target, copy, chunk.head, stops(count, error))
        assert copy.num_tokens == copy.num_committed_tokens == 30 and target.check() == []
    for wrong in ((*chunk.sections, chunk.sections[0]), (chunk.sections[0][:-1],), (b"",)):
        with pytest.raises(SpecError, match="sections: got"):
            import_layers(target, copy, chunk.head, wrong)  # type: ignore[arg-type]
    assert holds(target, copy) == before
    import_(target, copy, chunk)
    assert copy.num_tokens == 70


def test_memory_runs_out(backend: str) -> None:
    spec = plain()
    alloc, seq = filled(spec, IDS, backend)
    target = make(spec, backend, memory=2 * 4096)
    copy = target.sequence()
    with pytest.raises(OutOfMemory):
        import_(target, copy, export(alloc, seq, IDS, identity=ME))
    assert copy.num_tokens == 0 and target.check() == []


# --- refusals ---


def test_tokens_that_cannot_be_cut_out(backend: str) -> None:
    """Each refusal says why."""
    for name, end, words in (
        ("recurrent", 10, "recurrent state is that after all tokens"),
        ("encoder decoder", 10, "depends on the encoder's input"),
        ("two windows", 60, "window of group 'local' has dropped the tokens before"),
    ):
        alloc, seq = filled(LAYOUTS[name].spec(16), IDS, backend)
        with pytest.raises(SpecError, match=words):
            export(alloc, seq, IDS, identity=ME, end=end)
    alloc, seq = filled(plain(), IDS, backend)
    seq.extend(3)
    for first, end in ((0, 71), (-1, 5), (9, 8), (0, 73), (0, "4"), (True, 5)):
        with pytest.raises(SpecError):
            export(alloc, seq, [*IDS, 1, 2, 3], identity=ME, first=first, end=end)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="of 5 ids"):
        export(alloc, seq, IDS[:5], identity=ME, end=6)


def test_a_sequence_that_changes_between_layers(backend: str) -> None:
    alloc, seq = filled(plain(), IDS, backend)
    _, sections = export_layers(alloc, seq, IDS, identity=ME)
    next(sections)
    seq.free()
    with pytest.raises(StaleHandle):
        next(sections)


def test_imports_that_would_be_wrong(backend: str) -> None:
    alloc, seq = filled(plain(), IDS, backend)
    chunk = export(alloc, seq, IDS, identity=ME)
    for spec in (plain(torch.bfloat16), plain(num_layers=4), plain(head_dim=16), plain(block_size=32)):
        target = make(spec, backend)
        with pytest.raises(SpecError, match="another spec than the allocator's; they differ in"):
            import_(target, target.sequence(), chunk)
    target, copy = filled(plain(), [1] * 9, backend)
    for rope, words in ((None, "rope: got none for component 'k' of layer 0"), ({0: Rope.default(8)}, "of layer 1"),
                        (Rope.default(16), "at most head_dim=8"), (5, "must be None, or a Rope")):  # fmt: skip
        with pytest.raises(SpecError, match=words):
            import_(target, copy, chunk, rope=rope)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="prefix: got 3 ids; the sequence has 9"):
        import_(target, copy, chunk, rope=Rope.default(8), prefix=[1] * 3)
    with pytest.raises(SpecError, match="skip"):
        import_(target, copy, chunk, rope=Rope.default(8), skip=71)
    copy.extend(2)
    with pytest.raises(SpecError, match="2 tokens that are not committed"):
        import_(target, copy, chunk, rope=Rope.default(8))
    assert copy.num_committed_tokens == 9 and target.check() == []


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "uint8"])
def test_keys_quantised_after_rotation_are_not_moved(dtype: str, backend: str) -> None:
    alloc, seq = filled(plain(dtype), IDS, backend)
    chunk = export(alloc, seq, IDS, identity=ME, first=20)
    target = make(plain(dtype), backend)
    copy = target.sequence()
    with pytest.raises(SpecError, match="quantised after rotation"):
        import_(target, copy, chunk, rope=Rope.default(8))
    assert copy.num_tokens == 0
    write(target, copy, [1] * 20)
    import_(target, copy, chunk)  # where it was computed
    assert same(export(target, copy, IDS, identity=ME, first=20), chunk)


def test_rotations_that_depend_on_the_length_are_no_rope() -> None:
    """Where the angles change with the length, ``Rope`` refuses the config, so that nothing can be shifted."""
    config = dict(model_type="llama", head_dim=8, rope_theta=1e4, rope_scaling=dict(rope_type="dynamic", factor=2.0))
    with pytest.raises(SpecError, match="rope_type: got 'dynamic'"):
        Rope.from_config(config)


def test_layouts_that_are_not_plain(backend: str) -> None:
    """Keys before rotation move as they are; a layout that encodes whole blocks keeps whole sequences only."""
    spec = LAYOUTS["shared scope"].spec(16)
    alloc, seq = filled(spec, IDS, backend)
    target, copy = filled(spec, [1] * 13, backend)
    chunk = export(alloc, seq, IDS, identity=ME)
    import_(target, copy, chunk)
    assert same(export(target, copy, [1] * 13 + IDS, identity=ME, first=13), chunk)
    blocks = QuantisedKV(plain(head_dim=32), k="int4", v="int4")
    alloc, seq = filled(blocks.spec, IDS, backend)
    with pytest.raises(SpecError, match="window of group 'all_tail' has dropped"):
        export(alloc, seq, IDS, identity=ME)
