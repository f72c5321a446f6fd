"""Composition (CacheBlend) on a toy decoder in float64: exact where it must be, better with every token computed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from chunk_world import filled, make, plain, rows
from toy_model import HEADS, KV_HEADS, LAYERS, ME, VOCAB, WIDTH, Toy, allocator, blend, computed, run

from kvmem.chunks import Chunk, ChunkFile, compose, export, import_, write_chunk
from kvmem.errors import SpecError, StaleHandle
from kvmem.layouts.rope import Rope


@pytest.fixture(scope="module")
def model() -> Toy:
    return Toy()


def ids(seed: int, count: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(VOCAB) for _ in range(count)]


A, B, QUESTION = ids(1, 48), ids(2, 40), ids(3, 6)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_layer_0_is_exact_after_rotation(model: Toy, backend: str) -> None:
    _, expected = model.full(A + B)
    alloc = allocator(backend, debug=True)
    seq = alloc.sequence()
    first, second = computed(model, A), computed(model, B)
    import_(alloc, seq, first)
    import_(alloc, seq, second, rope=model.rope)
    for layer, (k, v) in enumerate(expected):
        mine = [rows(alloc, seq, layer, name) for name in "kv"]
        assert (
            torch.equal(mine[0][:48], k[:48]) or relative(mine[0][:48], k[:48]) < 1e-14
        )  # the first chunk, in each layer
        assert relative(mine[1][:48], v[:48]) < 1e-14
        worst = max((got - want).abs().max() for got, want in zip(mine, (k, v), strict=True))
        assert worst < 1e-12 if layer == 0 else worst > 1e-3
    unrotated = second.sections[0][: second.sections[0].numel() // 2].view(torch.float64).view(40, KV_HEADS, WIDTH)
    assert relative(unrotated, expected[0][0][48:]) > 1.0


def test_chunks_are_rotated_to_where_they_stand(model: Toy, backend: str) -> None:
    """Behind tokens that the sequence has, and behind each other: layer 0 is that of a prefill, to 1e-12."""
    prefix = ids(9, 21)
    (k, v), *_ = model.full(prefix + B + A + QUESTION)[1]
    alloc = allocator(backend)
    seq = alloc.sequence()
    run(model, alloc, seq, prefix)
    with compose(alloc, seq, [computed(model, B), computed(model, A)], QUESTION, rope=model.rope) as plan:
        plan.load(0)
        assert plan.positions.tolist() == [*range(21, 115)] and plan.tokens.tolist() == B + A + QUESTION
        for name, expected in (("k", k), ("v", v)):
            assert (plan.read(0, name)[:109] - expected[:109]).abs().max() < 1e-12


@pytest.mark.parametrize("before", [0, 21])
def test_the_error_falls_with_the_ratio(model: Toy, backend: str, before: int) -> None:
    """After chunks of 48 and 40 tokens and 6 new ones; also behind tokens that the sequence has already."""
    prefix = ids(9, before)
    expected = model.full(prefix + A + B + QUESTION)[0][-1]
    chunks, errors = [computed(model, A), computed(model, B)], []
    for ratio in (0, 0.05, 0.15, 0.3, 1.0):
        alloc = allocator(backend, debug=True)
        seq = alloc.sequence()
        if prefix:
            run(model, alloc, seq, prefix)
        got, count = blend(model, alloc, seq, chunks, QUESTION, ratio=ratio)
        errors.append(relative(got, expected))
        assert count == {0: 6, 0.05: 11, 0.15: 20, 0.3: 33, 1.0: 94}[ratio]
        assert seq.num_committed_tokens == before + 94 and alloc.check() == []
        assert alloc.match(prefix + A + B + QUESTION).num_tokens <= before  # approximations are not shared
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.05 and errors[-1] <= 1e-10, errors


def test_a_chunk_that_is_a_true_prefix_is_not_computed_anew(model: Toy, backend: str) -> None:
    """Its keys do not deviate, so the chosen tokens are all of the other chunk."""
    alloc = allocator(backend)
    seq = alloc.sequence()
    with compose(alloc, seq, [computed(model, A), computed(model, B)], QUESTION, ratio=0.3, rope=model.rope) as plan:
        x = model.embed[torch.as_tensor(plan.tokens).long()]
        plan.load(0), plan.load(1)
        full = model.full(A + B + QUESTION)[1]
        scores, stored = plan.deviations(full[1][0]), plan.read(1, "k")
        torch.testing.assert_close(scores[60], ((full[1][0][60] - stored[60]) ** 2).sum())
        assert scores[:48].max() < 1e-20 and scores[48:].min() > 1e-6 and len(scores) == 88
        chosen = plan.select(full[1][0])
        assert chosen[:-6].min() >= 48 and chosen[-6:].tolist() == [*range(88, 94)] and len(x) == 94
    assert (seq.num_tokens, alloc.check()) == (0, [])  # nothing was committed


def test_one_chunk_and_generation_goes_on(model: Toy, backend: str) -> None:
    """With everything computed, the next tokens are those of a sequence without chunks."""
    text = A + QUESTION
    plain_alloc, alloc = allocator(backend), allocator(backend)
    one, two = plain_alloc.sequence(), alloc.sequence()
    last = run(model, plain_alloc, one, text)[-1]
    got, _ = blend(model, alloc, two, [computed(model, A)], QUESTION, ratio=0.0)  # a prefix: exact at any ratio
    assert relative(got, last) < 1e-12
    for token in ids(5, 4):
        a, b = run(model, plain_alloc, one, [token]), run(model, alloc, two, [token])
        assert relative(b, a) < 1e-12


def test_chunks_from_files_layer_by_layer(model: Toy, backend: str, tmp_path: Path) -> None:
    """The same tokens as from memory, with one layer of each chunk in memory; layers come in order, and all of them."""
    chunks, files = [computed(model, A), computed(model, B)], []
    for number, chunk in enumerate(chunks):
        write_chunk(tmp_path / str(number), chunk)
        files.append(ChunkFile(tmp_path / str(number), spec=chunk.head.spec, identity=ME))
    one, two = allocator(backend), allocator(backend)
    expected, _ = blend(model, one, one.sequence(), chunks, QUESTION)
    got, _ = blend(model, two, two.sequence(), files, QUESTION)
    assert torch.equal(got, expected)
    seq = one.sequence()
    with compose(one, seq, chunks, QUESTION, rope=model.rope) as plan:
        for wrong in (1, 4, "0"):
            with pytest.raises(SpecError, match="the next one is 0"):
                plan.load(wrong)  # type: ignore[arg-type]
        plan.load(0)
        with pytest.raises(SpecError, match="1 of 4 layers were loaded"):
            plan.commit()
    with (
        compose(two, two.sequence(), files, QUESTION, rope=model.rope) as plan,
        pytest.raises(SpecError, match="got NoneType"),
    ):
        plan.load(0)  # a file is read once
    assert seq.num_tokens == 0 and one.check() == []
    for file in files:
        file.__exit__()


def test_other_check_layers(model: Toy) -> None:
    expected = model.full(A + B + QUESTION)[0][-1]
    chunks = [computed(model, A), computed(model, B)]
    errors = []
    for check_layer in range(LAYERS):
        alloc = allocator("paged")
        got, _ = blend(model, alloc, alloc.sequence(), chunks, QUESTION, ratio=0.15, check_layer=check_layer)
        errors.append(relative(got, expected))
    assert errors[-1] < errors[1] and HEADS % KV_HEADS == 0, errors  # layers below the check are computed whole


def test_refusals(backend: str) -> None:
    alloc, seq = filled(plain(torch.float32), list(range(20)), backend)
    chunk = export(alloc, seq, list(range(20)), identity=ME, first=4)
    target = make(plain(torch.float32), backend, memory="64KiB")
    copy = target.sequence()
    good: dict[str, Any] = dict(chunks=[chunk], new_tokens=[1], rope=Rope.default(8))
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        (dict(ratio=1.5), SpecError, "ratio: got 1.5; must be from 0 to 1"),
        (dict(ratio=True), SpecError, "ratio"),
        (dict(ratio="all"), SpecError, "ratio"),
        (dict(ratio=float("nan")), SpecError, "ratio"),
        (dict(check_layer=3), SpecError, "check_layer: got 3; the largest that works is 2"),
        (dict(chunks=[]), SpecError, "at least one Chunk"),
        (dict(chunks=[chunk.head]), SpecError, "at least one Chunk"),
        (dict(rope=None), SpecError, "rope: got none"),
        (dict(new_tokens=[-1]), SpecError, "tokens"),
        (dict(new_tokens=[1] * 399), SpecError, "max_tokens"),
    ]
    for change, error, words in cases:
        with pytest.raises(error, match=words):
            compose(target, copy, **(good | change))
        assert copy.num_tokens == 0 and target.check() == []
    with compose(target, copy, **good) as plan:
        with pytest.raises(SpecError, match=r"k: got .*; must be of all rows, \(17, 2, 8\)"):
            plan.select(torch.zeros(16, 2, 8))
        copy.free()
        with pytest.raises(StaleHandle):
            plan.load(0)
    assert target.check() == [] and isinstance(chunk, Chunk)
