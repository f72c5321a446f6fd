"""What cannot be combined: the table answers before there are weights, constructors refuse the same when a spec is made."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from palu_cases import make_weights

from kvmem import CacheSpec, Component, Group, SpecError
from kvmem.layouts import Layout
from kvmem.layouts.aligned import AlignedKV
from kvmem.layouts.lanes import LaneCache
from kvmem.layouts.quantised import QuantisedKV
from kvmem.layouts.registry import FEATURES, LAYOUTS, check_combination, find
from kvmem.layouts.rope import Rope
from kvmem.layouts.slim import Projection, SlimK, SlimX

DOCS = Path(__file__).parents[2] / "docs" / "layouts.md"
REFUSALS = [(entry.name, feature) for entry in LAYOUTS for feature in entry.refuses]


def kv(heads: int = 4, *, dtype: torch.dtype = torch.float16, window: int | None = None) -> CacheSpec:
    return CacheSpec.kv(num_layers=1, num_kv_heads=heads, head_dim=64, dtype=dtype, block_size=64, window_tokens=window)


def slim(kv_heads: int = 4, dtype: torch.dtype = torch.float16) -> SlimK:
    draw = torch.Generator().manual_seed(1)
    w = torch.randn(64, 64, generator=draw, dtype=torch.float64) + 16 * torch.eye(64)
    return SlimK([Projection(w[:, : kv_heads * 16], w[:, : kv_heads * 16])], num_heads=4, head_dim=16, dtype=dtype)


def wide(rope: Rope | None = None, dtype: torch.dtype = torch.float16) -> SlimX:
    w = make_weights(1, 2)[0][0].repeat(1, 4)
    return SlimX([Projection(w, w)], head_dim=64, dtype=dtype, rope=rope)


def ragged(*names: str) -> Group:
    return Group("lanes", tuple(Component(n, heads=4, width=16, dtype=torch.float16, ragged=True) for n in names), (0,))


#: What a constructor refuses. The rest of the table are things that no constructor is asked for.
CONSTRUCTED: dict[tuple[str, str], Callable[[], object]] = {
    ("slim", "gqa"): lambda: slim(kv_heads=2),
    ("slim", "bf16"): lambda: slim(dtype=torch.bfloat16),
    ("slim", "low-bit keys"): lambda: slim(dtype=torch.float8_e4m3fn),
    ("slim", "eviction per head"): lambda: ragged("k"),
    ("slim x", "rotation"): lambda: wide(Rope.default(64)),
    ("slim x", "low-bit keys"): lambda: wide(dtype=torch.float8_e4m3fn),
    ("shared encoder", "sliding window"): lambda: Group(
        "encoder", (Component("enc", width=64, dtype=torch.float16, growth="prefill"),), (0,), window_tokens=8
    ),
    ("palu", "other kernels"): lambda: palu().kernel_args(0),
    ("aligned", "low-bit keys"): lambda: AlignedKV(kv(dtype=torch.float8_e4m3fn)),
    ("aligned", "sliding window"): lambda: AlignedKV(kv(window=128)),
    ("aligned", "other kernels"): lambda: AlignedKV(kv()).kernel_args(0),
    ("quantised", "sliding window"): lambda: QuantisedKV(kv(window=128)),
    ("lanes", "prefix cache"): lambda: lanes(prefix_cache=True),
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
    if build := CONSTRUCTED.get((layout, feature)):
        with pytest.raises(SpecError):
            build()


def test_what_is_not_refused_is_built() -> None:
    assert set(CONSTRUCTED) <= set(REFUSALS)
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
