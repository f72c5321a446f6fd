"""Which tokens each KV head keeps: pure functions of what a layer holds, behind one protocol."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Protocol

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from kvmem.arguments import brief, check_name, check_number, check_size
from kvmem.errors import SpecError
from kvmem.layouts.lanes import LaneSequence

__all__ = ["Gate", "HeavyHitter", "Policy", "PolicyInput", "SinkAndWindow", "SnapKV", "any_of_group", "apply"]


@dataclass(frozen=True)
class PolicyInput:
    """What one layer of a sequence holds: H KV heads with rows of their own, padded to the S rows of the longest.

    k, v: ``[H, S, width]``, zero past a head's last row; k after rotation.
    positions: int64 ``[H, S]``, ascending: where each token stands in the sequence; -1 past a head's last row.
    lengths: int64 ``[H]``. num_tokens: how many tokens the sequence has, evicted ones included.
    weights: ``[query heads, n, S]``, the attention of the last n queries over the rows, or None. A caller that keeps
        sums over the steps of a sequence gives them with n = 1.
    hidden: hidden states or whatever else a gate sees, or None.
    """

    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    num_tokens: int
    weights: torch.Tensor | None = None
    hidden: torch.Tensor | None = None


class Policy(Protocol):
    """Decides which rows of a layer stay. The fingerprint is that of a frozen dataclass."""

    @property
    def fingerprint(self) -> str:
        """A text that two policies share only if they decide alike. The KV of later layers depends on what earlier
        ones evicted, so whoever stores it under a content key adds this: ``Allocator.sequence(adapter=)``.
        """
        given = {one.name: getattr(self, one.name) for one in fields(self) if one.compare}  # type: ignore[arg-type]
        return hashlib.sha256(f"{type(self).__name__} {given}".encode()).hexdigest()

    def keep(self, layer: int, given: PolicyInput) -> torch.Tensor:
        """Return a bool mask ``[H, S]``, True for rows that stay; what it says of padding does not count. Pure: equal
        input, equal mask. ``SpecError`` if the input lacks what the policy needs.
        """


def apply(
    policy: Policy, sequence: LaneSequence, layer: int, *, q: torch.Tensor | None = None, scale: float | None = None,
    hidden: torch.Tensor | None = None, compact: bool = True,
) -> int:  # fmt: skip
    """Evict from a layer what the policy does not keep; the result and ``compact`` are those of ``Lanes.evict``.

    q: the newest n queries, ``[n, query heads, head_dim]``, whose attention is computed for the policy. hidden: what a
    gate sees. With prefill in chunks, call it after the last: rows stay until then.
    """
    if not isinstance(sequence, LaneSequence) or isinstance(policy, type) or not hasattr(policy, "keep"):
        got = f"{brief(policy)} and {brief(sequence)}"
        raise SpecError(f"policy, sequence: got {got}; must be a policy, and one sequence of a LaneCache")
    scale = None if scale is None else check_number("scale", scale)
    (k, v), lengths = sequence.padded(layer), sequence.lengths(layer)
    positions = [sequence.positions(layer, head) for head in range(len(k))]
    given = PolicyInput(
        k, v, pad_sequence(positions, batch_first=True, padding_value=-1).to(k.device), lengths.to(k.device),
        sequence.num_tokens(layer), None if q is None else sequence.weights(q, layer, scale=scale), hidden,
    )  # fmt: skip
    return sequence.evict(layer, policy.keep(layer, given), compact=compact)


def any_of_group(mask: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Return a mask ``[num_kv_heads, S]`` of one ``[query heads, S]``: a row stays if any query head of its group keeps
    it, since these share the KV head. ``SpecError`` unless ``num_kv_heads`` divides the query heads.
    """
    check_size("num_kv_heads", num_kv_heads)
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.ndim != 2 or len(mask) % num_kv_heads:
        got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else brief(mask)
        raise SpecError(f"keep: got {got}; must be torch.bool [a multiple of {num_kv_heads} KV heads, S]")
    return mask.view(num_kv_heads, len(mask) // num_kv_heads, -1).any(1)


@dataclass(frozen=True)
class Gate(Policy):
    """Keeps what a trained gate says (Attention-Gate, arXiv:2410.12876), or any other callable.

    name: names the gate and its weights in the fingerprint, because a callable cannot be compared.
    gate: ``gate(layer, given)`` returns a bool mask ``[heads, S]``, or probabilities. With a row for each query head, a
        KV head keeps what any of its query heads keeps.
    threshold: a row stays if its probability is above it.
    """

    name: str
    gate: Callable[[int, PolicyInput], torch.Tensor] = field(compare=False)
    threshold: float = 0.5

    def __post_init__(self) -> None:
        check_name("name", self.name)
        if not callable(self.gate):
            raise SpecError(f"gate: got {brief(self.gate)}; must be a callable, gate(layer, given) -> mask")
        check_number("threshold", self.threshold)

    def keep(self, layer: int, given: PolicyInput) -> torch.Tensor:
        found = self.gate(layer, given)
        probabilities = isinstance(found, torch.Tensor) and found.is_floating_point()
        return any_of_group(found > self.threshold if probabilities else found, len(given.lengths))


@dataclass(frozen=True)
class SinkAndWindow(Policy):
    """Keeps the first ``sinks`` tokens of the sequence and the last ``window_tokens`` (StreamingLLM, arXiv:2309.17453).

    The original rotates keys by their place in the cache; here they keep their true positions.
    """

    window_tokens: int
    sinks: int = 4

    def __post_init__(self) -> None:
        check_size("window_tokens", self.window_tokens), check_size("sinks", self.sinks, 0)

    def keep(self, layer: int, given: PolicyInput) -> torch.Tensor:
        at = given.positions
        return (at >= 0) & ((at < self.sinks) | (at >= given.num_tokens - self.window_tokens))


@dataclass(frozen=True)
class HeavyHitter(Policy):
    """Keeps the last ``recent`` rows of each KV head, and of the others the ``heavy`` ones with the largest sums of
    attention (H2O, arXiv:2306.14048).

    Needs ``weights``: of all queries so far, or their sums. Query heads of a group are added.
    """

    heavy: int
    recent: int

    def __post_init__(self) -> None:
        check_size("heavy", self.heavy, 0), check_size("recent", self.recent, 0)

    def keep(self, layer: int, given: PolicyInput) -> torch.Tensor:
        return _best_and_last(_by_kv_head(given, "HeavyHitter").sum(1), given.lengths, self.heavy, self.recent)


@dataclass(frozen=True)
class SnapKV(Policy):
    """Keeps ``budget`` rows of each KV head: the last ``window``, and of the others those that the last ``window``
    queries attend to most, after a mean over ``kernel_size`` neighbours (SnapKV, arXiv:2404.14469).

    Needs ``weights`` of at least ``window`` queries. Query heads of a group are added; the original repeats KV heads.
    """

    budget: int
    window: int = 32
    kernel_size: int = 5

    def __post_init__(self) -> None:
        check_size("window", self.window)
        if check_size("budget", self.budget) < self.window:
            raise SpecError(f"budget: got {self.budget}; it includes the window: at least {self.window}")
        if check_size("kernel_size", self.kernel_size) % 2 == 0:
            raise SpecError(f"kernel_size: got {self.kernel_size}; must be odd, so that a row is in its middle")

    def keep(self, layer: int, given: PolicyInput) -> torch.Tensor:
        weights = _by_kv_head(given, "SnapKV")
        if weights.shape[1] < self.window:
            raise SpecError(f"weights: got those of {weights.shape[1]} queries; SnapKV needs {self.window}")
        seen = weights[:, -self.window :].sum(1)
        place = torch.arange(seen.shape[1], device=seen.device)
        before = place < (given.lengths.to(seen.device) - self.window).unsqueeze(1)  # the window takes no part
        if not before.any():  # pooling refuses what is empty
            return place < given.lengths.to(seen.device).unsqueeze(1)
        seen = F.avg_pool1d(seen.where(before, 0).unsqueeze(1), self.kernel_size, 1, self.kernel_size // 2)[:, 0]
        return _best_and_last(seen, given.lengths, self.budget - self.window, self.window)


def _by_kv_head(given: PolicyInput, policy: str) -> torch.Tensor:
    """Return the weights ``[H, n, S]``, query heads of a group added."""
    heads, rows, w = len(given.lengths), given.positions.shape[1], given.weights
    if not isinstance(w, torch.Tensor):
        raise SpecError(f"weights: got {brief(w)}; {policy} ranks rows by attention: give the queries, or the weights")
    if not w.is_floating_point() or w.ndim != 3 or not len(w) or len(w) % heads or w.shape[2] != rows:
        got = f"{w.dtype} of shape {tuple(w.shape)}"
        raise SpecError(f"weights: got {got}; must be floats [a multiple of {heads}, n, {rows}]")
    return w.view(heads, len(w) // heads, *w.shape[1:]).sum(1)


def _best_and_last(scores: torch.Tensor, lengths: torch.Tensor, best: int, last: int) -> torch.Tensor:
    """Return a mask ``[H, S]``: the last rows of each head, and of those before the ``best`` with the largest score,
    the earlier one where two are equal.
    """
    lengths = lengths.to(scores.device).unsqueeze(1)
    place = torch.arange(scores.shape[1], device=scores.device)
    before = place < lengths - last
    ranked = scores.masked_fill(~before, -torch.inf).sort(descending=True, stable=True, dim=1).indices[:, :best]
    chosen = torch.zeros_like(before).scatter_(1, ranked, True)
    return (chosen & before) | ((place < lengths) & ~before)
