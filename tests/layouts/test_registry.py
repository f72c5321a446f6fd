"""What cannot be combined: the table answers before there are weights, and each row says what else refuses it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from goldfinch_cases import cases as goldfinch_cases
from palu_cases import make_weights

from kvmem import Allocator, CacheSpec, Component, Group, SpecError
from kvmem.layouts import Layout, LayoutCache, PlainKV
from kvmem.layouts.aligned import AlignedKV
from kvmem.layouts.goldfinch import GoldFinch, goldfinch_spec
from kvmem.layouts.lanes import LaneCache
from kvmem.layouts.quantised import QuantisedKV
from kvmem.layouts.registry import FEATURES, LAYOUTS, check_combination, find
from kvmem.layouts.rope import Rope
from kvmem.layouts.slim import Projection, SharedEncoder, SlimK, SlimX

DOCS = Path(__file__).parents[2] / "docs" / "layouts.md"
W = torch.randn(64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 16 * torch.eye(64)
GOLD = goldfinch_cases()[0]
REFUSALS = [(entry.name, feature) for entry in LAYOUTS for feature in entry.refuses]


def kv(heads: int = 4, *, dtype: torch.dtype = torch.float16, window: int | None = None) -> CacheSpec:
    return CacheSpec.kv(num_layers=1, num_kv_heads=heads, head_dim=64, dtype=dtype, block_size=64, window_tokens=window)


def slim(kv_heads: int = 4, dtype: torch.dtype = torch.float16) -> SlimK:
    w = W[:, : kv_heads * 16]
    return SlimK([Projection(w, w)], num_heads=4, head_dim=16, dtype=dtype)


def wide(rope: Rope | None = None, dtype: torch.dtype = torch.float16) -> SlimX:
    w = make_weights(1, 2)[0][0].repeat(1, 4)
    return SlimX([Projection(w, w)], head_dim=64, dtype=dtype, rope=rope)


def encoder(dtype: torch.dtype = torch.float16, **options: Any) -> SharedEncoder:
    one = Projection(W, W)
    return SharedEncoder({0: one}, head_dim=16, decoder=PlainKV(kv()), dtype=dtype, **options)


def ragged(*names: str, **options: Any) -> Group:
    made = [Component(n, heads=4, width=16, dtype=torch.float16, ragged=True, **options) for n in names]
    return Group("lanes", tuple(made), (0,))


def per_head() -> CacheSpec:
    return CacheSpec((ragged("k", "v"),), block_size=64)


def gold_window() -> object:
    layout = GOLD.layout
    return GoldFinch(
        windowed(layout.spec), layout._shared, layout._layers, num_heads=layout.num_heads, rope=layout.rope
    )


def windowed(spec: CacheSpec) -> CacheSpec:
    return replace(spec, groups=tuple(replace(group, window_tokens=64) for group in spec.groups), components=None)


def joined(layout: Layout, spec: CacheSpec) -> object:
    """The layout over an allocator of another spec than its own."""
    sizes: dict[str, Any] = {"memory": "8MiB", "max_sequences": 4, "max_tokens": 256}
    return LayoutCache(layout, Allocator(spec, backend="paged", device="cpu", **sizes))


def per_head_of(layout: Layout) -> CacheSpec:
    (group,) = layout.spec.groups
    parts = tuple(replace(component, ragged=True, heads=2) for component in group.components)
    return replace(layout.spec, groups=(replace(group, components=parts),), components=None)


#: Refused where the layout or its spec is made.
CONSTRUCTED: dict[tuple[str, str], Callable[[], object]] = {
    ("slim", "gqa"): lambda: slim(kv_heads=2),
    ("slim", "bf16"): lambda: slim(dtype=torch.bfloat16),
    ("slim", "low-bit keys"): lambda: slim(dtype=torch.float8_e4m3fn),
    ("slim", "eviction per head"): lambda: ragged("k"),
    ("slim", "heads over ranks"): lambda: SlimK([Projection(W[:, :32], W[:, :32])], num_heads=2, head_dim=16),
    ("slim x", "rotation"): lambda: wide(Rope.default(64)),
    ("slim x", "low-bit keys"): lambda: wide(dtype=torch.float8_e4m3fn),
    ("shared encoder", "rotation"): lambda: encoder(rope=Rope.default(16)),
    ("shared encoder", "low-bit keys"): lambda: encoder(torch.float8_e4m3fn),
    ("shared encoder", "eviction per head"): lambda: ragged("enc", scope="shared", growth="prefill"),
    ("shared encoder", "sliding window"): lambda: Group(
        "encoder", (Component("enc", width=64, dtype=torch.float16, growth="prefill"),), (0,), window_tokens=8
    ),
    ("goldfinch", "low-bit keys"): lambda: goldfinch_spec(num_layers=3, d_model=64, dtype="fp8_e4m3"),
    ("goldfinch", "eviction per head"): lambda: ragged("c", scope="shared"),
    ("goldfinch", "sliding window"): gold_window,
    ("aligned", "low-bit keys"): lambda: AlignedKV(kv(dtype=torch.float8_e4m3fn)),
    ("aligned", "eviction per head"): lambda: AlignedKV(per_head()),
    ("aligned", "sliding window"): lambda: AlignedKV(kv(window=128)),
    ("quantised", "eviction per head"): lambda: QuantisedKV(per_head()),
    ("quantised", "sliding window"): lambda: QuantisedKV(kv(window=128)),
    ("lanes", "prefix cache"): lambda: lanes(prefix_cache=True),
    ("lanes", "sliding window"): lambda: lanes(window_tokens=8),
}
#: The layout makes its own spec, and an allocator of another one is refused.
JOINED: dict[tuple[str, str], Callable[[], object]] = {
    ("slim", "sliding window"): lambda: joined(slim(), windowed(slim().spec)),
    ("slim x", "sliding window"): lambda: joined(wide(), windowed(wide().spec)),
    ("slim x", "eviction per head"): lambda: joined(wide(), per_head_of(wide())),
    ("palu", "sliding window"): lambda: joined(palu(), windowed(palu().spec)),
    ("palu", "eviction per head"): lambda: joined(palu(), per_head_of(palu())),
}
#: Refused when kernels ask for their arguments.
ASKED: dict[tuple[str, str], Callable[[], object]] = {
    (name, "other kernels"): lambda made=made: made().kernel_args(0)
    for name, made in {
        "slim": lambda: slim(), "slim x": lambda: wide(), "shared encoder": encoder, "palu": lambda: palu(),
        "goldfinch": lambda: GOLD.layout, "aligned": lambda: AlignedKV(kv()),
    }.items()
}  # fmt: skip
#: What no argument can ask for, so only the table says no; and what the user has to mind.
ONLY_SAID = {
    ("slim x", "heads over ranks"): "no argument gives a part of X",
    ("shared encoder", "heads over ranks"): "no argument gives a part of the encoder's output",
    ("shared encoder", "prefix cache"): "the decoder's own blocks can be found: name the input with adapter=",
    ("shared encoder", "truncate"): "truncate() cuts the groups that grow with the tokens",
    ("goldfinch", "gqa"): "num_heads is that of queries, K and V",
    ("goldfinch", "heads over ranks"): "no argument gives a part of c",
    ("goldfinch", "prefix cache"): "nothing is found but snapshots",
    ("goldfinch", "truncate"): "the model has to restore its states",
    ("lanes", "truncate"): "sequences of lanes have no such call",
}


def palu() -> Layout:
    from kvmem.layouts.palu import Palu

    return Palu(make_weights(1, 3), 8, kv_heads=4, head_dim=16, group_heads=2, dtype=torch.float16)


def lanes(**options: object) -> LaneCache:
    sizes: dict[str, object] = {"device": "cpu", "memory": "1MiB", "max_tokens": 64, "page_bytes": 4096}
    return LaneCache(
        num_layers=1, num_kv_heads=2, head_dim=16, dtype=torch.float16, max_sequences=2, **(sizes | options)
    )


@pytest.mark.parametrize(("layout", "feature"), REFUSALS)
def test_every_refusal_says_why_and_what_works(layout: str, feature: str) -> None:
    reason = find(layout).refuses[feature]
    assert re.search(r"[:,;] ", reason), "a reason, and the nearest choice"
    with pytest.raises(SpecError, match=re.escape(reason)):
        check_combination(layout, feature)
    if build := (CONSTRUCTED | JOINED | ASKED).get((layout, feature)):
        with pytest.raises(SpecError):
            build()


def test_each_refusal_has_one_way() -> None:
    ways = [*CONSTRUCTED, *JOINED, *ASKED, *ONLY_SAID]
    assert sorted(ways) == sorted(REFUSALS)


def test_what_is_not_refused_is_built() -> None:
    assert slim().spec.bytes_per_token * 2 == kv(1).bytes_per_token
    assert wide().spec and palu().spec and AlignedKV(kv()).spec and QuantisedKV(kv()).spec and lanes()
    for entry in LAYOUTS:
        check_combination(entry.name, *(feature for feature in FEATURES if feature not in entry.refuses))
        assert entry.layout_class.__doc__ and set(entry.refuses) <= set(FEATURES)
    for layout, features in (("slimm", ()), ("slim", ("speed",))):
        with pytest.raises(SpecError, match="must be one of"):
            check_combination(layout, *features)


def test_a_layout_is_one_file_and_one_entry() -> None:
    """Every class of the package that is a layout has its entry, and no other module names it."""
    folder = Path(__file__).parents[2] / "kvmem" / "layouts"
    entries = {(entry.module, entry.factory) for entry in LAYOUTS}
    found = {
        (file.stem, name)
        for file in folder.glob("*.py")
        for name in re.findall(r"^class ([A-Z]\w*)\((?:Layout|_Folding|_Inputs)\)", file.read_text(), re.MULTILINE)
    }
    assert found == entries - {("lanes", "LaneCache")}, "lanes are sequences of their own, not a Layout"
    others = {file.stem for file in folder.glob("*.py")} - {"registry", "__init__"}
    for module, factory in entries:
        for other in others - {module}:
            assert not re.search(rf"import .*\b{factory}\b", (folder / f"{other}.py").read_text()), (module, other)


def test_the_page_shows_the_table() -> None:
    lines = DOCS.read_text().splitlines()
    for entry in LAYOUTS:
        row = next(line for line in lines if line.startswith(f"| {entry.name} |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
        assert cells == ["no" if feature in entry.refuses else "yes" for feature in FEATURES], entry.name
    header = next(line for line in lines if line.startswith("| layout | gqa"))
    assert [cell.strip() for cell in header.strip("|").split("|")][1:] == list(FEATURES)
