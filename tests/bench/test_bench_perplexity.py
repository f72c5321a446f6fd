"""`perplexity`: through plain K and V it is the model's own, a layout that loses more is further from it."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra kvmem[transformers]")

from benchmarks import perplexity as module
from benchmarks.perplexity import LAYOUTS, TEXT, Subject, perplexity, perplexity_tables
from kvmem.bench.language_models import load_language_model

TOKENS = 300


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(load_language_model("tiny"))


@torch.no_grad()
def test_the_models_own_perplexity(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DTYPE", torch.float32)  # rounding to bfloat16 changes this model by 0.3 %
    ids = subject.read(TEXT, TOKENS)
    own = math.exp(float(subject.model(ids[None], labels=ids[None], use_cache=False).loss))
    for name, error in (("plain", 1e-4), ("Palu, full rank", 1e-4), ("quantised, int8 by token", 3e-2)):
        assert perplexity(subject, LAYOUTS[name](subject), ids) == pytest.approx(own, rel=error), name
    assert all(layer.self_attn in subject.attentions for layer in subject.layers), "the model is as it was"


def test_every_row_is_made_and_shown(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes fall as the names say, and none of the layouts is refused by the model."""
    monkeypatch.setattr(module, "CALIBRATION_TOKENS", 512)
    sizes = {name: make(subject).spec.groups[0].bytes_per_token for name, make in LAYOUTS.items()}
    assert (
        sizes["plain"] == sizes["Palu, full rank"] == 2 * sizes["quantised, fp8 e4m3"] == 2 * sizes["Palu, rank 50 %"]
    )
    assert sizes["quantised, int2 (KIVI)"] < sizes["quantised, int4 (KIVI)"] < sizes["quantised, int8 by token"]
    rows = [{"layout": name, "bytes_per_token": size, "tokens": 2, "perplexity": 1.5} for name, size in sizes.items()]
    (table,) = perplexity_tables({"model": "m", "text": TEXT, "calibration": "c"}, rows)
    assert len(table.rows) == len(LAYOUTS) and table.rows[0] == ["plain", f"{sizes['plain']:,}", "100 %", "1.50"]
