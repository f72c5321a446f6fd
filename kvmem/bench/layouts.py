"""Every layout of `kvmem.layouts` on one shape: bytes a token, reads, error and time of a decode step, conversions.

The shape is a layer of multi-head attention with random weights, so an error says how far a format is from this layer's
own K and V, not what it costs in quality. W_K is well conditioned, as Slim attention needs it: orthogonal, times a
mild spread of its singular values and a few outlier channels, as K of real models has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from random import Random
from time import thread_time_ns
from typing import Any

import torch
from torch import Tensor

from kvmem import Allocator, CacheSpec
from kvmem.bench.attention import at_once
from kvmem.bench.model import Backend
from kvmem.bench.text import Progress
from kvmem.bench.timing import Ratio, Spread, in_turn, one_thread
from kvmem.layouts import Layout, LayoutCache, PlainKV
from kvmem.layouts.aligned import AlignedKV
from kvmem.layouts.goldfinch import GoldFinch, GoldLayer, GoldShared, goldfinch_spec
from kvmem.layouts.lanes import LaneCache
from kvmem.layouts.palu import Palu, factor
from kvmem.layouts.policies import SinkAndWindow, apply
from kvmem.layouts.quantised import QuantisedKV
from kvmem.layouts.registry import LAYOUTS
from kvmem.layouts.rope import Rope
from kvmem.layouts.slim import Projection, SharedEncoder, SlimK, SlimX

HEADS, WIDTH, HIDDEN, PLAIN = 8, 64, 512, "plain fp16"
_KEPT, _SINKS, _PAGE_BYTES, _SEED = 0.372, 4, 64 << 10, 20240611
_ROPE, _HALF = Rope.default(WIDTH), torch.float16
#: Layouts that convert K and V element by element. Others multiply by weights; lanes convert nothing.
_ELEMENTWISE = ("plain", "quantised", "aligned")
#: An allocator that holds all tokens, attention of the newest of each sequence, and what derives all K and V.
_Opened = tuple[Allocator, Callable[[], tuple[Tensor, ...]], Callable[[], object]]


@dataclass(frozen=True)
class LayoutResult:
    """layout: its name in `kvmem.layouts.registry`. bytes_per_token: held for a token, evicted or not, without padding.
    read_bytes, error, step_us: of one step, in which a new token of each sequence attends to all. The error of the
    output is relative, in the 2-norm, to float64 attention over K and V of ``error_of``. step_ratio: over plain fp16.

    derive_us: microseconds a token to derive K and V into a scratch (lanes: to gather them). encode_ratio: the time to
    encode K and V in fp16, over that of a copy which reads and writes as many bytes; what a tail holds in between is
    not counted. derive_ratio: the same for deriving. None for layouts that multiply by weights, and lanes.
    """

    name: str
    layout: str
    bytes_per_token: float
    read_bytes: int
    error: float
    error_of: str
    step_us: Spread
    step_ratio: Ratio
    derive_us: Spread
    encode_ratio: Ratio | None = None
    derive_ratio: Ratio | None = None


class Model:
    """x: ``[S, T, hidden]``. raw, k (rotated), v: float64 ``[S, T, heads, width]``. q: ``[S, heads, width]``."""

    def __init__(self, sequences: int, tokens: int) -> None:
        self.draw = torch.Generator().manual_seed(_SEED)
        left, right = (torch.linalg.qr(self.random(HIDDEN, HIDDEN))[0] for _ in "lr")
        scale = torch.ones(HEADS, WIDTH, dtype=torch.float64)
        scale[:, (28, 63)] = torch.tensor((6.0, 8.0), dtype=torch.float64)  # which the rotation turns slowly
        spread = torch.logspace(0.3, -0.7, HIDDEN, dtype=torch.float64)  # a condition number of 10, without outliers
        self.w_k, self.w_v = left * spread @ right * scale.flatten(), self.weight(HIDDEN, HIDDEN)
        self.x, self.q = self.random(sequences, tokens, HIDDEN).float(), self.random(sequences, HEADS, WIDTH).float()
        self.raw, self.v = self.heads(self.w_k), self.heads(self.w_v)
        self.k = self.rotated(self.raw)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw, dtype=torch.float64)

    def weight(self, *shape: int) -> Tensor:
        return self.random(*shape) * float(shape[-2] ** -0.5)

    def heads(self, weight: Tensor) -> Tensor:
        return (self.x.double() @ weight).view(*self.x.shape[:2], HEADS, WIDTH)

    def rotated(self, k: Tensor) -> Tensor:
        return _ROPE.apply(k.flatten(0, 1), torch.arange(k.shape[1]).repeat(len(k))).view_as(k)


@dataclass(frozen=True)
class Case:
    """values: what the layout stores, ``[S, T, ...]``. k, v: what the step attends to, float64. group: the first group
    of the spec that counts: the encoder's, for cross attention. window: of lanes, which take the place of the layout.
    """

    layout: Layout
    values: tuple[Tensor, ...]
    k: Tensor
    v: Tensor
    error_of: str = "the layer"
    group: int = 0
    window: int = 0


def _spec(block_size: int = 16) -> CacheSpec:
    return CacheSpec.kv(num_layers=1, num_kv_heads=HEADS, head_dim=WIDTH, dtype=_HALF, block_size=block_size)


def cases(model: Model, backend: Backend) -> dict[str, Case]:
    """By the name of a row."""
    kv, both, one = (model.k.float(), model.v.float()), (model.k, model.v), Projection(model.w_k, model.w_v)
    plain, found = PlainKV(_spec()), {PLAIN: Case(PlainKV(_spec()), kv, *both)}
    for dtype in (_HALF, torch.float32):
        slim = SlimK([one], num_heads=HEADS, head_dim=WIDTH, rope=_ROPE, dtype=dtype)
        found[f"Slim, K in fp{8 * dtype.itemsize}"] = Case(slim, (model.raw.float(),), *both)
    unrotated = (model.x,), model.raw, model.v, "the layer, K not rotated"
    found["Slim, X in fp16"] = Case(SlimX([one], head_dim=WIDTH, dtype=_HALF), *unrotated)
    shared = SharedEncoder({0: one}, head_dim=WIDTH, decoder=plain, dtype=_HALF)
    found["encoder output in fp16"] = Case(shared, *unrotated, group=shared.group)
    found["Palu, 50 % rank"], found["Palu, 25 % rank"] = _palu(model, 0.5), _palu(model, 0.25)
    found["Palu, 50 % rank, int4, rotated"] = _palu(model, 0.5, bits=4, rotate_latents=True)
    found["GoldFinch, c in fp16"] = _goldfinch(model, backend)
    found["fp8 e4m3"] = Case(QuantisedKV(_spec(), k="fp8_e4m3", v="fp8_e4m3"), kv, *both)
    found["int8 by token"] = Case(QuantisedKV(_spec(), k="int8", v="int8", k_scales="token"), kv, *both)
    for kind in ("int4", "int2"):
        found[f"{kind} KIVI, groups of 32"] = Case(QuantisedKV(_spec(32), k=kind, v=kind, group_size=32), kv, *both)
    found["AlignedKV, guard 1"] = Case(AlignedKV(_spec(64), guard=1), kv, *both)
    window = round(_KEPT * len(model.x[0])) - _SINKS
    k, v = (torch.cat((part[:, :_SINKS], part[:, -window:]), 1) for part in both)
    found[f"lanes, {_KEPT:.1%} kept"] = Case(plain, kv, k, v, "the layer, evicted tokens masked", window=window)
    return found


def _palu(model: Model, share: float, **how: Any) -> Case:
    """W_O is the identity: what it makes of attention over V is attention over V."""
    weights, rank = (model.w_k, model.w_v, torch.eye(HIDDEN).double()), round(share * 4 * WIDTH)  # groups of 4 heads
    layout = Palu([weights], rank, kv_heads=HEADS, head_dim=WIDTH, rope=_ROPE, dtype=_HALF, **how)
    groups = [weight.chunk(HEADS // 4, 1) for weight in weights[:2]]
    k, v = (model.heads(torch.cat([torch.mm(*factor(part, rank)) for part in parts], 1)) for parts in groups)
    return Case(layout, (model.x,), model.rotated(k), v, "the layer with W_K and W_V of that rank")


def _goldfinch(model: Model, backend: Backend) -> Case:
    """A model of its own: two GOLD layers, which share what is stored; the first is measured."""
    norm, w = torch.eye(2, 1).expand(2, HIDDEN), model.weight
    adapter, residual = (w(HIDDEN, 64), w(2, 32, HIDDEN)), (w(2, HIDDEN, 64), w(2, 64, HIDDEN))
    shared = GoldShared(w(4096, HIDDEN), norm, w(HIDDEN + 32, HIDDEN))
    both = dict.fromkeys((0, 1), GoldLayer(w(3, HIDDEN), *adapter, *residual, torch.stack((norm, norm))))
    spec = partial(goldfinch_spec, num_layers=2, recurrent_layers=0, d_model=HIDDEN, states=False)
    half, exact = (GoldFinch(spec(dtype=t), shared, both, num_heads=HEADS, rope=_ROPE) for t in (_HALF, torch.float64))
    values = model.x[..., :32], torch.randint(4096, model.x.shape[:2], generator=model.draw)
    k, v, *_ = vars(_fill(Case(exact, values, model.k, model.v), model, backend)[2]()).values()
    return Case(half, values, k.view_as(model.k), v.view_as(model.v), "what it derives in float64")


def _open(spec: CacheSpec, backend: Backend, sequences: int, tokens: int) -> Allocator:
    """Each component lies in a range of its own, so that pages hold whole blocks of all layouts here."""
    each = 2 * tokens * spec.bytes_per_token + 32 * _PAGE_BYTES  # with padding and partly filled pages
    return Allocator(
        spec, backend=backend, device="cpu", memory=(sequences + 2) * each, max_sequences=sequences, max_tokens=tokens,
        page_bytes=_PAGE_BYTES, interleave="none", prefix_cache=False,
    )  # fmt: skip


def _fill(case: Case, model: Model, backend: Backend) -> _Opened:
    sequences, tokens = model.x.shape[:2]
    alloc, first = _open(case.layout.spec, backend, sequences, tokens), 0 if case.group else tokens - 1
    cache, ids = LayoutCache(case.layout, alloc), alloc.open_batch(sequences)
    alloc.core.extend_batch(ids, [first or tokens] * sequences, case.group or -1)
    if first:  # else all are the encoder's, beside one token of the decoder
        cache.write(0, alloc.batch(ids), *(value[:, :first].flatten(0, 1) for value in case.values))
        alloc.commit_batch(ids, [first] * sequences)
    alloc.extend_batch(ids, [1] * sequences)
    batch = alloc.batch(ids)
    cache.write(0, batch, *(value[:, first:].flatten(0, 1) for value in case.values))
    return alloc, partial(cache.attend, model.q, 0, batch, causal=not case.group), partial(cache.derive, 0, batch)


def _lanes(case: Case, model: Model, backend: Backend) -> _Opened:
    """Each head keeps sinks and a window of the prompt, and then the newest token."""
    k, v = case.values
    cache = LaneCache(
        num_layers=1, num_kv_heads=HEADS, head_dim=WIDTH, dtype=_HALF, max_sequences=len(k), max_tokens=k.shape[1],
        backend=backend, device="cpu", memory=2 * k.nbytes, page_bytes=4096,
    )  # fmt: skip
    lanes = cache.lanes(each := [cache.sequence() for _ in k])
    lanes.append(0, k[:, :-1].flatten(0, 1), v[:, :-1].flatten(0, 1))
    for sequence in each:
        apply(SinkAndWindow(case.window - 1, _SINKS), sequence, 0)
    lanes.append(0, k[:, -1], v[:, -1])
    return cache.alloc, partial(lanes.attend, model.q, 0), partial(lanes.padded, 0)


def _check(case: Case, model: Model, opened: _Opened) -> tuple[float, int, float]:
    """Return the bytes held for a token, those that a step reads, and its error."""
    (alloc, attend, _), held = opened, opened[0].ledger.held
    stored = {component.name for group in case.layout.spec.groups[case.group :] for component in group.components}
    alloc.ledger.reset()
    out, expected = attend()[0], at_once(model.q.double(), case.k, case.v)
    if isinstance(case.layout, Palu):
        out = case.layout.project(0, out).view_as(expected)
    each = sum(bytes for (name, _), bytes in held.items() if name in stored) / model.x[..., 0].numel()
    return each, sum(alloc.ledger.read.values()), float((out.double() - expected).norm() / expected.norm())


def _against_copy(case: Case, backend: Backend, convert_bytes: int, repetitions: int) -> list[Ratio]:
    """Prompts are encoded one after the other, and derived in one call."""
    layout, tokens = case.layout, case.values[0].shape[1] // 64 * 64  # whole blocks
    prompts = -(-convert_bytes // (tokens * _spec().bytes_per_token))
    k, v = (torch.cat([x[:, :tokens].half()] * -(-prompts // len(x)))[:prompts] for x in case.values)

    def encode() -> None:
        for values in zip(k, v, strict=True):
            rows = layout.encode(0, *values, positions=torch.arange(tokens))
            if tail := layout.tail(0):
                layout.encode_blocks(0, {n: torch.unflatten(rows[n], 0, (-1, layout.spec.block_size)) for n in tail})

    with _open(layout.spec, backend, prompts, tokens) as alloc:
        cache, ids = LayoutCache(layout, alloc), alloc.open_batch(prompts)
        alloc.extend_batch(ids, [tokens] * prompts)
        batch = alloc.batch(ids)
        cache.write(0, batch, k.flatten(0, 1), v.flatten(0, 1))
        calls: dict[str, Callable[[], object]] = {"encode": encode, "derive": partial(cache.derive, 0, batch)}
        alloc.ledger.reset()
        calls["derive"]()
        written = sum(group.bytes_per_token for group in layout.spec.groups if group.window_tokens is None)
        derived = sum(alloc.ledger.read.values()) + alloc.ledger.held["scratch", "device"]
        moved = {"encode": 2 * k.nbytes + written * prompts * tokens, "derive": derived}
        source, target = torch.ones(2, max(moved.values()) // 2, dtype=torch.uint8)  # pages of zeros would not be read
        calls |= {f"copy, {name}": partial(target[: n // 2].copy_, source[: n // 2]) for name, n in moved.items()}
        times = in_turn(calls, repetitions, clock=thread_time_ns, order=Random(_SEED))
    return [Ratio.of(times[name], times[f"copy, {name}"]) for name in moved]


def layouts(
    model: Model, chosen: Mapping[str, Case], backend: Backend, repetitions: int, convert_bytes: int, progress: Progress
) -> list[LayoutResult]:  # fmt: skip
    """A row for each of ``chosen``, `PLAIN` among them. Times are CPU time of one thread; the layouts take turns.
    convert_bytes: of the K and V that are converted. REQUIRES for the ratios: several times what the caches hold.
    """
    rows, entries, clock, order = [], {e.layout_class: e.name for e in LAYOUTS}, thread_time_ns, Random(_SEED)
    with one_thread():
        opened = {name: (_lanes if case.window else _fill)(case, model, backend) for name, case in chosen.items()}
        checked = {name: _check(chosen[name], model, one) for name, one in opened.items()}
        times = in_turn({name: one[1] for name, one in opened.items()}, repetitions, clock=clock, order=order)
        derived = in_turn({name: one[2] for name, one in opened.items()}, repetitions, clock=clock, order=order)
        for name, case in chosen.items():
            entry = entries[LaneCache if case.window else type(case.layout)]
            ratios = _against_copy(case, backend, convert_bytes, repetitions) if entry in _ELEMENTWISE else ()
            us, ratio = Spread.of_ns(times[name]), Ratio.of(times[name], times[PLAIN])
            derive_us = Spread.of_ns([ns / model.x[..., 0].numel() for ns in derived[name]])
            rows.append(LayoutResult(name, entry, *checked[name], case.error_of, us, ratio, derive_us, *ratios))
            progress(len(rows))
    return rows
