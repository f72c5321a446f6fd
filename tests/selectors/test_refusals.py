"""What cannot be chosen from is refused with its reason, and a refused call changes nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from selector_world import BLOCK, HEADS, SPEC, WIDTH, World

from kvmem import Allocator, CacheSpec, Component
from kvmem.errors import SpecError, StaleHandle
from kvmem.kernels.write import write_kv
from kvmem.selectors import Chooser, Clustered, Quest, Recent, Selector, SparF

WINDOW = replace(SPEC.groups[0], name="window", layers=(2,), window_tokens=16)
MIXED = CacheSpec((SPEC.groups[0], WINDOW), block_size=BLOCK)


def allocator(spec: CacheSpec, **options: Any) -> Allocator:
    sizes = {
        "memory": "1MiB",
        "max_sequences": 2,
        "max_tokens": 64,
        "page_bytes": 4096,
        "interleave": "none",
        "device": "cpu",
    }
    return Allocator(spec, **(sizes | options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("component", "why"),
    [
        (Component("k", heads=2, width=16, dtype=torch.float32, rope="pre"), "before rotation"),
        (Component("k", heads=2, width=16, dtype=torch.int8, rope="post"), "selectors score plain floats of one width"),
        (Component("k", heads=2, width=((8, 16),), dtype=torch.float32), "selectors score plain floats of one width"),
        (Component("ckv", width=16, dtype=torch.float32), "does not store k and v"),
    ],
)
def test_specs_without_keys_that_are_scored(component: Component, why: str) -> None:
    spec = CacheSpec(components=[component, Component("v", heads=2, width=16, dtype=torch.float32)], num_layers=1)
    with pytest.raises(SpecError, match=why):
        Recent().extend(spec)


def test_windows(backend: str) -> None:
    only = CacheSpec.kv(num_layers=1, num_kv_heads=2, head_dim=16, dtype=torch.float32, window_tokens=64)
    with pytest.raises(SpecError, match="sliding window of 64 tokens, which says what is read"):
        Quest().extend(only)
    spec = Quest().extend(MIXED)
    assert [c.name for c in spec.groups[0].components] == ["k", "v", "k_bounds"] and spec.groups[1] == WINDOW
    alloc = allocator(spec, backend=backend)
    chooser = Chooser(Quest(), alloc)
    assert chooser.layers == (0, 1)
    sequence = alloc.sequence()
    sequence.extend(4)
    batch, q = alloc.batch([sequence]), torch.randn(4, HEADS, WIDTH)
    for call in (lambda: chooser.update(2, batch), lambda: chooser.select(q, 2, batch, budget_tokens=8)):
        with pytest.raises(SpecError, match="layer: got 2.*sliding window"):
            call()
    with pytest.raises(SpecError, match="layers 0 to 2"):
        chooser.update(3, batch)


def test_allocators(backend: str) -> None:
    with pytest.raises(SpecError, match=r"has no k_bounds as Quest keeps it.*extend"):
        Chooser(Quest(), allocator(SPEC, backend=backend))
    with pytest.raises(SpecError, match="has no k_centroids"):  # of other sizes
        Chooser(Clustered(), allocator(Clustered(tokens_per_cluster=2).extend(SPEC), backend=backend))
    with pytest.raises(SpecError, match="with memory"):
        Chooser(Recent(), allocator(SPEC, backend=backend, device="meta", page_bytes=2 << 20, memory="64MiB"))
    with pytest.raises(SpecError, match="give Selector"):
        Chooser("quest", allocator(SPEC, backend=backend))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="k_bounds"):
        Quest().extend(Quest().extend(SPEC))


def test_pages_that_hold_no_whole_blocks() -> None:
    odd = CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=20, dtype=torch.float32, block_size=16)
    with pytest.raises(SpecError, match="use page_bytes=20480 or a multiple"):
        Chooser(Recent(), allocator(odd, backend="virtual"))
    Chooser(Recent(), allocator(odd, backend="virtual", page_bytes=20480))
    Chooser(Recent(), allocator(odd, backend="paged"))


def test_heads_that_are_no_blocks(backend: str) -> None:
    """A token of 12 halves takes 32 bytes, so that blocks are not a whole number of heads apart."""
    spec = CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=12, dtype=torch.float16, block_size=1)
    alloc = allocator(spec, backend=backend)
    sequence = alloc.sequence()
    sequence.extend(1)
    batch, chooser, q = alloc.batch([sequence]), Chooser(Recent(), alloc), torch.randn(1, 2, 12)
    with pytest.raises(SpecError, match="per_head: this cache has .* one every 16 elements"):
        chooser.select(q, 0, batch, budget_tokens=1, per_head=True)
    assert chooser.select(q, 0, batch, budget_tokens=1).blocks.tolist() == [[0]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: SparF(0), lambda: SparF(2.5), lambda: SparF(True), lambda: Clustered(iterations=0),  # type: ignore[arg-type]
        lambda: Clustered(tokens_per_cluster=3).extend(replace(SPEC, groups=(replace(SPEC.groups[0], block_size=16),))),
        lambda: Clustered(segment_blocks=1 << 16).extend(SPEC), lambda: Quest().extend(None),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_options(make: Any) -> None:
    with pytest.raises(SpecError):
        make()


def test_arguments_of_select(backend: str) -> None:
    world = World(SparF(WIDTH + 1), backend)
    sequence = world.open([1] * 20)
    batch = world.grow({sequence: [2]}, commit=False)
    q = torch.randn(1, HEADS, WIDTH)
    digest = world.alloc.core.digest()
    good: dict[str, Any] = {"q": q, "layer": 0, "batch": batch, "budget_tokens": 8}
    bad: list[tuple[dict[str, Any], str]] = [
        ({"budget_tokens": 0}, "budget_tokens"), ({"budget_tokens": 1.5}, "budget_tokens"), ({"scale": 0}, "scale"),
        ({"scale": float("nan")}, "scale"), ({"per_head": 1}, "per_head"), ({"layer": True}, "layer"),
        ({"q": q[:0]}, r"q: got \(0, 2, 16\)"), ({"q": q[:, :1]}, "a multiple of 2 heads"), ({"q": q.long()}, "floats"),
        ({"q": q[..., :8]}, "q: got"), ({"q": torch.randn(1, 0, WIDTH)}, "q: got"), ({"batch": None}, "batch"),
        ({"queries": 3}, "queries"), ({"queries": world.alloc.batch([])}, "same 1 rows"), ({}, "channels: got 17"),
    ]  # fmt: skip
    for change, message in bad:
        with pytest.raises(SpecError, match=message):
            world.chooser.select(**(good | change))
    with pytest.raises(SpecError, match="first_token"):
        world.chooser.update(0, batch, first_token=-1)
    assert world.alloc.core.digest() == digest


def test_a_chosen_batch_is_for_reading_and_grows_stale(backend: str) -> None:
    world = World(Quest(), backend)
    sequence = world.open([1] * 40)
    batch = world.grow({sequence: [2]}, commit=False)
    q = torch.randn(1, HEADS, WIDTH)
    chosen = world.chooser.select(q, 0, batch, budget_tokens=16)
    before = [part.clone() for part in sequence.kv(0)]
    with pytest.raises(SpecError, match="for reading"):
        write_kv(world.alloc.kv(0), chosen, torch.zeros(1, HEADS, WIDTH), torch.zeros(1, HEADS, WIDTH))
    assert all(map(torch.equal, before, sequence.kv(0)))
    chosen.check_current()
    sequence.free()
    with pytest.raises(StaleHandle):
        chosen.check_current()
    with pytest.raises(StaleHandle):
        world.chooser.select(q, 0, batch, budget_tokens=16)


@pytest.mark.parametrize("selector", [Quest(), Clustered(), SparF(4)], ids=["quest", "clustered", "sparf"])
def test_strange_numbers_choose_something(selector: Selector, backend: str) -> None:
    """NaN and infinities in keys or queries are scored as unknown; what must be in is in, and counts are right."""
    world = World(selector, backend)
    world.table[0, :, 7], world.table[0, :, 8] = float("nan"), float("inf")
    sequence = world.open([n % 10 for n in range(100)])
    batch = world.grow({sequence: [1]}, commit=False)
    for value in (1.0, 0.0, float("nan"), float("inf"), 1e38):
        chosen = world.chooser.select(torch.full((1, HEADS, WIDTH), value), 0, batch, budget_tokens=5 * BLOCK)
        blocks = chosen.blocks[0].tolist()
        assert len(set(blocks)) == 5 and blocks == sorted(blocks) and (blocks[0], blocks[-1]) == (0, 12)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("selector", [Quest(), Clustered(), SparF(4)], ids=["quest", "clustered", "sparf"])
def test_dtypes_of_the_cache(selector: Selector, dtype: torch.dtype, backend: str) -> None:
    spec = CacheSpec.kv(num_layers=1, num_kv_heads=2, head_dim=64, dtype=dtype, block_size=16)
    alloc = allocator(selector.extend(spec), backend=backend, page_bytes=1 << 16)
    chooser, sequence = Chooser(selector, alloc), alloc.sequence()
    sequence.extend(64)
    batch = alloc.batch([sequence])
    k = torch.randn(64, 2, 64)
    k[20] = 3.0  # the one that the query looks for, in block 1
    write_kv(alloc.kv(0), batch, k, k)
    chooser.update(0, batch)
    sequence.commit(count=63)
    chosen = chooser.select(
        torch.full((1, 4, 64), 0.5, dtype=torch.bfloat16), 0, alloc.batch([sequence]), budget_tokens=48
    )
    assert chosen.blocks[0].tolist() == [0, 1, 3]
