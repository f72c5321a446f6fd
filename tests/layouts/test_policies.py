"""Policies on small numbers, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import kvmem
from kvmem.layouts.policies import Gate, HeavyHitter, Policy, PolicyInput, SinkAndWindow, SnapKV, any_of_group, apply

EVEN = Gate("a", lambda layer, given: given.positions % 2 == 0)


def held(positions: list[list[int]], weights: Any = None) -> PolicyInput:
    at, rows = torch.tensor(positions), torch.zeros(len(positions), len(positions[0]), 4)
    weights = None if weights is None else torch.tensor(weights).float()
    return PolicyInput(rows, rows, at, (at >= 0).sum(1), int(at.max()) + 1, weights)


def kept(policy: Policy, given: PolicyInput) -> list[list[int]]:
    mask = policy.keep(0, given)
    assert mask.dtype == torch.bool and mask.shape == given.positions.shape
    assert torch.equal(mask, policy.keep(0, given)), "pure"
    return [[i for i in range(int(n)) if head[i]] for head, n in zip(mask.tolist(), given.lengths, strict=True)]


def test_sink_and_window_go_by_true_positions() -> None:
    given = held([[0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 5, 6, 7, -1, -1, -1], [-1] * 8])
    assert kept(SinkAndWindow(3, sinks=2), given) == [[0, 1, 5, 6, 7], [0, 2, 3, 4], []]
    assert kept(SinkAndWindow(1, sinks=0), replace(given, num_tokens=9)) == [[], [], []]
    assert kept(SinkAndWindow(99), given) == [list(range(8)), list(range(5)), []]


def test_heavy_hitters_are_sums_over_queries_and_the_group() -> None:
    """Two query heads of each KV head; the second KV head has three rows. The sums are 2 4 4 1 36 and 5 6 7."""
    first = [[[1, 0, 2, 0, 9], [1, 4, 0, 0, 9]], [[0, 0, 2, 1, 9], [0, 0, 0, 0, 9]]]
    second = [[[5, 0, 0, 0, 0], [0, 0, 0, 0, 0]], [[0, 6, 0, 0, 0], [0, 0, 7, 0, 0]]]
    given = held([[0, 1, 2, 3, 4], [0, 2, 3, -1, -1]], first + second)
    assert kept(HeavyHitter(heavy=1, recent=1), given) == [[1, 4], [1, 2]], "of equal ones the earlier"
    assert kept(HeavyHitter(heavy=2, recent=0), given) == [[1, 4], [1, 2]]
    assert kept(HeavyHitter(heavy=2, recent=2), given) == [[1, 2, 3, 4], [0, 1, 2]]
    assert kept(HeavyHitter(heavy=0, recent=0), given) == [[], []]
    summed = replace(given, weights=given.weights.sum(1, keepdim=True))
    assert kept(HeavyHitter(1, 1), summed) == [[1, 4], [1, 2]], "sums that a caller kept"


def test_snapkv_pools_what_the_window_looks_at() -> None:
    weights = [[[9, 9, 9, 9, 9, 9, 9, 9], [0, 0, 6, 0, 0, 4, 50, 0], [0, 0, 0, 0, 0, 0, 0, 60]]]
    given = held([list(range(8))], weights)  # the last 2 queries; before the window 0 0 6 0 0 4
    assert kept(SnapKV(budget=4, window=2, kernel_size=1), given) == [[2, 5, 6, 7]]
    assert kept(SnapKV(budget=5, window=2, kernel_size=3), given) == [[1, 2, 3, 6, 7]], "the window is not pooled"
    assert kept(SnapKV(budget=2, window=2), given) == [[6, 7]]
    assert kept(SnapKV(budget=20, window=2), given) == [list(range(8))]
    short = held([[3, 4, -1], [0, 1, 2]], [[[1, 2, 0], [1, 2, 0]], [[8, 2, 1], [0, 0, 1]]])
    assert kept(SnapKV(budget=2, window=1, kernel_size=1), short) == [[0, 1], [0, 2]]
    nothing = replace(held([[-1], [-1]]), positions=torch.zeros(2, 0), weights=torch.zeros(2, 1, 0), num_tokens=0)
    for policy in (SnapKV(budget=2, window=1), HeavyHitter(1, 1), SinkAndWindow(1)):
        assert kept(policy, nothing) == [[], []], "a layer that is still empty"


def test_a_gate_by_query_head_is_reduced_with_or() -> None:
    given = held([[0, 1, 2], [0, 1, 2]])
    flags = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.1, 0.6], [0.0, 0.7, 0.0], [0.0, 0.8, 0.0]])
    assert kept(Gate("a", lambda layer, seen: flags), given) == [[0, 2], [1]]
    assert kept(Gate("a", lambda layer, seen: flags, threshold=0.75), given) == [[0], [1]]
    assert kept(EVEN, given) == [[0, 2], [0, 2]]
    assert any_of_group(torch.tensor([[True], [False], [False]]), 3).tolist() == [[True], [False], [False]]


def test_fingerprints_part_what_decides_differently() -> None:
    policies = [SinkAndWindow(4), SinkAndWindow(5), SinkAndWindow(4, sinks=5), HeavyHitter(4, 4), HeavyHitter(5, 4)]
    policies += [SnapKV(40), SnapKV(40, kernel_size=7), EVEN, replace(EVEN, name="b"), replace(EVEN, threshold=0.4)]
    assert len({policy.fingerprint for policy in policies}) == len(policies)
    assert SinkAndWindow(4).fingerprint == SinkAndWindow(4, sinks=4).fingerprint
    spec = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=8, dtype=torch.float32)
    alloc = kvmem.Allocator(spec, backend="paged", device="cpu", memory="1MiB", max_sequences=4, max_tokens=64)
    with alloc.sequence(list(range(33)), adapter=EVEN.fingerprint) as seq:
        seq.step(33), seq.commit(list(range(33)))
    found = [alloc.match(list(range(33)), adapter=one.fingerprint).num_tokens for one in (EVEN, policies[0])]
    assert found == [32, 0], "KV of one policy is no hit for another"


def gate(found: Any) -> torch.Tensor:
    return Gate("a", lambda layer, given: found).keep(0, held([[0], [0]]))


REFUSED = [
    (lambda: SinkAndWindow(0), "window_tokens: got 0"),
    (lambda: HeavyHitter(-1, 4), "heavy: got -1"),
    (lambda: SnapKV(16), "budget: got 16; it includes the window: at least 32"),
    (lambda: SnapKV(64, kernel_size=4), "kernel_size: got 4; must be odd"),
    (lambda: Gate("", lambda layer, given: None), "name: got ''"),
    (lambda: Gate("a", None), "gate: got None"),
    (lambda: HeavyHitter(1, 1).keep(0, held([[0, 1]])), "weights: got None; HeavyHitter ranks rows by attention"),
    (lambda: SnapKV(2, 2).keep(0, held([[0, 1]], [[[1, 1]]])), "weights: got those of 1 queries; SnapKV needs 2"),
    (lambda: SnapKV(2, 1).keep(0, held([[0, 1]], [[[1]]])), r"weights: got torch.float32 of shape \(1, 1, 1\)"),
    (lambda: HeavyHitter(1, 1).keep(0, replace(held([[0]]), weights=torch.ones(0, 1, 1))), r"weights: .* \(0, 1, 1\)"),
    (lambda: HeavyHitter(1, 1).keep(0, replace(held([[0]]), weights=torch.ones(1, 1, 1).int())), "got torch.int32 of"),
    (lambda: HeavyHitter(1, 1).keep(0, replace(held([[0]]), weights=3)), "weights: got 3; HeavyHitter ranks"),
    (lambda: gate(torch.ones(3, 2)), r"keep: got torch.bool of shape \(3, 2\)"),
    (lambda: gate(torch.ones(2, 1).int()), "keep: got torch.int32 of .*must be torch.bool"),
    (lambda: gate(None), "keep: got None"),
    (lambda: Gate("a", lambda layer, given: None, threshold=float("nan")), "threshold: got nan; must be a number"),
    (lambda: any_of_group(torch.ones(4, 2), 2), "keep: got torch.float32"),
    (lambda: any_of_group(torch.ones(4, 2).bool(), 0), "num_kv_heads: got 0"),
    (lambda: apply(SinkAndWindow, None, 0), "policy, sequence: got .*SinkAndWindow.* and None; must be a policy"),
    (lambda: apply(SinkAndWindow(1), None, 0), "policy, sequence: got SinkAndWindow.* and None"),
]


@pytest.mark.parametrize(("make", "match"), REFUSED)
def test_what_is_refused(make: Any, match: str) -> None:
    with pytest.raises(kvmem.SpecError, match=match):
        make()
