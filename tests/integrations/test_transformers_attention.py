"""``attn_implementation="kvmem"``: what ``KVMemCache`` generates when attention reads it in place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support_transformers import MAKERS, assert_same, dynamic_cache, generate, model_of, one_thread, open_cache, prompts
from transformers import PreTrainedModel

import kvmem
from kvmem.integrations.transformers import attention
from kvmem.integrations.transformers.layer import KVMemLayer

__all__ = ["one_thread"]
MODES = {
    "greedy": {},
    "beam": {"num_beams": 4, "num_return_sequences": 2},
    "assisted": {"prompt_lookup_num_tokens": 3},
}


@pytest.fixture(params=["llama", "gemma3", "bart"])
def model(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    model = model_of(request.param)
    before = model.config._attn_implementation
    yield model
    model.set_attn_implementation(before)


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers whose attention was read in place, in order."""
    layers, attend = [], KVMemLayer.attend

    def counted(self: KVMemLayer, *args: object) -> torch.Tensor | None:
        found = attend(self, *args)  # type: ignore[arg-type]
        if found is not None:
            layers.append(self._layer)
        return found

    monkeypatch.setattr(KVMemLayer, "attend", counted)
    return layers


@pytest.mark.parametrize("mode", MODES)
def test_generates_what_the_dynamic_cache_does(
    model: PreTrainedModel, mode: str, backend: str, in_place: list[int]
) -> None:
    """Padding on the left, windows, cross attention; and again with another implementation in between."""
    inputs = prompts(pad=2, rows=1 if mode == "assisted" else 3)
    expected = generate(model, inputs, dynamic_cache(model), **MODES[mode])
    cache = open_cache(model, backend)
    model.set_attn_implementation("kvmem")
    assert_same(generate(model, inputs, cache, **MODES[mode]), expected)
    assert in_place or mode == "assisted"  # whose drafts are several tokens a row
    model.set_attn_implementation("sdpa")
    cache.reset()
    counted = len(in_place)
    assert_same(generate(model, inputs, cache, **MODES[mode]), expected)
    assert len(in_place) == counted


def test_every_step_is_read_in_place(backend: str, in_place: list[int]) -> None:
    model, inputs = model_of("llama"), prompts()
    model.set_attn_implementation("kvmem")
    try:
        cache = open_cache(model, backend)
        generate(model, inputs, cache)
        tokens = cache.get_seq_length() - inputs["input_ids"].shape[1]
        assert in_place == [0, 1, 2] * tokens
        assert_same(generate(model, inputs, dynamic_cache(model)), generate(model, inputs, open_cache(model, backend)))
    finally:
        model.set_attn_implementation("sdpa")


def test_a_mask_that_is_no_padding_on_the_left(backend: str, in_place: list[int]) -> None:
    """A hole: read out, and computed by SDPA."""
    model, inputs = model_of("llama"), prompts(rows=2)
    inputs["attention_mask"][1, 5:8] = 0
    expected = generate(model, inputs, dynamic_cache(model))
    model.set_attn_implementation("kvmem")
    try:
        assert_same(generate(model, inputs, open_cache(model, backend)), expected)
    finally:
        model.set_attn_implementation("sdpa")
    assert not in_place


def test_another_attention_is_told(backend: str) -> None:
    """What the cache gives for reading in place is no tensor to compute with."""
    model = model_of("llama")
    cache = open_cache(model, backend)
    model.set_attn_implementation("kvmem")
    try:
        k, _ = cache.update(torch.zeros(1, 2, 3, 12), torch.zeros(1, 2, 3, 12), 0)
    finally:
        model.set_attn_implementation("sdpa")
    assert isinstance(k, attention.StoredTokens) and k.shape == (1, 2, 3, 12) and "(1, 2, 3, 12)" in repr(k)
    for use in (lambda: k + 1, lambda: k.sum(), lambda: torch.matmul(torch.zeros(1, 2, 3, 3), k), lambda: k[0]):
        with pytest.raises(kvmem.SpecError, match='attn_implementation="kvmem"'):
            use()


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_without_a_kvmem_cache(name: str) -> None:
    model, inputs = model_of(name), prompts(pad=2)
    if not model._can_set_attn_implementation():
        pytest.skip("this model has attention of its own")
    before = model.config._attn_implementation
    expected = generate(model, inputs, dynamic_cache(model))
    model.set_attn_implementation("kvmem")
    try:
        assert_same(generate(model, inputs, dynamic_cache(model)), expected)
    finally:
        model.set_attn_implementation(before)
