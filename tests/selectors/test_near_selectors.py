"""The measurement of selectors on a model: what must hold for every model, on a tiny random one."""

from __future__ import annotations

import pytest
import torch

from kvmem.bench.language_models import load_language_model
from kvmem.bench.near.selectors import recorded, repository_text, selector_rows
from kvmem.bench.text import BenchError


def test_rows_of_a_tiny_model() -> None:
    model = load_language_model("tiny")
    layers = recorded(model, "To be, or not to be. " * 20, 150, 6)
    assert len(layers) == 4 and [part.shape for part in layers[0]] == [(6, 4, 16), (150, 2, 16), (150, 2, 16)]
    assert model.model.config._attn_implementation != "kvmem_recorded"
    rows = selector_rows(layers[:2], (1, 48, 160))
    assert len(rows) == 3 * 2 * 6
    for row in rows:
        if row.budget_tokens == 160:  # dense
            assert row.recall == row.mass == 1 and row.error == 0 and row.read_share >= 1
        else:
            assert row.budget_tokens == 48 or row.recall == 1, (
                "the first and the newest block are all there is room for"
            )
            assert 0 <= row.recall <= 1 and 0 < row.mass < 1 and 0 < row.error < 2
        assert row.selector != "true mass" or row.recall == 1
    best = {r.per_head: r.mass for r in rows if r.selector == "true mass" and r.budget_tokens == 48}
    assert all(r.mass <= best[True] + 1e-6 for r in rows if r.budget_tokens == 48), (
        "each head for itself is the best there is"
    )
    recent = next(r for r in rows if r.selector == "Recent" and r.budget_tokens == 48)
    assert 33 / 150 <= recent.read_share < 48 / 144


def test_what_is_recorded_is_what_the_model_attends_to() -> None:
    model = load_language_model("tiny")
    seen: list[torch.Tensor] = []
    hook = model.model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda m, i, out: seen.append(out))
    recorded_v = recorded(model, "abc" * 20, 50, 3)[0][2]
    hook.remove()
    assert seen[0].shape == (1, 50, 32) and recorded_v.shape == (50, 2, 16)


def test_refusals() -> None:
    model = load_language_model("tiny")
    for tokens, queries in ((50, 3), (10, 10), (10, 0)):
        with pytest.raises(BenchError, match="the text has 12"):
            recorded(model, "twelve bytes", tokens, queries)
    assert len(repository_text()) > 10_000
