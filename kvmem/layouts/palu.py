"""Latents in place of K and V: each projection is factored into two narrow ones for each group of heads, and a token
stores what lies between them (Palu, arXiv:2407.21118).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from kvmem.arguments import INT32_MAX, brief, check_bool, check_size
from kvmem.errors import SpecError
from kvmem.kernels.merge import merge_levels
from kvmem.layouts.attention import Partial, compute_dtype, described, masked_scores, normalise
from kvmem.layouts.base import Layout, check_floats, of_layer
from kvmem.layouts.bits import BITS, hadamard, pack, quantise, unpack
from kvmem.layouts.reading import TokenReader
from kvmem.layouts.rope import Rope, check_rope
from kvmem.spec import CacheSpec, Component
from kvmem.spec.dtypes import parse_dtype

__all__ = ["Palu", "factor", "latent_spec", "pack_latents", "search_ranks", "unpack_latents"]

#: ``[layers][K, V][groups]``
Ranks = Sequence[Sequence[Sequence[int]]]
Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
KNorm = Callable[[torch.Tensor], torch.Tensor]


def factor(weight: torch.Tensor, rank: int, root: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(down [hidden, rank], up [rank, width])`` in float64. Their product is the best approximation of the
    weight with this rank; with a root, of what the weight makes of inputs that have this covariance.

    weight: ``[hidden, width]``, as in ``x @ weight``. root: what ``covariance_root`` returned. Both factors take the
    square roots of the singular values. Cost: one singular value decomposition.
    """
    check_matrix("weight", weight)
    check_size("rank", rank, 1, min(weight.shape))
    if root is not None:
        check_matrix("root", root, (len(weight), len(weight)))
    weight = weight.double()
    seen = weight if root is None else root.mT @ weight
    _, sizes, right = torch.linalg.svd(seen, full_matrices=False)
    # The product is weight @ right.T @ right, a projection of the output, so no inverse of the root is needed.
    split = sizes[:rank].clamp(min=torch.finfo(sizes.dtype).eps * float(sizes[0]) or 1.0).sqrt()
    return weight @ right[:rank].mT / split, split.unsqueeze(1) * right[:rank]


def check_matrix(field: str, given: object, shape: tuple[int, int] | None = None) -> None:
    """``SpecError`` unless it is a matrix of floats, of this shape."""
    matrix = isinstance(given, torch.Tensor) and given.is_floating_point() and given.ndim == 2
    if not matrix or (shape is not None and given.shape != shape):  # type: ignore[attr-defined]
        raise SpecError(f"{field}: got {described(given)}; must be a tensor {shape or '[rows, columns]'} of floats")


def covariance_root(covariance: torch.Tensor, hidden: int, field: str = "covariance") -> torch.Tensor:
    """Return the Cholesky factor of a covariance, the mean of ``outer(x, x)`` over calibration inputs x, in float64.

    ``SpecError`` unless it is ``[hidden, hidden]``, finite and positive definite.
    """
    check_matrix(field, covariance, (hidden, hidden))
    if not covariance.isfinite().all():
        raise SpecError(f"{field}: got NaN or infinity; must be finite: leave out the inputs that overflowed")
    covariance = covariance.double()
    deviations = covariance.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    values = torch.linalg.eigvalsh(covariance / deviations / deviations.unsqueeze(1))
    if values[0] <= torch.finfo(torch.float64).eps * hidden * values[-1]:
        little = f"a little to its diagonal, such as {float(deviations.square().mean()) * 1e-6:.3g}"
        why = f"not positive definite: calibrate on more than {hidden} tokens, or add {little}"
        raise SpecError(f"{field}: got a matrix that is {why}")
    return torch.as_tensor(torch.linalg.cholesky(covariance))


def search_ranks(
    scores: Any, *, width: int, budget_bytes: int, dtype: torch.dtype | str, bits: int | None = None, multiple: int = 32
) -> Any:
    """Return a rank for each score, nested as they are: together at most ``budget_bytes`` a token, and as near to
    proportional as multiples of ``multiple`` allow. A higher score never has a lower rank.

    scores: the importance of each group of heads, ``[layers][K, V][groups]``, above 0; Palu takes the mean Fisher
    information of the group's weights. width: the channels of a group, its largest rank. dtype, bits: as ``Palu`` takes
    them. ``SpecError`` for a budget in which some group would have no rank.
    """
    try:
        given = torch.as_tensor(scores, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        given = torch.empty(0)
    if not given.numel() or not (given.isfinite() & (given > 0)).all():
        raise SpecError(f"scores: got {brief(scores)}; all must be finite and above 0")
    most = check_size("width", width) // check_size("multiple", multiple)
    if not most:
        raise SpecError(f"multiple: got {multiple}; a group has {width} channels: at most {width}")
    one, two = (stored_bytes(multiple * n, dtype, bits) for n in (1, 2))
    spare = check_size("budget_bytes", budget_bytes) - given.numel() * one
    if spare < 0:
        raise SpecError(f"budget_bytes: got {budget_bytes}; ranks of {multiple} need {budget_bytes - spare} in all")
    flat, units = given.flatten().numpy(), np.ones(given.numel(), dtype=np.int64)
    for _ in range(min(spare // (two - one), len(flat) * (most - 1))):
        # The next unit goes where the score is highest for the units that are there (Sainte-Lague).
        units[int(np.argmax(np.where(units < most, flat / (2 * units + 1), 0)))] += 1
    return torch.from_numpy(units * multiple).view(given.shape).tolist()


def stored_bytes(rank: int, dtype: torch.dtype | str, bits: int | None = None) -> int:
    """Return the bytes of a token and group: of its latent, or of the packed codes with their scale and zero point."""
    kind = parse_dtype(dtype, "dtype")
    if bits is not None and (not isinstance(bits, int) or bits not in BITS):
        raise SpecError(f"bits: got {brief(bits)}; must be None, 2, 3, 4 or 8")
    if not kind.is_floating_point or (bits and kind.itemsize == 1):
        raise SpecError(f"dtype: got {kind}; latents, and the scales of packed ones, need a float, such as bfloat16")
    if bits and rank % 8:
        raise SpecError(f"ranks: got {rank}; packed latents need multiples of 8, such as {max(8, rank // 8 * 8)}")
    return rank * bits // 8 + 2 * kind.itemsize if bits else rank * kind.itemsize


def pack_latents(latents: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Return uint8 ``[n, rank * bits / 8 + 2 * itemsize]``: the codes of each row, its scale and its zero point.

    latents: floating point ``[n, rank]``, rank a multiple of 8. dtype: of scale and zero point. A code c stands for ``c
    * scale + zero``: off by half a scale at most (``bits.quantise``).
    """
    codes, *ends = quantise(latents, bits, scale_dtype=dtype)
    return torch.cat((pack(codes, bits), torch.stack(ends, 1).view(torch.uint8)), 1)


def unpack_latents(packed: torch.Tensor, bits: int, dtype: torch.dtype, into: torch.dtype) -> torch.Tensor:
    """Return the latents ``[n, rank]`` of ``pack_latents``, in the dtype ``into``."""
    size = 2 * dtype.itemsize
    ends = packed[:, -size:].clone(memory_format=torch.contiguous_format).view(dtype).to(into)  # a clone is aligned
    codes = unpack(packed[:, :-size].contiguous(), bits)
    return torch.addcmul(ends[:, 1:], codes.to(into), ends[:, :1])


def latent_spec(
    ranks: Ranks, *, dtype: torch.dtype | str, bits: int | None = None, rope: bool = True, block_size: int = 16
) -> CacheSpec:
    """Return the spec of these ranks: components ``hk`` and ``hv``, one width for each layer and group.

    ranks: ``[layers][K, V][groups]``. rope: whether K is rotated once it is rebuilt. Others: as ``Palu`` takes them.
    Packed latents are bytes, scale and zero point behind the codes of their group: components of their own would be
    padded to 16 bytes in each layer.
    """
    check_bool("rope", rope)
    kind, ranks = (
        torch.uint8 if bits is not None else parse_dtype(dtype, "dtype"),
        _check_ranks(ranks, (None, 2, None), INT32_MAX),
    )
    components = []
    for part, name in enumerate(("hk", "hv")):
        widths = tuple(tuple(stored_bytes(r, dtype, bits) // kind.itemsize for r in layer[part]) for layer in ranks)
        state: Any = "pre" if rope and name == "hk" else "none"
        components.append(Component(name, heads=len(ranks[0][part]), width=widths, dtype=kind, rope=state))
    return CacheSpec(components=components, num_layers=len(ranks), block_size=block_size)


@dataclass(frozen=True)
class _Factored:
    """One projection of a layer. down: ``[hidden, sum of ranks]``. ups: ``[rank, heads of a group, head_dim]`` each."""

    down: torch.Tensor
    ups: tuple[torch.Tensor, ...]
    ranks: list[int]

    def rebuilt(self, latents: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return what the product of both factors gives: ``[n, KV heads, head_dim]``."""
        each = [torch.einsum("nr,rkd->nkd", h, up.to(h.dtype)) for h, up in zip(latents, self.ups, strict=True)]
        return torch.cat(each, 1)


@dataclass(frozen=True)
class _LayerWeights:
    hk: _Factored
    hv: _Factored
    w_o: torch.Tensor
    k_norm: KNorm | None


class Palu(Layout):
    """Stores one latent for each group of KV heads for K (before rotation), and one for V. Equal to the model whose W_K
    and W_V are the products of their factors, up to the dtype of the cache. Lower ranks are further from the model.

    ``attend`` reads the latents. It rebuilds K a tile at a time and rotates it to the positions of its tokens; without
    RoPE and QK-norm, the factor of K goes to the side of the queries instead. V is never rebuilt: ``attend`` returns
    weighted latents, and ``project`` applies a W_O that has the factor of V folded in.

    ranks: of the latents, ``[layers][K, V][groups]``.
    """

    @torch.no_grad()
    def __init__(
        self, weights: Sequence[Weights], ranks: int | Ranks, *, kv_heads: int, head_dim: int,
        dtype: torch.dtype | str, group_heads: int = 4, rope: Rope | None = None,
        covariances: Sequence[torch.Tensor] | None = None, bits: int | None = None, rotate_latents: bool = False,
        k_norms: Sequence[KNorm] | None = None, block_size: int = 16,
    ) -> None:  # fmt: skip
        """Factor the projections of all layers.

        weights: ``(W_K, W_V, W_O)`` of each layer, as in ``x @ W``: ``[hidden, KV heads * head_dim]`` twice and
        ``[query heads * head_dim, hidden]``; the ``weight`` of a ``torch.nn.Linear`` is the transpose. A bias is one
        more row of W_K and W_V, and a 1 at the end of each x. ranks: ``[layers][K, V][groups]``, as ``search_ranks``
        returns them, or one for all. group_heads: KV heads that are factored together. rope: None for a model that does
        not rotate K. covariances: of each layer's x over a calibration text, ``[hidden, hidden]``; the factors lose
        least on inputs that are like these. bits: 2, 3, 4 or 8 packs the latents, with a scale and a zero point for
        each token and group. dtype: of the latents, or of scales and zero points. rotate_latents: put a Hadamard matrix
        between the factors, which spreads outliers. k_norms: for each layer, what K, ``[n, KV heads, head_dim]`` in
        float32 (float64 for such weights), goes through between projection and rotation (QK-norm).

        ``SpecError`` for what does not fit. Cost: two singular value decompositions for each layer and group.
        """
        check_size("kv_heads", kv_heads), check_size("head_dim", head_dim)
        if kv_heads % check_size("group_heads", group_heads):
            near = min((n for n in range(1, kv_heads + 1) if kv_heads % n == 0), key=lambda n: abs(n - group_heads))
            raise SpecError(f"group_heads: got {group_heads}; must divide {kv_heads} KV heads: the nearest is {near}")
        check_bool("rotate_latents", rotate_latents)
        self._groups, self._head_dim = kv_heads // group_heads, head_dim
        self._dtype, self._bits, self._rope = parse_dtype(dtype, "dtype"), bits, rope
        check_rope(rope, head_dim)
        self._hidden = _check_weights(weights, kv_heads * head_dim)
        self.ranks = _check_ranks(ranks, (len(weights), 2, self._groups), min(group_heads * head_dim, self._hidden))
        self.out_widths = {layer: max(of_v) for layer, (_, of_v) in enumerate(self.ranks)}
        self.spec = latent_spec(self.ranks, dtype=dtype, bits=bits, rope=rope is not None, block_size=block_size)
        for field, given in (("covariances", covariances), ("k_norms", k_norms)):
            fits = isinstance(given, (tuple, list)) and len(given) == len(weights)
            got = len(given) if isinstance(given, (tuple, list)) else described(given)
            if given is not None and not (fits and (field == "covariances" or all(map(callable, given)))):
                raise SpecError(f"{field}: got {got}; needs one for each of {len(weights)} layers")
        many = enumerate(() if covariances is None else covariances)
        roots = [covariance_root(c, self._hidden, f"covariances[{i}]") for i, c in many]
        turned = {rank for layer in self.ranks for part in layer for rank in part} if rotate_latents else ()
        turns = {rank: hadamard(rank, field="ranks", dtype=torch.float64) for rank in turned}
        self._layers: dict[int, _LayerWeights] = {}
        for layer, three in enumerate(weights):
            root, k_norm = roots[layer] if roots else None, k_norms[layer] if k_norms else None
            hk, hv = (self._factor(w, r, root, turns) for w, r in zip(three, self.ranks[layer], strict=False))
            # W_O by group, KV head of the group, query head of the KV head, channel
            w_o = three[2].double().view(self._groups, group_heads, -1, head_dim, three[2].shape[1])
            pairs = zip(hv.ups, w_o, strict=True)  # in float64, which autocast does not shorten
            folded = [torch.einsum("rkd,kjdo->kjro", up.double(), of).flatten(0, 2) for up, of in pairs]
            self._layers[layer] = _LayerWeights(hk, hv, torch.cat(folded).to(hv.down.dtype), k_norm)

    def _factor(
        self, weight: torch.Tensor, ranks: list[int], root: torch.Tensor | None, turns: Mapping[int, torch.Tensor]
    ) -> _Factored:
        kept, downs, ups = compute_dtype(weight), [], []
        for group, rank in zip(weight.chunk(self._groups, dim=1), ranks, strict=True):
            down, up = factor(group, rank, root)
            if turns:
                turn = turns[rank].to(down.device)
                down, up = down @ turn, turn.mT @ up
            downs.append(down.to(kept))
            ups.append(up.to(kept).view(rank, -1, self._head_dim))
        return _Factored(torch.cat(downs, 1), tuple(ups), ranks)

    @property
    def weight_bytes(self) -> int:
        """The bytes of all factors and folded W_O, which the device holds in place of W_K, W_V and W_O. A folded W_O
        has a row for each channel of each query head's latent: more than W_O, where a rank is above head_dim.
        """
        tensors = [t for w in self._layers.values() for t in (w.hk.down, *w.hk.ups, w.hv.down, *w.hv.ups, w.w_o)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def encode(self, layer: int, *values: torch.Tensor, positions: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """values: x, the input of the K and V projections, ``[T, hidden]``. A latent is taken before rotation, so the
        same bytes serve at any position.
        """
        check_floats(values, [(self._hidden,)], f"x, the input of the projections: [T, {self._hidden}]")
        x, rows = values[0].to(compute_dtype(values[0])), {}
        for name in ("hk", "hv"):
            part: _Factored = getattr(of_layer(self._layers, layer), name)
            parts = torch.split(x @ part.down.to(x.dtype), part.ranks, dim=1)
            if self._bits is not None:
                parts = tuple(pack_latents(h, self._bits, self._dtype) for h in parts)
            # As a component is stored: groups of unequal width are one flat row (Slice in geometry/group_layout.py).
            rows[name] = torch.stack(parts, 1) if len(set(part.ranks)) == 1 else torch.cat(parts, 1).unsqueeze(1)
        return rows

    def _latents(self, reader: TokenReader, name: str, first: int, end: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return the latents of tokens ``[first, end)``, ``[n, rank]`` for each group."""
        ranks, rows = getattr(self._layers[reader.layer], name).ranks, reader.rows(name, first, end).flatten(1)
        sizes = [stored_bytes(rank, self._dtype, self._bits) // rows.element_size() for rank in ranks]
        if self._bits is None:
            return [h.to(dtype) for h in torch.split(rows, sizes, dim=1)]
        return [unpack_latents(h, self._bits, self._dtype, dtype) for h in torch.split(rows, sizes, dim=1)]

    def _keys(self, layer: int, latents: Sequence[torch.Tensor], first: int) -> torch.Tensor:
        weights = self._layers[layer]
        k = weights.hk.rebuilt(latents)
        if weights.k_norm is not None:
            k = weights.k_norm(k.to(weights.w_o.dtype)).to(k.dtype)
        return k if self._rope is None else self._rope.apply(k, torch.arange(first, first + len(k), device=k.device))

    def derive(self, reader: TokenReader, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """New tensors, float32, or float64 for weights in float64: K rotated to the positions of its tokens, and V."""
        weights = of_layer(self._layers, reader.layer)
        hk, hv = (self._latents(reader, name, first, end, weights.w_o.dtype) for name in ("hk", "hv"))
        return self._keys(reader.layer, hk, first), weights.hv.rebuilt(hv)

    def attend(
        self, q: torch.Tensor, reader: TokenReader, *, scale: float | None = None, causal: bool = True
    ) -> Partial:
        """As ``Layout.attend``, but ``out`` is ``[n, query heads, largest rank of V]``: weighted latents, zero past the
        rank of their group. ``project`` turns them into what W_O makes of attention over V.
        """
        weights, dtype = of_layer(self._layers, reader.layer), compute_dtype(q)
        heads = len(weights.w_o) * self._groups // sum(weights.hv.ranks)
        if q.ndim != 3 or tuple(q.shape[1:]) != (heads, self._head_dim):
            raise SpecError(f"q: got shape {tuple(q.shape)}; must be [n, {heads}, {self._head_dim}]")
        scale = self._head_dim**-0.5 if scale is None else scale  # before the factor of K, which is not as wide
        how: dict[str, Any] = {"length": reader.length, "scale": scale, "causal": causal}
        folds = self._rope is None and weights.k_norm is None  # nothing lies between the factor of K and the scores
        queries = [q]
        if folds:
            shared = self._groups * weights.hk.ups[0].shape[1]  # KV heads
            by_group = q.to(dtype).view(len(q), shared, heads // shared, self._head_dim).chunk(self._groups, dim=1)
            ups = (up.to(dtype) for up in weights.hk.ups)
            queries = [torch.einsum("nkjd,rkd->nkjr", *pair).flatten(1, 2) for pair in zip(by_group, ups, strict=True)]

        def tile(first: int, end: int) -> Partial:
            latents = self._latents(reader, "hk", first, end, dtype)
            keys = [h.unsqueeze(1) for h in latents] if folds else [self._keys(reader.layer, latents, first)]
            scores = [masked_scores(part, k, first=first, **how) for part, k in zip(queries, keys, strict=True)]
            shares, lse = normalise(torch.cat(scores))
            values = self._latents(reader, "hv", first, end, dtype)
            outs = [(share @ h).transpose(0, 1) for share, h in zip(shares.chunk(self._groups), values, strict=True)]
            return torch.cat([pad(out, (0, max(weights.hv.ranks) - out.shape[2])) for out in outs], 1), lse

        return merge_levels(tile(*where) for where in self.tiles(0, reader.length))

    def output_projection(self, layer: int) -> torch.Tensor:
        """Return W_O with the factor of V folded in, ``[sum of the ranks of V over query heads, hidden]``."""
        return of_layer(self._layers, layer).w_o

    def project(self, layer: int, out: torch.Tensor) -> torch.Tensor:
        """Return ``[n, hidden]``: what W_O makes of attention over V. out: what ``attend`` returned, in any dtype."""
        weights = of_layer(self._layers, layer)
        by_group = zip(out.chunk(self._groups, dim=1), weights.hv.ranks, strict=True)
        return torch.cat([part[..., :rank].flatten(1) for part, rank in by_group], 1) @ weights.w_o.to(out.dtype)


def _check_weights(weights: Sequence[Weights], width: int) -> int:
    """Return the width of x. width: KV heads * head_dim. ``SpecError`` unless shapes agree and numbers are finite."""
    if not isinstance(weights, (tuple, list)) or not weights:
        raise SpecError(f"weights: got {described(weights)}; needs (W_K, W_V, W_O) of at least one layer")
    hidden = 0
    for layer, three in enumerate(weights):
        given = three if isinstance(three, (tuple, list)) else ()
        if [isinstance(w, torch.Tensor) and w.is_floating_point() and w.ndim for w in given] != [2, 2, 2]:
            raise SpecError(f"weights[{layer}]: got {described(three)}; must be W_K, W_V and W_O, float matrices")
        hidden = hidden or len(three[0])
        rows = max(1, len(three[2]) // width) * width  # each KV head has the same number of query heads
        shapes = ((hidden, width), (hidden, width), (rows, three[2].shape[-1]))
        for name, weight, shape in zip(("W_K", "W_V", "W_O"), three, shapes, strict=True):
            if tuple(weight.shape) != shape:
                raise SpecError(f"weights[{layer}]: got {name} of shape {tuple(weight.shape)}; the nearest is {shape}")
            if not weight.isfinite().all():
                raise SpecError(f"weights[{layer}]: got NaN or infinity in {name}; must be finite")
    return hidden


def _check_ranks(ranks: int | Ranks, shape: tuple[int | None, ...], most: int) -> list[list[list[int]]]:
    """Return ranks as ``[layers][K, V][groups]``. shape: None for what may be any number."""
    try:
        given = np.asarray(ranks)
    except ValueError:  # lists of unequal lengths
        given = np.empty(0)
    whole = tuple(have if want is None else want for have, want in zip(given.shape, shape, strict=False))
    one = given.ndim == 0 and None not in shape
    if given.dtype.kind not in "iu" or not (one or (given.ndim == 3 and given.size and given.shape == whole)):
        of = str(shape).replace("None", "any")
        raise SpecError(
            f"ranks: got {brief(ranks)}; must be {'one integer, or ' * (None not in shape)}integers of shape {of}"
        )
    for at, rank in np.ndenumerate(given):
        if not 1 <= rank <= most:
            raise SpecError(f"ranks{list(at) or ''}: got {rank}; must be from 1 to {most}, the channels of a group")
    full = given if whole else np.broadcast_to(given, [want or 1 for want in shape])
    return [[[int(rank) for rank in part] for part in layer] for layer in full]
