"""Rotation against transformers' own modules, and its exactness."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from kvmem.errors import SpecError
from kvmem.layouts.rope import Rope

# (family, its module's prefix, fields of its config)
SIZES = dict(hidden_size=256, num_attention_heads=4, num_hidden_layers=1, vocab_size=8, intermediate_size=8)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=10_000.0, factor=4.0, original_max_position_embeddings=2048)
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "default": ("llama", "Llama", dict(rope_parameters=dict(rope_type="default", rope_theta=10_000.0))),
    "head_dim": ("mistral", "Mistral", dict(head_dim=96, rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "linear": ("llama", "Llama", dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10_000.0))),
    "llama3": ("llama", "Llama", dict(max_position_embeddings=131_072, rope_parameters=LLAMA3)),
    "llama3, short": ("llama", "Llama", dict(rope_parameters=LLAMA3 | dict(original_max_position_embeddings=64))),
    "yarn": ("qwen2", "Qwen2", dict(rope_parameters=YARN)),
    "yarn, mscale": ("llama", "Llama", dict(rope_parameters=YARN | dict(mscale=0.707, mscale_all_dim=1.3))),
    "yarn, betas": ("llama", "Llama", dict(rope_parameters=YARN | dict(beta_fast=16, beta_slow=2, truncate=False))),
    "yarn, attention factor": ("llama", "Llama", dict(rope_parameters=YARN | dict(attention_factor=1.7))),
    "yarn, no factor": (
        "llama", "Llama", dict(max_position_embeddings=10_240, rope_parameters=YARN | dict(factor=None)),
    ),
    "partial, neox": ("gpt_neox", "GPTNeoX", dict(rotary_pct=0.25)),
    "partial, phi": ("phi", "Phi", dict(partial_rotary_factor=0.5)),
    "partial, stablelm": ("stablelm", "StableLm", dict(partial_rotary_factor=0.25)),
    "partial, yarn": ("phi", "Phi", dict(rope_parameters=YARN | dict(partial_rotary_factor=0.75))),
}  # fmt: skip


def built(name: str) -> tuple[Any, Any, Any]:
    """The config, the module that makes cosines and sines, and the family's module."""
    family, prefix, fields = CONFIGS[name]
    pytest.importorskip("transformers")
    config_class = getattr(importlib.import_module(f"transformers.models.{family}"), f"{prefix}Config")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = config_class(**SIZES, **fields)
    return config, getattr(module, f"{prefix}RotaryEmbedding")(config), module


@pytest.mark.parametrize("name", CONFIGS)
def test_as_transformers_rotates(name: str) -> None:
    config, rotary, module = built(name)
    rope = Rope.from_config(config)
    assert rope is not None
    torch.testing.assert_close(rope.inv_freq.float(), rotary.inv_freq, rtol=1e-5, atol=0)
    assert rope.factor == pytest.approx(rotary.attention_scaling)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    x, positions = torch.randn(200, 3, width), torch.arange(200)
    cos, sin = rotary(x, positions[None])
    turned = 2 * len(rope.inv_freq)  # transformers' attention splits a partial head before this call
    expected, _ = module.apply_rotary_pos_emb(*2 * [x[..., :turned].transpose(0, 1)[None]], cos, sin)
    expected = torch.cat([expected[0].transpose(0, 1), x[..., turned:]], -1)
    torch.testing.assert_close(rope.apply(x, positions), expected, rtol=0, atol=1e-4)
    assert (turned < width) == ("partial" in name)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_dict_is_read_as_the_object(name: str) -> None:
    config, _, _ = built(name)
    mine, other = Rope.from_config(config), Rope.from_config({"text_config": config.to_dict()})
    assert mine is not None and other is not None
    assert torch.equal(mine.inv_freq, other.inv_freq) and mine.factor == other.factor


def test_older_names_of_the_fields() -> None:
    sizes = dict(hidden_size=256, num_attention_heads=4, max_position_embeddings=2048)
    old = Rope.from_config(sizes | dict(rope_theta=1e4, rope_scaling=dict(type="linear", factor=4.0)))
    new = Rope.from_config(sizes | dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4)))
    assert torch.equal(old.inv_freq, new.inv_freq) and torch.equal(new.inv_freq * 4, Rope.default(64).inv_freq)
    pretrained = dict(LLAMA3)
    length = pretrained.pop("original_max_position_embeddings")
    beside = Rope.from_config(sizes | dict(original_max_position_embeddings=length, rope_parameters=pretrained))
    assert torch.equal(beside.inv_freq, Rope.from_config(sizes | dict(rope_parameters=LLAMA3)).inv_freq)


@pytest.mark.parametrize("rope", [Rope.default(64), Rope(Rope.default(32).inv_freq / 4, 1.3)], ids=["plain", "factor"])
def test_undo_and_shift_are_exact(rope: Rope) -> None:
    """To 1e-6 for entries near 1 in float32, up to position 100,000."""
    x = torch.rand(500, 2, 64) * 2 - 1
    positions = torch.randint(0, 100_000, (500,))
    rotated = rope.apply(x, positions)
    assert (rope.undo(rotated, positions) - x).abs().max() <= 1e-6
    by = torch.randint(-50_000, 50_000, (500,))
    assert (rope.shift(rotated, by) - rope.apply(x, positions + by)).abs().max() <= 2e-6
    assert torch.equal(rope.shift(rotated, 7), rope.shift(rotated, torch.full((500,), 7)))
    exact = rope.apply(x.double(), positions)
    assert (rope.undo(exact, positions) - x.double()).abs().max() <= 1e-12
    assert (rotated - exact).abs().max() <= 2e-6, "float32 angles would lose 1e-3 at such positions"


@pytest.mark.parametrize(
    ("dtype", "plain", "shifted"), [(torch.bfloat16, 1.7e-3, 2.4e-3), (torch.float16, 2.1e-4, 2.9e-4)]
)
def test_a_shift_of_a_short_dtype_costs_one_more_rounding(dtype: torch.dtype, plain: float, shifted: float) -> None:
    rope, x, positions = Rope.default(64), torch.randn(4000, 1, 64), torch.randint(0, 4096, (4000,))

    def error(found: torch.Tensor, exact: torch.Tensor) -> float:
        return float((found.double() - exact).norm() / exact.norm())

    stored = rope.apply(x, positions).to(dtype)
    assert error(stored, rope.apply(x.double(), positions)) == pytest.approx(plain, rel=0.1)
    moved = rope.shift(stored, 1000)
    assert moved.dtype == dtype
    assert error(moved, rope.apply(x.double(), positions + 1000)) == pytest.approx(shifted, rel=0.1)


def test_scores_depend_on_the_distance_alone() -> None:
    rope, (q, k) = Rope.default(32), torch.randn(2, 1, 1, 32).double()
    near, far = (
        (rope.apply(q, torch.tensor([at])) * rope.apply(k, torch.tensor([at - 11]))).sum() for at in (11, 90_011)
    )
    assert abs(near - far) <= 1e-9


@pytest.mark.parametrize(
    "config",
    [
        dict(model_type="gpt2", n_embd=64, n_head=2), dict(model_type="bert", position_embedding_type="absolute"),
        dict(model_type="falcon", alibi=True, rope_theta=1e4),
    ],
    ids=["learned", "absolute", "alibi"],
)  # fmt: skip
def test_models_that_rotate_nothing(config: dict[str, Any]) -> None:
    assert Rope.from_config(config) is None


PLAIN = dict(hidden_size=256, num_attention_heads=4, max_position_embeddings=2048)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)), "'dynamic'; must be one of default, linear"),
        (dict(rope_parameters=dict(rope_type="longrope", rope_theta=1e4)), "'longrope'; must be one of"),
        (dict(rope_parameters=dict(full_attention={"rope_theta": 1e6}, sliding_attention={"rope_theta": 1e4})), r"\['full_attention', 'sliding_attention'\]"),
        (dict(rope_parameters=dict(rope_type="llama3", factor=8.0, rope_theta=1e4)), "llama3 needs another number: 'low_freq_factor'"),
        (dict(model_type="llama"), "rope_theta: missing from the config of 'llama'"),
        (dict(model_type="glm", rope_theta=1e4), "'glm', which pairs neighbouring elements"),
        (dict(model_type="deepseek_v3", rope_theta=1e4), "'deepseek_v3', which pairs neighbouring"),
        (dict(model_type="new", rope_theta=1e4, rope_interleave=True), "pairs neighbouring elements"),
        (dict(rope_theta=1e4, hidden_size=0), "head_dim: got 0; must be an integer of at least 2"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(config: dict[str, Any], why: str) -> None:
    with pytest.raises(SpecError, match=why):
        Rope.from_config(PLAIN | config)


def test_shapes_that_are_refused() -> None:
    rope, x = Rope.default(32), torch.zeros(5, 2, 16)
    with pytest.raises(SpecError, match=r"inv_freq: got \(0,\) torch.float32 on cpu; must be a tensor"):
        Rope(torch.zeros(0))
    for head_dim in (7, 8.0, "8", None):
        with pytest.raises(SpecError, match="head_dim.*: got .*; must be (an integer of at least 2|even)"):
            Rope.default(head_dim)  # type: ignore[arg-type]
    for bad in (x, torch.zeros(5, 32)):
        with pytest.raises(SpecError, match="width of at least 32"):
            rope.apply(bad, torch.arange(5))
    with pytest.raises(SpecError, match=r"got .\(5, 2, 32\) torch.float32 on cpu, \(4,\) torch.int64"):
        rope.undo(torch.zeros(5, 2, 32), torch.arange(4))


def test_positions_of_any_integer_type_are_undone() -> None:
    """Unsigned ones cannot be negated."""
    x, rope = torch.randn(5, 2, 32), Rope.default(32)
    for dtype in (torch.uint8, torch.int8, torch.int32):
        positions = torch.arange(5, dtype=dtype)
        torch.testing.assert_close(rope.undo(rope.apply(x, positions), positions), x)


def test_values_of_a_wrong_kind_are_refused() -> None:
    x, at = torch.zeros(5, 2, 32), torch.arange(5)
    calls: list[Any] = [
        *(lambda v=v: Rope(v) for v in (None, [1.0], at.numpy(), torch.tensor([torch.inf]))),
        *(lambda v=v: Rope(torch.ones(2), v) for v in (0, None, "1", torch.nan)),
        *(lambda v=v: Rope.default(8, theta=v) for v in (0, None, "1", torch.nan, torch.inf)),
        *(lambda v=v: Rope.default(32).apply(x, v) for v in (None, 3, [1] * 5, at.numpy())),
        *(lambda v=v: Rope.default(32).apply(v, at) for v in (None, x.numpy(), x.int())),
        *(lambda v=v: Rope.default(32).shift(x, v) for v in (None, 0.5, "1", at[:3], at[None])),
        *(lambda v=v: Rope.from_config(v) for v in (None, "llama", PLAIN | dict(rope_scaling="linear"))),
        *(lambda v=v: Rope.from_config(PLAIN | dict(rope_theta=1e4) | v) for v in (
            dict(rope_scaling=[1]), dict(rope_scaling=dict(type=["yarn"])), dict(hidden_size=None),
            dict(rope_scaling=dict(type="linear", factor=0)), dict(partial_rotary_factor="a"),
        )),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(SpecError, match="got"):
            call()
