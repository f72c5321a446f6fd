"""Perplexity of a language model through each layout, beside the bytes of a token: what a smaller cache costs.

Each layer writes and attends through a `LayoutCache`. JSON rows: ``layout, bytes_per_token, tokens, perplexity``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy

from kvmem import Allocator, CacheSpec
from kvmem.bench.__main__ import main
from kvmem.bench.cli import JSON, QUIET
from kvmem.bench.document import check_writable, document, write_json
from kvmem.bench.language_models import LANGUAGE_MODELS, LanguageModel, load_language_model
from kvmem.bench.render import Row, Table, cell, console, show
from kvmem.bench.text import BenchError, progress
from kvmem.bench.timing import one_thread
from kvmem.layouts import Layout, LayoutCache, PlainKV
from kvmem.layouts.palu import Palu, search_ranks
from kvmem.layouts.quantised import QuantisedKV
from kvmem.layouts.rope import Rope

#: What is measured, and what whitening and rank search are calibrated on: documents of kvmem's own.
TEXT, CALIBRATION = "docs/eviction.md", "docs/decisions.md"
CHUNK_TOKENS, CALIBRATION_TOKENS, DTYPE = 256, 4096, torch.bfloat16


class Subject:
    """A model of Llama's structure, and what layouts need to know of it."""

    def __init__(self, language_model: LanguageModel) -> None:
        self.language_model, self.model = language_model, language_model.model
        self.config, self.layers = self.model.config, self.model.model.layers
        self.attentions = [layer.self_attn for layer in self.layers]
        self.rope = Rope.from_config(self.config) or Rope.default(self.config.head_dim)

    def read(self, text: str, tokens: int) -> torch.Tensor:
        """The first ids of a document; bytes for a model without a tokenizer."""
        whole, tokenizer = (Path(__file__).parents[1] / text).read_text(), self.language_model.tokenizer
        ids = tokenizer(whole)["input_ids"] if tokenizer else list(whole.encode())
        if len(ids) < tokens:
            raise BenchError(f"--tokens: got {tokens}; {text} has {len(ids)}")
        return torch.tensor(ids[:tokens])

    @cached_property
    def calibrated(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Each layer's covariance of x, and the mean Fisher information of weights, ``[layers, K and V, channels]``."""
        # A little on the diagonal, for what the text does not show: a tiny model of bytes sees few of them.
        covariances = [1e-6 * torch.eye(a.k_proj.in_features, dtype=torch.float64) for a in self.attentions]

        def note(layer: int, _: Any, inputs: tuple[torch.Tensor]) -> None:
            x = inputs[0].detach()[0]
            covariances[layer] += x.T @ x / CALIBRATION_TOKENS

        hooks = [a.k_proj.register_forward_pre_hook(partial(note, a.layer_idx)) for a in self.attentions]
        weights = [p.weight.requires_grad_() for a in self.attentions for p in (a.k_proj, a.v_proj)]
        fisher = torch.zeros(len(weights), len(weights[0]))
        for ids in torch.split(self.read(CALIBRATION, CALIBRATION_TOKENS)[None], 2 * CHUNK_TOKENS, dim=1):
            gradients = torch.autograd.grad(self.model(ids, labels=ids, use_cache=False).loss, weights)
            fisher += torch.stack([gradient.square().mean(1) for gradient in gradients])
        for hook in hooks:
            hook.remove()
        return covariances, fisher.view(len(self.layers), 2, -1)

    def palu(self, share: float, *, whitened: bool = True, searched: bool = False, groups: int = 1, **how: Any) -> Palu:
        """``share``: of the full rank. ``searched``: ranks by Fisher information, under the bytes of that share."""
        heads, width = self.config.num_key_value_heads, self.attentions[0].k_proj.out_features // groups
        ranks: Any = max(8, round(share * width / 8) * 8)
        if searched:
            scores = self.calibrated[1].view(len(self.layers), 2, groups, width).mean(-1)
            budget = 2 * len(self.layers) * groups * ranks * DTYPE.itemsize
            ranks = search_ranks(scores, width=width, budget_bytes=budget, dtype=DTYPE, multiple=min(32, width // 4))
        return Palu(
            [(a.k_proj.weight.T, a.v_proj.weight.T, a.o_proj.weight.T) for a in self.attentions],
            ranks, kv_heads=heads, head_dim=self.config.head_dim, group_heads=heads // groups, dtype=DTYPE,
            rope=self.rope, covariances=self.calibrated[0] if whitened else None, **how,
        )  # fmt: skip

    def plain(self) -> CacheSpec:
        return CacheSpec.from_config(self.config, dtype=DTYPE)

    def quantised(self, **how: Any) -> QuantisedKV:
        return QuantisedKV(self.plain(), **how)


#: Each layout that is measured, made for a model.
LAYOUTS: dict[str, Callable[[Subject], Layout]] = {
    "plain": lambda s: PlainKV(s.plain()),
    "Palu, full rank": lambda s: s.palu(1, whitened=False),
    "Palu, rank 75 %, not whitened": lambda s: s.palu(0.75, whitened=False),
    "Palu, rank 50 %, not whitened": lambda s: s.palu(0.5, whitened=False),
    "Palu, rank 25 %, not whitened": lambda s: s.palu(0.25, whitened=False),
    "Palu, rank 75 %": lambda s: s.palu(0.75),
    "Palu, rank 50 %": lambda s: s.palu(0.5),
    "Palu, rank 25 %": lambda s: s.palu(0.25),
    "Palu, rank 50 %, one head a group": lambda s: s.palu(0.5, groups=s.config.num_key_value_heads),
    "Palu, rank 50 % in all, searched": lambda s: s.palu(0.5, searched=True),
    "Palu, rank 75 %, int4": lambda s: s.palu(0.75, bits=4),
    "Palu, rank 75 %, int4, rotated": lambda s: s.palu(0.75, bits=4, rotate_latents=True),
    "Palu, rank 75 %, int3": lambda s: s.palu(0.75, bits=3),
    "Palu, rank 75 %, int3, rotated": lambda s: s.palu(0.75, bits=3, rotate_latents=True),
    "quantised, fp8 e4m3": lambda s: s.quantised(k="fp8_e4m3", v="fp8_e4m3"),
    "quantised, fp8 e5m2": lambda s: s.quantised(k="fp8_e5m2", v="fp8_e5m2"),
    "quantised, int8 by token": lambda s: s.quantised(k="int8", v="int8", k_scales="token"),
    "quantised, int4 (KIVI)": lambda s: s.quantised(),
    "quantised, int4 by token": lambda s: s.quantised(k_scales="token"),
    "quantised, int4 by token, rotated": lambda s: s.quantised(k_scales="token", rotate=True),
    "quantised, int3 (KIVI)": lambda s: s.quantised(k="int3", v="int3"),
    "quantised, int2 (KIVI)": lambda s: s.quantised(k="int2", v="int2"),
}
#: What `encode` takes, if not ``("k_rotated", "v")``: the input ``x`` of the projections, ``k`` before rotation, ``v``.
TAKES: dict[type[Layout], tuple[str, ...]] = {Palu: ("x",)}


class CachedAttention(torch.nn.Module):
    """A layer's attention over the cache of one sequence. ``batch``: of the step; set it before each forward."""

    batch: Any = None

    def __init__(self, attention: Any, cache: LayoutCache, rope: Rope) -> None:
        super().__init__()
        self.attention, self.layer, self.cache, self.rope = attention, attention.layer_idx, cache, rope

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        a, layout, x, at = self.attention, self.cache.layout, hidden_states[0], self.batch.positions
        q, k, v = (project(x).view(len(x), -1, a.head_dim) for project in (a.q_proj, a.k_proj, a.v_proj))
        parts = {"x": x, "k": k, "k_rotated": self.rope.apply(k, at), "v": v}
        self.cache.write(self.layer, self.batch, *(parts[name] for name in TAKES.get(type(layout), ("k_rotated", "v"))))
        out, _lse = self.cache.attend(self.rope.apply(q, at), self.layer, self.batch, scale=a.scaling)
        # A layout with its own W_O returns what that takes.
        y = layout.project(self.layer, out) if hasattr(layout, "project") else a.o_proj(out.flatten(1))
        return y[None], None


@torch.no_grad()
def perplexity(subject: Subject, layout: Layout, ids: torch.Tensor) -> float:
    """Of the tokens after the first, each given all before it, a chunk at a time. ``ids``: int64 ``[tokens]``."""
    memory, lost = 2 * layout.spec.bytes_per_token * len(ids) + (64 << 20), 0.0
    with Allocator(
        layout.spec, backend="paged", device="cpu", memory=memory, max_sequences=1, max_tokens=len(ids)
    ) as alloc:
        cache, seq = LayoutCache(layout, alloc), alloc.sequence()
        attentions = [CachedAttention(attention, cache, subject.rope) for attention in subject.attentions]
        try:
            for first in range(0, len(ids), CHUNK_TOKENS):
                chunk, following = (ids[first + shift : first + shift + CHUNK_TOKENS] for shift in (0, 1))
                seq.extend(len(chunk))
                batch = alloc.batch([seq])
                for layer, attention in zip(subject.layers, attentions, strict=True):
                    layer.self_attn, attention.batch = attention, batch
                logits = subject.model(chunk[None], position_ids=batch.positions[None].long(), use_cache=False).logits
                seq.commit(count=len(chunk))
                lost += float(cross_entropy(logits[0, : len(following)], following, reduction="sum"))
        finally:
            for layer, original in zip(subject.layers, subject.attentions, strict=True):
                layer.self_attn = original
    return math.exp(lost / (len(ids) - 1))


def perplexity_tables(setup: Row, rows: Sequence[Row]) -> Iterator[Table]:
    shown = [{**row, "share": row["bytes_per_token"] / rows[0]["bytes_per_token"]} for row in rows]
    title = f"{{model}} on {rows[0]['tokens']:,} tokens of {{text}}, calibrated on {{calibration}}"
    columns = "layout={layout}; bytes a token={bytes_per_token:,}; of plain={share:share}; perplexity={perplexity:.2f}"
    yield Table.of(cell(title, setup), columns, shown)


@click.command()
@click.option("--model", type=click.Choice(LANGUAGE_MODELS), default="auto", help="Default: SmolLM2 if installed.")
@click.option("--tokens", type=click.IntRange(min=2), default=2000, show_default=True, help="Of the text.")
@JSON
@QUIET
def command(model: str, tokens: int, json_path: Path | None, quiet: bool) -> None:
    """Perplexity and bytes a token through each layout."""
    check_writable(json_path)
    subject = Subject(load_language_model(model))
    ids, name = subject.read(TEXT, tokens), subject.language_model.name
    with progress(Console(stderr=True), f"perplexity, {name}", len(LAYOUTS), quiet) as done, one_thread():
        rows: list[dict[str, Any]] = []
        for layout_name, make in LAYOUTS.items():
            layout = make(subject)
            # Without a tail of the newest tokens, which is the same for any length.
            bytes = sum(group.bytes_per_token for group in layout.spec.groups if group.window_tokens is None)
            row = {"layout": layout_name, "bytes_per_token": bytes, "tokens": tokens}
            rows.append({**row, "perplexity": perplexity(subject, layout, ids)})
            done(len(rows))
    setup = {"model": name, "text": TEXT, "calibration": CALIBRATION}
    show(console(), perplexity_tables(setup, rows))
    write_json(document(["perplexity", *sys.argv[1:]], setup=setup, results={"perplexity": rows}), json_path)


if __name__ == "__main__":
    sys.exit(main(None, command, "python -m benchmarks.perplexity"))
