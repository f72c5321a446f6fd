"""Slim attention (arXiv:2503.05840): K is stored and V derived from it, or the input of both is stored."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, get_args

import torch

from kvmem.arguments import brief, check_choice, check_number, check_size
from kvmem.errors import SpecError
from kvmem.kernels.merge import merge_levels
from kvmem.layouts.attention import Partial, attend_tile, compute_dtype, described
from kvmem.layouts.base import Layout, check_floats, of_layer
from kvmem.layouts.reading import TokenReader
from kvmem.layouts.rope import Rope, check_rope
from kvmem.spec import CacheSpec, Component, Group

__all__ = ["Fold", "Projection", "SharedEncoder", "SlimK", "SlimX", "fold"]

Order = Literal["auto", "derive", "fold"]
_Layers = Sequence["Projection"] | Mapping[int, "Projection"]
_MAX_COND: Final = 1e12  # beyond it, float64 keeps fewer than four digits of V


@dataclass(frozen=True, eq=False)
class Projection:
    """How a layer makes K and V of its input: ``k = x @ w_k + b_k`` and ``v = x @ w_v + b_v``.

    w_k: ``[d, KV heads * head_dim]``. w_v: ``[d, KV heads * V width]``. b_k, b_v: one number for each column, or None.
    ``SpecError`` for other shapes, and for weights that are not finite floating-point numbers.
    """

    w_k: torch.Tensor
    w_v: torch.Tensor
    b_k: torch.Tensor | None = None
    b_v: torch.Tensor | None = None

    def __post_init__(self) -> None:
        given = {name: weight for name, weight in vars(self).items() if weight is not None or name in ("w_k", "w_v")}
        for name, weight in given.items():
            tensor = isinstance(weight, torch.Tensor) and not weight.is_meta
            if not tensor or not weight.is_floating_point() or weight.dtype.itemsize == 1:
                raise SpecError(f"{name}: got {described(weight)}; must be a tensor of floats of 16 bits or more")
            if not weight.isfinite().all():
                raise SpecError(f"{name}: got NaN or infinity; no V can be derived from it")
            object.__setattr__(self, name, weight.detach())
        k, v = tuple(self.w_k.shape), tuple(self.w_v.shape)
        if len(k) != 2 or len(v) != 2 or k[0] != v[0] or 0 in k + v:
            raise SpecError(f"w_k, w_v: got shapes {k} and {v}; must be [d, KV heads * width], with the same d")
        for name, columns in (("b_k", k[1]), ("b_v", v[1])):
            if name in given and tuple(given[name].shape) != (columns,):
                raise SpecError(f"{name}: got shape {tuple(given[name].shape)}; must be ({columns},)")

    @classmethod
    def of(cls, k: torch.nn.Linear, v: torch.nn.Linear) -> Projection:
        """Return the projection of a model's two layers, whose ``weight`` is the transpose of ``w_k`` and ``w_v``."""
        for name, layer in (("k", k), ("v", v)):
            if not isinstance(layer, torch.nn.Module) or not isinstance(layer.weight, torch.Tensor):
                raise SpecError(f"{name}: got {brief(layer)}; must be a torch.nn.Linear, or another module like it")
        return cls(k.weight.T, v.weight.T, k.bias, v.bias)


@dataclass(frozen=True, eq=False)
class Fold:
    """``v = k @ w_kv + c`` for K before norm and rotation. cond: the condition number of ``w_k``, in the 2-norm.

    w_kv: ``[all K, all V]`` and c: ``[all V]``, float64. Rounding of K reaches V about ``cond / 50`` times larger
    (all-MiniLM-L6-v2), relative to each.
    """

    w_kv: torch.Tensor
    c: torch.Tensor
    cond: float


def fold(
    w_k: torch.Tensor, w_v: torch.Tensor, b_k: torch.Tensor | None = None, b_v: torch.Tensor | None = None, *,
    max_cond: float = _MAX_COND,
) -> Fold:  # fmt: skip
    """Return the map from K to V, ``w_kv = inverse(w_k) @ w_v``, computed in float64 on the device of ``w_k``.

    Arguments as for ``Projection``. A ``w_k`` with more columns than rows has a right inverse, which is taken. Cost: a
    QR decomposition, and the singular values of a ``[d, d]`` matrix.

    ``SpecError`` for what ``Projection`` refuses; for a ``w_k`` with fewer columns than rows, since such a K does not
    determine V (GQA, MQA); and for a condition number above ``max_cond``, as a singular ``w_k`` has.
    """
    layer, (inputs, columns) = Projection(w_k, w_v, b_k, b_v), w_k.shape
    max_cond = check_number("max_cond", max_cond, above=0, most=float("inf"))
    if columns < inputs:
        raise SpecError(f"w_k: got {columns} columns for {inputs} rows; K does not determine V (GQA, MQA): store both")
    q, r = torch.linalg.qr(layer.w_k.double().T)  # w_k = r.T @ q.T: the inverse without squaring its condition number
    values = torch.linalg.svdvals(r)
    cond = float(values[0] / values[-1]) if values[-1] > 0 else float("inf")
    if cond > max_cond:
        raise SpecError(f"w_k: got condition number {cond:.3g}, above {max_cond:.3g}: rounding spoils V; store both")
    w_kv = q @ torch.linalg.solve_triangular(r.T, layer.w_v.double(), upper=False)
    k, v = (torch.zeros_like(w[0]) if b is None else b for w, b in ((w_k, layer.b_k), (w_v, layer.b_v)))
    return Fold(w_kv, v.double() - k.double() @ w_kv, cond)


class _Folding(Layout):
    """What the three layouts share: checks, weights by head, and the choice between two orders of evaluation."""

    def _check(self, layers: Sequence[Projection], head_dim: int, dtype: torch.dtype, order: Order) -> None:
        self.head_dim, self.order = check_size("head_dim", head_dim), order
        check_choice("order", order, get_args(Order))
        known = torch.float16, torch.bfloat16, torch.float32, torch.float64
        if not isinstance(dtype, torch.dtype) or dtype not in known:
            raise SpecError(
                f"dtype: got {brief(dtype)}; a derived V amplifies its rounding: store torch.float16 or wider"
            )
        if not isinstance(layers, (tuple, list)) or not all(isinstance(x, Projection) for x in layers or (None,)):
            raise SpecError(f"layers: got {described(layers)}; needs a Projection for each")
        self._weights_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def _by_head(self, weight: torch.Tensor, bias: torch.Tensor | None, heads: int) -> tuple[torch.Tensor, ...]:
        """``[a, heads, b]`` and ``[heads, b]`` in the dtype of computation; zeroes for a bias of None."""
        both = weight, torch.zeros_like(weight[0]) if bias is None else bias
        return tuple(x.to(self._weights_dtype).reshape(*x.shape[:-1], heads, -1) for x in both)

    def _folds(self, q: torch.Tensor, heads: int) -> bool:
        """Whether to attend over what is stored: cheaper for few queries, while deriving costs the same for any."""
        if q.ndim != 3 or q.shape[2] != self.head_dim or q.shape[1] % heads:
            raise SpecError(f"q: got {tuple(q.shape)}; must be [n, a multiple of {heads} heads, {self.head_dim}]")
        return self.order == "fold" or (self.order == "auto" and q.shape[0] * q.shape[1] <= heads * self.head_dim)

    def _sum(
        self, reader: TokenReader, tile: Callable[[int, int], Partial], weight: torch.Tensor, bias: torch.Tensor
    ) -> Partial:
        """Sums of what is stored, over tiles, become sums of V ``[n, query heads, V width]``."""
        sums, lse = merge_levels(tile(*where) for where in self.tiles(*self.span(reader)))
        out = _per_head(sums, weight.transpose(0, 1))
        offset = bias.to(out.dtype).repeat_interleave(out.shape[1] // len(bias), 0)
        return out + offset.masked_fill((lse == -torch.inf).unsqueeze(2), 0), lse  # what saw nothing stays zero


def _per_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``[n, query heads, a]`` times ``[KV heads, a, b]``: ``[n, query heads, b]``, in the dtype of x."""
    grouped = x.reshape(len(x), len(weight), -1, x.shape[2])
    return torch.einsum("nhga,hab->nhgb", grouped, weight.to(x.dtype)).flatten(1, 2)


class SlimK(_Folding):
    """Stores K before norm and rotation, without its bias, and derives V from it: half the bytes of K and V.

    For multi-head attention whose K has at least as many elements as the layer's input. Exact but for rounding, which
    grows with the condition number of ``w_k``: in the six layers of all-MiniLM-L6-v2, of 1,640 to 28,899, V is wrong by
    0.9 % to 13 % with K in fp16, and by 7 % to 115 % in bf16. So layers above ``max_cond`` store K after rotation, and
    V. Each head needs the K of all heads: they cannot be split over devices.
    conds: the condition number of each layer. folded: the layers that store K alone.
    """

    def __init__(
        self, layers: Sequence[Projection], *, num_heads: int, head_dim: int, rope: Rope | None = None,
        k_norm: Callable[[int, torch.Tensor], torch.Tensor] | None = None, dtype: torch.dtype = torch.float16,
        max_cond: float | None = None, order: Order = "auto", block_size: int = 16,
    ) -> None:  # fmt: skip
        """layers: one projection for each layer. num_heads: query heads, and KV heads. rope: None for no rotation.
        k_norm: what the model does to K between projection and rotation (QK norm), called with the layer and K
        ``[n, num_heads, head_dim]`` in float32 (float64 for such a cache). dtype: of the cache. max_cond: by default
        4,096 for fp16, which keeps the error of the output near 1 %, and more for wider types; 1e12 at most. order:
        ``"derive"`` V and attend, ``"fold"`` V into the output, or the cheaper of both.

        ``SpecError`` for GQA, for 8-bit and integer types, for bf16 unless ``max_cond`` is given, and if no layer is
        below ``max_cond``. Cost: that of ``fold()`` for each layer. Memory: one matrix a layer, which takes the place
        of ``w_v``, in float32 (float64 for a cache in float64).
        """
        self._check(layers, head_dim, dtype, order)
        check_rope(rope, head_dim)
        if k_norm is not None and not callable(k_norm):
            raise SpecError(f"k_norm: got {brief(k_norm)}; must be None, or a callable, k_norm(layer, k)")
        self.num_heads, self.rope, self._k_norm = check_size("num_heads", num_heads), rope, k_norm
        for number, layer in enumerate(layers):
            self._check_layer(f"layers[{number}]", layer, layers[0].w_v.shape[1])
        given = 4 / torch.finfo(dtype).eps if max_cond is None else max_cond
        limit = min(check_number("max_cond", given, above=0, most=float("inf")), _MAX_COND)
        self.conds: tuple[float, ...] = ()
        self._weights: dict[int, tuple[torch.Tensor, ...]] = {}
        for number, layer in enumerate(layers):
            found = fold(layer.w_k, layer.w_v, max_cond=float("inf"))
            self.conds += (found.cond,)
            if found.cond <= limit:
                _, b_k = self._by_head(layer.w_k, layer.b_k, num_heads)
                self._weights[number] = (*self._by_head(found.w_kv, layer.b_v, num_heads), b_k)
        if dtype == torch.bfloat16 and max_cond is None:
            why = f"it rounds K to 8 bits, which V multiplies by up to the condition number, here {max(self.conds):.4g}"
            raise SpecError(f"dtype: got torch.bfloat16; {why}: store torch.float16, or give max_cond to accept it")
        if not self._weights:
            best = f"all layers have more, at least {min(self.conds):.4g}"
            raise SpecError(f"max_cond: got {limit:.4g}; {best}, and would store V: use PlainKV, or a wider dtype")
        self.folded = tuple(self._weights)
        self._v_width = layers[0].w_v.shape[1] // num_heads
        self.spec = self._make_spec(dtype, block_size)

    def _make_spec(self, dtype: torch.dtype, block_size: int) -> CacheSpec:
        k = Component("k", heads=self.num_heads, width=self.head_dim, dtype=dtype, rope="pre" if self.rope else "none")
        v = Component("v", heads=self.num_heads, width=self._v_width, dtype=dtype)
        groups = [Group("k_only", (k,), self.folded)]
        if others := tuple(i for i in range(len(self.conds)) if i not in self._weights):
            groups.append(Group("k_and_v", (replace(k, rope="post" if self.rope else "none"), v), others))
        return CacheSpec(tuple(groups), block_size=block_size, num_query_heads=self.num_heads)

    def _check_layer(self, here: str, layer: Projection, all_v: int) -> None:
        k, v = layer.w_k.shape[1], layer.w_v.shape[1]
        if k != self.num_heads * self.head_dim or v != all_v or v % self.num_heads:
            why = "; fewer KV heads than query heads (GQA) give K too low a rank to derive V: store K and V"
            got = f"{k / self.head_dim:g} heads of K and {v} columns of w_v"
            more = why * (k < self.num_heads * self.head_dim)
            raise SpecError(f"{here}: got {got}; must be {self.num_heads} heads, of one width in all layers{more}")

    def report(self) -> str:
        """Return a line for each layer: its condition number, and what it stores. Print it when a model is loaded."""
        also = {True: "", False: " and V"}
        return "\n".join(f"layer {i}: cond {c:.4g}, stores K{also[i in self.folded]}" for i, c in enumerate(self.conds))

    def encode(self, layer: int, *values: torch.Tensor, positions: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """values: k as ``w_k`` and ``b_k`` make it, before norm and rotation, ``[T, num_heads, head_dim]``; then v,
        which only layers that store V need. Give k in float32 where its bias is large: rounding comes after it.
        """
        shapes = [(self.num_heads, self.head_dim), (self.num_heads, self._v_width)]
        least, both = (1, "") if layer in self._weights else (2, f", and v: layer {layer} stores both")
        check_floats(values, shapes[: max(least, len(values))], f"k, [T, {self.num_heads}, {self.head_dim}]{both}")
        if layer not in self._weights:
            return {"k": self._finished(layer, values[0], positions), "v": values[1]}
        return {"k": values[0].to(self._weights_dtype) - self._weights[layer][2]}

    def _finished(self, layer: int, k: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """K as the scores take it."""
        k = k if self._k_norm is None else self._k_norm(layer, k)
        return k if self.rope is None else self.rope.apply(k, positions)

    def _keys(self, reader: TokenReader, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What is stored of tokens ``[first, end)``, in the dtype of computation, and K as the scores take it."""
        stored, (_, _, b_k) = reader.rows("k", first, end).to(self._weights_dtype), self._weights[reader.layer]
        return stored, self._finished(reader.layer, stored + b_k, torch.arange(first, end, device=stored.device))

    def derive(self, reader: TokenReader, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K is rotated, and V takes one matrix product; layers that store both return what they store."""
        if reader.layer not in self._weights:
            return reader.rows("k", first, end), reader.rows("v", first, end)
        w_kv, b_v, _ = self._weights[reader.layer]
        stored, k = self._keys(reader, first, end)
        return k, torch.tensordot(stored.flatten(1), w_kv, 1) + b_v

    def attend(
        self, q: torch.Tensor, reader: TokenReader, *, scale: float | None = None, causal: bool = True
    ) -> Partial:
        """As ``Layout.attend``. K is read once in either order; ``"fold"`` multiplies sums of K by ``w_kv``."""
        if reader.layer not in self._weights or not self._folds(q, self.num_heads):
            return super().attend(q, reader, scale=scale, causal=causal)

        how: dict[str, Any] = {"length": reader.length, "scale": scale, "causal": causal}

        def tile(first: int, end: int) -> Partial:
            all_k, k = self._keys(reader, first, end)
            return attend_tile(q, k, all_k.flatten(1)[:, None], first=first, **how)

        return self._sum(reader, tile, *self._weights[reader.layer][:2])

    def kernel_args(self, layer: int) -> dict[str, Any]:
        """Nothing where V is stored: kernels read ``Allocator.kv(layer)`` as it is. ``SpecError`` for other layers."""
        return super().kernel_args(layer) if layer in self._weights else {}


class _Inputs(_Folding):
    """Stores x, one input ``[d]`` a token: ``scores = (q @ w_k.T) @ x.T`` and ``out = (softmax(scores) @ x) @ w_v``. No
    inverse is taken, so no condition number matters, and query heads may share KV heads (GQA).
    """

    component: str

    def _set_layers(
        self, layers: _Layers, head_dim: int, dtype: torch.dtype, order: Order, rope: Rope | None
    ) -> None:  # fmt: skip
        if rope is not None:
            name = type(self).__name__
            raise SpecError(
                f"rope: {name} multiplies q by w_k, and a rotation stands between them: use SlimK, or K and V"
            )
        self._check(list(layers.values()) if isinstance(layers, Mapping) else layers, head_dim, dtype, order)
        numbered = layers if isinstance(layers, Mapping) else dict(enumerate(layers))
        self._width = next(iter(numbered.values())).w_k.shape[0]
        self._weights = {}
        for number, layer in numbered.items():
            (inputs, k), v = layer.w_k.shape, layer.w_v.shape[1]
            heads = k // head_dim
            if inputs != self._width or k % head_dim or v % heads:
                fit = f"[{self._width}, heads * width], where head_dim={head_dim} is the width of K"
                raise SpecError(f"layers[{number}]: got w_k {(inputs, k)} and w_v {(inputs, v)}; must be {fit}")
            pairs = ((layer.w_k, layer.b_k), (layer.w_v, layer.b_v))
            self._weights[number] = tuple(x for pair in pairs for x in self._by_head(*pair, heads))

    def encode(self, layer: int, *values: torch.Tensor, positions: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """values: one, what ``w_k`` and ``w_v`` are applied to (after the layer's norm), ``[T, d]``."""
        check_floats(values, [(self._width,)], f"[T, {self._width}], the input of w_k")
        return {self.component: values[0].unsqueeze(1)}

    def derive(self, reader: TokenReader, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two matrix products."""
        w_k, b_k, w_v, b_v = of_layer(self._weights, reader.layer)
        x = reader.rows(self.component, first, end).squeeze(1).to(self._weights_dtype)
        return torch.tensordot(x, w_k, 1) + b_k, torch.tensordot(x, w_v, 1) + b_v

    def attend(
        self, q: torch.Tensor, reader: TokenReader, *, scale: float | None = None, causal: bool = True
    ) -> Partial:
        """As ``Layout.attend``. What is stored is read once, in either order."""
        w_k, b_k, w_v, b_v = of_layer(self._weights, reader.layer)
        if not self._folds(q, w_k.shape[1]):
            return super().attend(q, reader, scale=scale, causal=causal)
        scale, q = self.head_dim**-0.5 if scale is None else scale, q.to(compute_dtype(q))
        by_input = _per_head(q, w_k.permute(1, 2, 0))

        def tile(first: int, end: int) -> Partial:
            x = reader.rows(self.component, first, end)
            return attend_tile(by_input, x, x, first=first, length=self.span(reader)[1], scale=scale, causal=causal)

        out, lse = self._sum(reader, tile, w_v, b_v)
        return out, lse + scale * _per_head(q, b_k.unsqueeze(2)).squeeze(2)  # the same for all scores of a query


class SlimX(_Inputs):
    """Stores the input of each layer's K and V, for projections wider than it: ``2 r`` times fewer bytes than K and V
    for an aspect ratio ``r = KV heads * head_dim / d``. Exact up to the dtype of the cache. For models that neither
    rotate nor normalise K.
    """

    component = "x"

    def __init__(
        self, layers: Sequence[Projection], *, head_dim: int, dtype: torch.dtype, rope: Rope | None = None,
        order: Order = "auto", block_size: int = 16,
    ) -> None:  # fmt: skip
        """layers: one projection for each layer. dtype: of the cache. order: as for ``SlimK``. ``SpecError`` for a
        model with ``rope``, and where K and V have no more elements than the input.
        """
        self._set_layers(layers, head_dim, dtype, order, rope)
        if (both := min(layer.w_k.shape[1] + layer.w_v.shape[1] for layer in layers)) <= self._width:
            raise SpecError(f"layers: got {both} elements of K and V for {self._width} of x, no more: store K and V")
        part = Component("x", width=self._width, dtype=dtype)
        self.spec = CacheSpec(components=[part], num_layers=len(layers), block_size=block_size)


class SharedEncoder(_Inputs):
    """Stores one encoder output for the cross attention of all layers. Exact up to the dtype of the cache.

    Its own calls are cross attention, with ``causal=False``. ``decoder`` is the layout given for self attention, over
    the joined spec: one allocator serves ``LayoutCache(shared, alloc)`` and ``LayoutCache(shared.decoder, alloc)``.
    Write the output once, with any of its layers, after ``Sequence.extend(n, group=shared.group)``.
    """

    component = "enc"

    def __init__(
        self, layers: Mapping[int, Projection], *, head_dim: int, decoder: Layout, dtype: torch.dtype,
        max_tokens: int | None = None, rope: Rope | None = None, order: Order = "auto",
    ) -> None:  # fmt: skip
        """layers: the projection of cross attention by layer. decoder: the layout of self attention. dtype: of the
        encoder output. max_tokens: of the encoder (Whisper: 1,500). order: as for ``SlimK``. ``SpecError`` for a model
        that rotates K of cross attention (``rope``).
        """
        if not isinstance(layers, Mapping) or not isinstance(decoder, Layout):
            raise SpecError(f"layers, decoder: got {described((layers, decoder))}; must be a dict and a Layout")
        self._set_layers(dict(sorted(layers.items())), head_dim, dtype, order, rope)
        part = Component("enc", width=self._width, dtype=dtype, scope="shared", growth="prefill")
        encoder = Group("encoder", (part,), tuple(self._weights), max_tokens=max_tokens)
        self.group, self.decoder = len(decoder.spec.groups), copy.copy(decoder)
        num_layers = max(decoder.spec.num_layers, *(layer + 1 for layer in self._weights))
        self.spec = replace(decoder.spec, groups=(*decoder.spec.groups, encoder), num_layers=num_layers)
        self.decoder.spec = self.spec

    def span(self, reader: TokenReader) -> tuple[int, int]:
        """The encoder's tokens."""
        return reader.span("enc")

    def attend(
        self, q: torch.Tensor, reader: TokenReader, *, scale: float | None = None, causal: bool = True
    ) -> Partial:
        """``SpecError`` unless ``causal`` is False: each query sees all encoder tokens."""
        if causal:
            raise SpecError("causal: got True; cross attention sees all encoder tokens: pass causal=False")
        return super().attend(q, reader, scale=scale, causal=False)
