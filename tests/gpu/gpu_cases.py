"""What kernels are tried on: a cover of all pairs of choices, shared prefixes, latents, and sequences that end where
their memory ends."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from itertools import combinations, product
from typing import Any

import torch
from gpu_kernels import MLA_KPE, Model, Trial
from kernel_cases import FP8, FP8_SCALES, STEPS, Case, make_case

import kvmem
from kvmem import _core
from kvmem.kernels.write import write_component

FULL = bool(os.environ.get("KVMEM_GPU_FULL"))
POISON_TOKENS = 256


@dataclass(frozen=True)
class Config:
    model: Model
    backend: str
    step: str
    group: int  # query heads for one KV head
    block_size: int
    interleave: int | str
    window: int | None

    def __str__(self) -> str:
        q, kv, head = self.model
        names = [str(dtype).removeprefix("torch.").replace("float8_e4m3fn", "fp8") for dtype in (q, kv)]
        dtype = names[0] if q == kv else f"{names[0]} over {names[1]}"
        window = f" window {self.window}" if self.window else ""
        layout = f"block {self.block_size}, G={self.interleave}"
        return f"{dtype} D={head} GQA {self.group} {self.backend} {self.step}{window}, {layout}"


def pairwise_cover(choices: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """A few combinations in which each pair of choices of different kinds meets at least once. Greedy, and always the
    same for the same choices.
    """
    names = list(choices)
    order = {name: {value: i for i, value in enumerate(values)} for name, values in choices.items()}
    every = [dict(zip(names, values, strict=True)) for values in product(*choices.values())]

    def pairs(row: dict[str, Any]) -> set[tuple[str, int, str, int]]:
        return {(a, order[a][row[a]], b, order[b][row[b]]) for a, b in combinations(names, 2)}

    candidates = [(row, pairs(row)) for row in every]
    missing = set().union(*(p for _, p in candidates))
    chosen = []
    while missing:
        row, covered = max(candidates, key=lambda candidate: len(candidate[1] & missing))
        chosen.append(row)
        missing -= covered
    return chosen or every[:1]


def configs(kernel: Trial, full: bool = FULL) -> list[Config]:
    models = tuple(dict.fromkeys((*kernel.models, *kernel.more))) if full else kernel.models
    shared = kernel.kind == "shared"
    choices = {
        "model": models,
        "backend": kernel.backends,
        "step": kernel.steps,
        "group": (16,) if kernel.kind == "mla" else (1, 4, 8),
        "block_size": kernel.block_sizes,
        "interleave": ("all",) if shared else (1, "none", "all"),
        "window": kernel.windows,
    }
    assert set(choices) == {field.name for field in fields(Config)}
    rows = [dict(zip(choices, values, strict=True)) for values in product(*choices.values())] if full else []
    return [Config(**row) for row in rows or pairwise_cover(choices)]


def case_of(kernel: Trial, config: Config, device: str, seed: int) -> Case:
    q_dtype, kv_dtype, head = config.model
    finite = kernel.kernel.guard_tokens > 0  # the adapter says so: what lies behind a sequence must be finite
    if kernel.kind in ("mla", "shared"):
        return _forked_case(kernel, config, device, seed)
    return make_case(
        config.backend, config.step, seed=seed, block_size=config.block_size, interleave=config.interleave,
        window_tokens=config.window, pad_to=len(STEPS[config.step][0]) + 2 if kernel.kernel.pads else None,
        query_heads=2 * config.group, kv_heads=2, head_dim=head, dtype=q_dtype, kv_dtype=kv_dtype, device=device,
        tail_guard_tokens=kernel.kernel.guard_tokens, poison=not finite,
    )  # fmt: skip


def kv_spec(kernel: Trial, model: Model, block_size: int, num_layers: int = 3) -> kvmem.CacheSpec:
    _, kv_dtype, width = model
    if kernel.kind == "mla":
        parts = [kvmem.Component(n, width=w, dtype=kv_dtype) for n, w in (("ckv", width), ("kpe", MLA_KPE))]
        return kvmem.CacheSpec(components=parts, num_layers=num_layers, block_size=block_size)
    shape = {"num_layers": num_layers, "num_kv_heads": 2, "head_dim": width, "block_size": block_size}
    return kvmem.CacheSpec.kv(dtype=kv_dtype, **shape)


class Writer:
    """Sequences of random K and V in one layer, with what each was given kept aside."""

    def __init__(self, kernel: Trial, model: Model, alloc: kvmem.Allocator, layer: int, seed: int) -> None:
        self.kernel, self.model, self.alloc, self.layer = kernel, model, alloc, layer
        self.draw = torch.Generator().manual_seed(seed)
        self.names = ("ckv", "kpe") if kernel.kind == "mla" else ("k", "v")
        self.scales = FP8_SCALES if model[1] == FP8 else (1.0, 1.0)
        self.kept: dict[kvmem.Sequence, list[torch.Tensor]] = {}

    def extend(self, seq: kvmem.Sequence, tokens: int, commit: int) -> kvmem.Sequence:
        seq.extend(tokens)
        batch, kept = self.alloc.batch([seq]), self.kept.setdefault(seq, [])
        for i, name in enumerate(self.names):
            blocks = self.alloc.tensor(self.layer, name)
            values = torch.randn(tokens, *blocks.shape[2:], generator=self.draw).to(blocks.dtype)
            write_component(blocks, batch, values.to(blocks.device))
            if len(kept) <= i:
                kept.append(values)
            else:
                kept[i] = torch.cat([kept[i], values])
        seq.commit(count=commit)
        return seq

    def fork(self, seq: kvmem.Sequence, tokens: int, commit: int) -> kvmem.Sequence:
        child = seq.fork()
        self.kept[child] = [t[: child.num_committed_tokens] for t in self.kept[seq]]
        return self.extend(child, tokens, commit)

    def case(self, seqs: list[kvmem.Sequence], group: int) -> Case:
        batch = self.alloc.batch(seqs)
        first, second = (self.alloc.tensor(self.layer, name) for name in self.names)
        width = first.shape[-1] + (second.shape[-1] if self.kernel.kind == "mla" else 0)
        heads = first.shape[2] * group
        q = torch.randn(batch.num_new_tokens, heads, width, generator=self.draw).to(self.model[0])
        scales = dict(zip(("k_scale", "v_scale"), self.scales, strict=True)) if self.model[1] == FP8 else {}
        tokens = [self._tokens(*self.kept[seq]) for seq in seqs]
        return Case(self.alloc, batch, self.layer, q.to(self.alloc.device), tokens, None, scales, self.names)

    def _tokens(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.kernel.kind == "mla":
            return torch.cat([first, second], -1), first
        k_scale, v_scale = self.scales
        return first.double() * k_scale, second.double() * v_scale


def _forked_case(kernel: Trial, config: Config, device: str, seed: int) -> Case:
    """A prompt and two that go on from it, and a stranger. Long enough to share whole pages of 2 MiB."""
    spec = kv_spec(kernel, config.model, config.block_size)
    sizes = {"page_bytes": 4096} if device == "cpu" else {}
    alloc = kvmem.Allocator(
        spec, backend=config.backend, device=device, memory="16MiB" if device == "cpu" else "256MiB", max_sequences=8,
        max_tokens=4096, interleave=config.interleave, tail_guard_tokens=0, **sizes,
    )  # fmt: skip
    writer = Writer(kernel, config.model, alloc, 1, seed)
    shared = 120 if device == "cpu" else 2 * alloc.pool.page_bytes // spec.bytes_per_token + 5
    new = {"decode": (1, 1, 1, 1), "drafts": (4, 4, 4, 4), "mixed": (1, 9, 40, 1)}[config.step]
    root = writer.extend(alloc.sequence(), shared, shared)
    seqs = [writer.fork(root, n + old, old) for n, old in zip(new[:2], (3, 33), strict=True)]
    seqs.append(writer.extend(alloc.sequence(), 20 + new[2], 20))
    seqs.insert(0, writer.extend(root, new[3], 0))
    return writer.case(seqs, config.group)


# ---- Sequences that end where their memory ends ----------------------------------------------------------------------


def tail_case(kernel: Trial, model: Model, device: str, *, guard_tokens: int, num_layers: int, new: int) -> Case:
    """Two sequences whose frontier, ``guard_tokens`` past their length, is the end of a page with nothing mapped
    behind it; ``AssertionError`` if something is.

    On the CPU what is not mapped faults when it is read, as on a GPU; by default it would read as zeros.
    """
    spec = kv_spec(kernel, model, 256 if kernel.block_sizes == (256,) else 16, num_layers)
    page = {"page_bytes": 4096, "driver": _core.host_driver(holes_fault=True)} if device == "cpu" else {}
    alloc = kvmem.Allocator(
        spec, backend="virtual", device=device, memory="64MiB", max_sequences=2, max_tokens=8192, prefix_cache=False,
        map_ahead_tokens=0, tail_guard_tokens=guard_tokens, interleave="all", **page,
    )  # fmt: skip
    page_bytes = alloc.pool.page_bytes
    pages = -(-(guard_tokens + new + 100) * spec.bytes_per_token // page_bytes)
    tokens = pages * page_bytes // spec.bytes_per_token - guard_tokens
    writer = Writer(kernel, model, alloc, num_layers - 1, 1)
    seqs = [writer.extend(alloc.sequence(), tokens, tokens - new) for _ in range(2)]
    assert alloc.stats().mapped_bytes == 2 * pages * page_bytes, "something else is mapped"
    return writer.case(seqs, 8 if kernel.kind == "mla" else 4)


def poisoned_case(kernel: Trial, model: Model, device: str, new: int) -> Case:
    """Two sequences with NaN in the tokens behind their ends, all of it mapped."""
    case = tail_case(kernel, model, device, guard_tokens=POISON_TOKENS, num_layers=3, new=new)
    assert case.batch.rows is not None
    for name in case.names:
        rows = case.alloc.rows(case.layer, name)
        for row, length in zip(case.batch.rows.tolist(), case.batch.seq_lens.tolist(), strict=True):
            behind = rows[row, length : length + POISON_TOKENS]
            behind.copy_(torch.full(behind.shape, torch.nan).to(behind.dtype))
    return case
