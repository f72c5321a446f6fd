"""A cache in which each lane, a (sequence, layer, KV head), keeps its own tokens (Attention-Gate, arXiv:2410.12876)."""

from __future__ import annotations

from collections.abc import Sequence as List
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from kvmem.allocator import Allocator, Batch, Sequence
from kvmem.allocator.opening import MAX_SEQUENCES
from kvmem.arguments import as_int32, brief, check_bool, check_choice, check_number, check_size
from kvmem.errors import OutOfMemory, SpecError, StaleHandle
from kvmem.kernels.checks import as_bytes, flat_tokens
from kvmem.kernels.write import to_cache_dtype
from kvmem.layouts.attention import Partial, compute_dtype, described, normalise
from kvmem.spec import CacheSpec

__all__ = ["LaneCache", "LaneSequence", "Lanes"]

Held = NDArray[np.int64]


@dataclass
class _Layer:
    """One layer of a sequence. Each head holds what it ``kept``, then every token since ``since``.

    ids: handles of the H lanes. kept: by head int64 ``[2, n]``, the position of each token in the sequence and its row
    in the lane; never written, so forks share it. On the host, since no kernel reads it, and lengths are decided here.
    stored: rows of each lane at ``since``. owners: one number, of forks that share the lanes. new: of the last append.
    """

    ids: NDArray[np.int32]
    kept: list[Held]
    stored: list[int]
    owners: list[int]
    since: int = 0
    num_tokens: int = 0
    new: int = 0

    def held(self) -> list[Held]:
        """Return by head the positions and rows of all that it holds, ``[2, length]``."""
        tail = np.arange(self.num_tokens - self.since)
        parts = zip(self.kept, self.stored, strict=True)
        return [np.concatenate((kept, (self.since + tail, stored + tail)), 1) for kept, stored in parts]

    def lengths(self) -> list[int]:
        return [one.shape[1] + self.num_tokens - self.since for one in self.kept]

    def rows(self) -> list[int]:  # with hidden ones
        return [stored + self.num_tokens - self.since for stored in self.stored]

    def grow(self, count: int, mask: NDArray[np.bool_] | None) -> None:
        first, self.new = self.num_tokens, count
        if mask is None or mask.all():
            self.num_tokens += count
            return
        parts = [*zip(self.held(), self.rows(), map(np.flatnonzero, mask), strict=True)]
        self.num_tokens += count
        self.kept = [np.concatenate((old, (first + at, n + np.arange(len(at)))), 1) for old, n, at in parts]
        self.stored, self.since = [n + len(at) for _, n, at in parts], self.num_tokens


class LaneCache:
    """K and V of sequences whose layers and KV heads evict tokens independently, and give their memory back.

    A step; ``cache.lanes([a, b])`` has the same calls for several sequences at once::

        seq.append(layer, k, v)                 # keep=mask: dropped rows are never stored
        out, lse = seq.attend(q, layer)         # or a kernel of kvmem.kernels over head_requests()
        seq.evict(layer, mask)                  # masks of policies: kvmem.layouts.policies.apply()

    Attention over what is left equals attention over all tokens with the evicted ones masked. Keys keep the rotation to
    their true positions. Lanes are shared by ``fork()`` only, never by prefix, because what a gate keeps depends on the
    whole prompt. Each lane is a sequence of ``alloc``. Not thread-safe.
    """

    def __init__(
        self, *, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, max_sequences: int,
        block_size: int = 16, backend: Literal["virtual", "paged"] = "paged", **options: Any,
    ) -> None:  # fmt: skip
        """options: of ``Allocator``, such as ``device``, ``memory``, ``max_tokens``, ``page_bytes`` and ``pool``.
        ``SpecError`` for more lanes than it takes, and for the virtual backend unless a page is at most a block.
        """
        spec = CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=head_dim, dtype=dtype, block_size=block_size)
        check_size("num_layers", num_layers), check_size("num_kv_heads", num_kv_heads)
        self.num_layers, self.num_kv_heads = num_layers, num_kv_heads
        self.max_sequences = check_size("max_sequences", max_sequences)
        check_choice("backend", backend, ("virtual", "paged"))
        self.head_dim, self.dtype = head_dim, spec.groups[0].components[0].dtype
        each = (num_layers + 1) * num_kv_heads  # one more layer: an eviction from shared lanes writes new ones first
        if max_sequences > (most := MAX_SEQUENCES // each):
            raise SpecError(f"max_sequences: got {max_sequences}, of {each} lanes each; at most {most} fit a cache")
        if str(options.get("device")) == "meta":
            raise SpecError('device: got "meta", which has no memory; lanes hold and move rows: use "cpu" or a GPU')
        if options.pop("window_tokens", None) is not None:
            raise SpecError("window_tokens: lanes keep rows of any positions: policies.SinkAndWindow keeps the newest")
        if options.pop("prefix_cache", False):
            raise SpecError("prefix_cache: got True; lanes are shared by fork() only, as a gate sees the whole prompt")
        options = {"cached_rows": 0, **options} if backend == "virtual" else options
        self.alloc = Allocator(spec, backend=backend, max_sequences=max_sequences * each, prefix_cache=False, **options)
        page, block = self.alloc.pool.page_bytes, spec.bytes_per_token * block_size
        if backend == "virtual" and page > block:
            self.alloc.close()
            few = f"{page * block_size // block} tokens of a lane each, so that eviction gives little back"
            raise SpecError(f'backend: got "virtual" with pages of {page} bytes, {few}: use "paged", or {block} bytes')

    @property
    def kv(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of all lanes of all layers, ``[num_blocks, block_size, 1, head_dim]`` each, as ``Allocator.kv``."""
        return self.alloc.kv(0)

    def sequence(self) -> LaneSequence:
        """Return a new, empty sequence. ``OutOfMemory`` if all ``max_sequences`` are in use."""
        self._check_room()
        heads, none = self.num_kv_heads, np.empty((2, 0), np.int64)
        lanes = self.alloc.open_batch(self.num_layers * heads).reshape(-1, heads)
        return LaneSequence(self, [_Layer(ids, [none] * heads, [0] * heads, [1]) for ids in lanes])

    def lanes(self, sequences: List[LaneSequence]) -> Lanes:
        """Return several sequences of this cache as one object. ``SpecError`` for others, or one twice."""
        owners = {getattr(one, "cache", None) for one in sequences} if isinstance(sequences, (list, tuple)) else set()
        if owners != {self} or len(set(map(id, sequences))) != len(sequences):
            raise SpecError(f"sequences: got {brief(sequences)}; must be different sequences of this cache")
        return Lanes(self, list(sequences))

    def trim(self) -> int:
        """Give free pages to the system; return how many bytes. Blocks move together first, so batches are stale."""
        self.alloc.compact()
        return self.alloc.trim()

    def _check_room(self) -> None:
        if self.alloc.stats().num_sequences == self.max_sequences * self.num_layers * self.num_kv_heads:
            raise OutOfMemory(f"all {self.max_sequences} sequences are in use: free one, or make the cache for more")

    def _pending(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        tokens, committed = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
        self.alloc.core.lengths(ids, 0, tokens, committed)
        return (tokens - committed).astype(np.int32)

    def _slots(self, ids: NDArray[np.int32], rows: list[Held]) -> torch.Tensor:
        """Return where rows of lanes lie in ``flat_tokens``, int64, one lane after the other."""
        batch = self.alloc.batch(ids)
        lane = np.repeat(np.arange(len(ids)), [len(one) for one in rows])
        at = torch.from_numpy(np.stack((lane, np.concatenate(rows)))).to(batch.block_table.device)
        return batch.block_table[at[0], at[1] // batch.block_size].long() * batch.block_size + at[1] % batch.block_size

    def _compact(self, states: list[_Layer], found: list[list[Held]]) -> None:
        """Leave in each lane what ``found`` holds of it, at the front; in a new lane, if a fork shares it."""
        ids, rows = _ids(states), [one[1] for kept in found for one in kept]
        shared = np.repeat([state.owners[0] > 1 for state in states], self.num_kv_heads)
        targets, lengths = ids.copy(), np.array([len(one) for one in rows], np.int32)
        targets[shared] = fresh = self.alloc.open_batch(int(shared.sum()))
        try:
            self.alloc.extend_batch(fresh, lengths[shared])
            moved = [np.flatnonzero(new | (one != np.arange(len(one)))) for one, new in zip(rows, shared, strict=True)]
            source = self._slots(ids, [one[m] for one, m in zip(rows, moved, strict=True)])
            target = self._slots(targets, moved)
        except BaseException:
            self.alloc.free_batch(fresh)
            raise
        for blocks in self.kv:
            flat = as_bytes(flat_tokens(blocks))
            flat[target] = flat[source]  # gathered first: source and target may overlap
        self.alloc.commit_batch(targets, self._pending(targets))
        for lane, length in zip(targets.tolist(), lengths.tolist(), strict=True):
            self.alloc.core.truncate(lane, length)
        self.alloc.free_batch(ids[shared])
        for state, kept, lanes in zip(states, found, targets.reshape(len(states), -1), strict=True):
            state.owners[0] -= 1
            state.owners, state.ids, state.since = [1], lanes, state.num_tokens
            state.kept = [np.stack((at, np.arange(len(at)))) for at, _ in kept]
            state.stored = [one.shape[1] for one in kept]


class Lanes:
    """The lanes of one or several sequences. Their T tokens are given one sequence's after the other's."""

    def __init__(self, cache: LaneCache, sequences: list[LaneSequence]) -> None:
        self.cache, self.alloc, self._sequences = cache, cache.alloc, sequences

    def _states(self, layer: int) -> list[_Layer]:
        if any(one._freed for one in self._sequences):
            raise StaleHandle("a sequence of these lanes was freed")
        return [one._layers[check_size("layer", layer, 0, self.cache.num_layers - 1)] for one in self._sequences]

    def append(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, *, keep: torch.Tensor | None = None,
        counts: List[int] | None = None,
    ) -> None:  # fmt: skip
        """Store new tokens of one layer. k, v: ``[T, H, head_dim]``, k after rotation. keep: bool ``[H, T]``, False for
        rows that are not stored. counts: tokens of each sequence, default the same. ``SpecError``, ``OutOfMemory``:
        nothing has changed then.
        """
        cache, states, each = self.cache, self._states(layer), self._counts("k", k, counts)
        given, _ = (("k", k), ("v", v)), self._counts("v", v, each)
        packed = [_by_lane(to_cache_dtype(x, cache.dtype, name=name), each).unsqueeze(1) for name, x in given]
        ids, fresh = _ids(states), np.repeat(np.array(each, np.int32), cache.num_kv_heads)
        mask = None if keep is None else self._mask(keep, len(k))
        if mask is not None:
            chosen = _by_lane(mask.T, each).nonzero()[:, 0].to(k.device)
            packed = [value[chosen] for value in packed]
            fresh = torch.cat([part.sum(1) for part in mask.split_with_sizes(each, 1)]).int().numpy()
        cache.alloc.extend_batch(ids, fresh)
        cache.alloc.commit_batch(ids, cache._pending(ids) - fresh)
        batch = cache.alloc.batch(ids)
        for blocks, value in zip(cache.kv, packed, strict=True):
            as_bytes(flat_tokens(blocks))[batch.slot_mapping] = as_bytes(value)
        for state, count, end in zip(states, each, accumulate(each), strict=True):
            state.grow(count, None if mask is None else mask[:, end - count : end].numpy())

    def evict(self, layer: int, keep: torch.Tensor | List[torch.Tensor], *, compact: bool = True) -> int:
        """Drop rows of one layer; return how many bytes all sequences hold less, in whole blocks (virtual: pages).

        keep: bool ``[H, S]``, False for rows that go; a list of masks for several sequences. S: rows of the longest
        head (``lengths``); entries past the length of a head do not count. compact: move the rows that stay to the
        front, in their order, and give the blocks behind them to other lanes; ``LaneCache.trim()`` gives them to the
        system. False only hides rows, until the next compaction of the layer, and returns 0. Lanes that a fork shares
        are copied, so the result may be negative. ``SpecError`` for masks that do not fit, ``OutOfMemory`` only for
        such a copy: nothing has changed then. Cost: a gather and a write of rows that move.
        """
        states, masks = self._states(layer), list(keep) if isinstance(keep, (list, tuple)) else [keep]
        check_bool("compact", compact)
        if len(masks) != len(states):
            raise SpecError(f"keep: got {len(masks)} masks; must be one for each of {len(states)} sequences")
        found = []
        for state, given in zip(states, masks, strict=True):
            mask = self._mask(given, max(state.lengths())).numpy()
            found.append([held[:, one[: held.shape[1]]] for held, one in zip(state.held(), mask, strict=True)])
        before = self.alloc.stats().held_bytes
        if compact:
            self.cache._compact(states, found)
        for state, kept in zip(states, [] if compact else found, strict=False):
            state.kept, state.stored, state.since = kept, state.rows(), state.num_tokens
        return before - self.alloc.stats().held_bytes

    def attend(self, q: torch.Tensor, layer: int, *, scale: float | None = None) -> Partial:
        """Return ``(out [T, query heads, head_dim], lse [T, query heads])`` of the newest tokens over what is held.

        q: ``[T, query heads, head_dim]``, after rotation, of the last ``append``. A query sees the rows whose true
        position is at most its own. out: in q's dtype. lse: natural, float32 (float64 for q in float64); -inf, and out
        0, where a query sees no row. Cost: in torch, over all scores at once, padded to the longest lane.
        """
        counts = self._counts("q", q, [state.new for state in self._states(layer)])
        weights, lse, v = self._attention(q, layer, counts, scale)
        with torch.autocast(q.device.type, enabled=False):
            out = torch.einsum("ngtm,nmd->ngtd", weights, v)
        used = (torch.arange(out.shape[2]) < torch.tensor(counts).unsqueeze(1)).to(q.device)
        out, lse = (x.reshape(len(counts), q.shape[1], *x.shape[2:]).transpose(1, 2)[used] for x in (out, lse))
        return out.to(q.dtype), lse

    def weights(self, q: torch.Tensor, layer: int, *, scale: float | None = None) -> torch.Tensor:
        """Return what ``attend`` weights V by: ``[B * query heads, n, S]`` of the newest n tokens of B sequences."""
        return self._attention(q, layer, self._counts("q", q, None), scale)[0].flatten(0, 1)

    def _attention(self, q: torch.Tensor, layer: int, counts: list[int], scale: float | None) -> list[torch.Tensor]:
        """Return the attention of each lane ``[n, g, t, m]``, the lse ``[n, g, t]`` and V ``[n, m, width]``, padded."""
        scale = q.shape[2] ** -0.5 if scale is None else check_number("scale", scale)
        states, heads, (k, v) = self._states(layer), self.cache.num_kv_heads, self.padded(layer, dtype=compute_dtype(q))
        queries = pad_sequence(list(q.to(k.dtype).split_with_sizes(counts)), batch_first=True)
        queries = torch.unflatten(queries, 2, (heads, q.shape[1] // heads)).permute(0, 2, 3, 1, 4).flatten(0, 1)
        seen = torch.zeros(len(states), heads, queries.shape[2], dtype=torch.int64)
        for row, state, count in zip(seen.numpy(), states, counts, strict=True):
            asked = np.arange(state.num_tokens - count, state.num_tokens)
            row[:, :count] = [np.searchsorted(held[0], asked, side="right") for held in state.held()]
        with torch.autocast(q.device.type, enabled=False):
            scores = torch.einsum("ngtd,nmd->ngtm", queries, k) * scale
        hidden = torch.arange(k.shape[1], device=q.device) >= seen.flatten(0, 1)[:, None, :, None].to(q.device)
        weights, lse = normalise(scores.masked_fill_(hidden, -torch.inf).flatten(0, 1))
        return [weights.view_as(scores), lse.T.reshape(scores.shape[:3]), v]

    def padded(self, layer: int, *, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """Return K and V of each lane, ``[B * H, S, head_dim]``, zero past its rows. dtype: default the cache's."""
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise SpecError(f"dtype: got {brief(dtype)}; must be a float, such as torch.float16")
        states, rows = self._states(layer), [held[1] for state in self._states(layer) for held in state.held()]
        slots, lengths = self.cache._slots(_ids(states), rows), [len(one) for one in rows]
        found = [as_bytes(flat_tokens(x))[slots].view(x.dtype).squeeze(1) for x in self.cache.kv]
        for name, values in zip("kv", found, strict=True):
            self.alloc.ledger.count_read(name, values.numel() * values.element_size())
        return [pad_sequence(list(x.to(dtype or x.dtype).split_with_sizes(lengths)), batch_first=True) for x in found]

    def head_requests(self, layer: int, *, out: Batch | None = None) -> Batch:
        """Return the batch of a step in which each (sequence, KV head) is a request of its own: kernels read it over
        ``LaneCache.kv``, with one KV head and the queries of ``split_heads``. out: a batch to refill. ``SpecError``
        after an ``append`` that dropped rows, after ``evict`` until the next append, and with hidden rows.
        """
        states = self._states(layer)
        if any(one.since > one.num_tokens - one.new or one.lengths() != one.rows() for one in states):
            use = "kernels mask by place: use attend(), or evict() with compact=True between steps"
            raise SpecError(f"layer: {layer} has new tokens that were not stored, or evicted or hidden rows; {use}")
        return self.alloc.batch(_ids(states), out=out)

    def split_heads(self, q: torch.Tensor, layer: int) -> torch.Tensor:
        """Return queries ``[T, query heads, width]`` as those of head requests, ``[T * H, g, width]``."""
        heads, counts = self.cache.num_kv_heads, self._counts("q", q, [state.new for state in self._states(layer)])
        return _by_lane(torch.unflatten(q, 1, (heads, q.shape[1] // heads)), counts)

    def join_heads(self, out: torch.Tensor, layer: int) -> torch.Tensor:
        """Return what a kernel gave for head requests, ``[T * H, g, ...]`` (out or lse), as ``[T, H * g, ...]``."""
        heads, sizes = self.cache.num_kv_heads, [state.new * self.cache.num_kv_heads for state in self._states(layer)]
        if not isinstance(out, torch.Tensor) or out.ndim < 2 or len(out) != sum(sizes):
            raise SpecError(f"out: got {described(out)}; must be a tensor [{sum(sizes)}, g, ...]")
        parts = [torch.unflatten(part, 0, (heads, len(part) // heads)) for part in out.split_with_sizes(sizes)]
        return _joined([part.transpose(0, 1).flatten(1, 2) for part in parts])

    def _counts(self, name: str, given: Any, counts: List[int] | None) -> list[int]:
        """Return how many tokens of ``given`` each sequence has; default: the same number."""
        cache, n, heads = self.cache, len(self._sequences), self.cache.num_kv_heads
        fits = isinstance(given, torch.Tensor) and given.device == self.alloc.device
        shape = tuple(given.shape) if fits and (name != "q" or given.is_floating_point()) else ()
        if len(shape) != 3 or shape[2] != cache.head_dim or shape[1] % heads or (name != "q" and shape[1] != heads):
            kind = "floats [T, a multiple of" if name == "q" else "a tensor [T,"
            must = f"{kind} {heads} heads, {cache.head_dim}] on {self.alloc.device}"
            raise SpecError(f"{name}: got {described(given)}; must be {must}")
        each = [shape[0] // n] * n if counts is None else as_int32("counts", counts).tolist()
        if len(each) != n or sum(each) != shape[0] or min(each) < 0:
            raise SpecError(f"{name}: got {shape[0]} tokens; {n} sequences have {each} (counts, or the last append)")
        return each

    def _mask(self, given: object, length: int) -> torch.Tensor:  # on the host
        wanted = (self.cache.num_kv_heads, length)
        if not isinstance(given, torch.Tensor) or given.dtype != torch.bool or tuple(given.shape) != wanted:
            must = f"torch.bool [{wanted[0]} KV heads, {length} rows]; policies.any_of_group() reduces query heads"
            raise SpecError(f"keep: got {described(given)}; must be {must}")
        return given.cpu()


class LaneSequence(Lanes, AbstractContextManager["LaneSequence"]):
    """One sequence of a ``LaneCache``. A context manager that frees it; its lanes stay in use if nobody does."""

    def __init__(self, cache: LaneCache, layers: list[_Layer]) -> None:
        super().__init__(cache, [self])
        self._layers, self._freed = layers, False

    def num_tokens(self, layer: int) -> int:
        """Return how many tokens the layer was given, evicted ones included: the position of the next."""
        return self._states(layer)[0].num_tokens

    def lengths(self, layer: int) -> torch.Tensor:
        """Return how many rows each KV head holds, int64 ``[H]``, on the CPU; hidden ones do not count."""
        return torch.tensor(self._states(layer)[0].lengths())

    def positions(self, layer: int, head: int) -> torch.Tensor:
        """Return where the rows of a head stand in the sequence, int64 ``[length]``, ascending, on the CPU."""
        held = self._states(layer)[0].held()
        return torch.from_numpy(held[check_size("head", head, 0, len(held) - 1)][0])

    def fork(self) -> LaneSequence:
        """Return a second sequence with the same rows; both share whole blocks, and neither changes the other.
        ``OutOfMemory`` if there is no room. The step of this sequence ends, also then; nothing else has changed.
        """
        cache, states = self.cache, [self._states(layer)[0] for layer in range(self.cache.num_layers)]
        cache._check_room()
        ids, lanes = _ids(states), []
        cache.alloc.commit_batch(ids, cache._pending(ids))
        for state in states:
            state.new = 0
        try:
            for lane in ids.tolist():
                lanes.append(Sequence(cache.alloc, lane).fork().detach())
        except BaseException:
            cache.alloc.free_batch(lanes)
            raise
        split = np.array(lanes, np.int32).reshape(len(states), -1)
        for state in states:
            state.owners[0] += 1
        return LaneSequence(cache, [replace(state, ids=one) for state, one in zip(states, split, strict=True)])

    def free(self) -> None:
        """Free all lanes. ``StaleHandle`` the second time."""
        states = [self._states(layer)[0] for layer in range(self.cache.num_layers)]
        self.alloc.free_batch(_ids(states))
        for state in states:
            state.owners[0] -= 1
        self._freed = True

    def __exit__(self, *_: object) -> None:
        if not self._freed and not self.alloc.closed:
            self.free()


def _ids(states: list[_Layer]) -> NDArray[np.int32]:
    return np.concatenate([state.ids for state in states])


def _by_lane(x: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Return tokens ``[T, H, ...]`` of several sequences as ``[T * H, ...]``: by sequence, then head, then token."""
    return _joined([part.transpose(0, 1).flatten(0, 1) for part in x.split_with_sizes(counts)])


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    with torch.autocast(parts[0].device.type, enabled=False):  # which refuses to join float16
        return torch.cat(parts)
