"""A sequence that is split over device, host and disk gives what full attention gives: every split, empty parts too."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import permutations

import pytest
import torch
from near_world import TOLERANCE, Text, difference, filled

import kvmem
from kvmem.near import DiskAttention, HostAttention, Near, Part, merge


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiskAttention]:
    spec = Text(0, dtype=request.param).spec
    with DiskAttention(tmp_path_factory.mktemp("disk"), spec, capacity="4MiB", k_channels_per_page=2) as disk:
        yield disk


def open_host(text: Text, backend: str) -> kvmem.Allocator:
    return kvmem.Allocator(text.spec, backend=backend, device="cpu", memory="4MiB", max_sequences=8, max_tokens=512)


@pytest.mark.parametrize("group", [1, 4])
def test_every_split_of_a_sequence(disk: DiskAttention, backend: str, group: int, rng: random.Random) -> None:
    """Ranges of any length, 0 included, in any of the places; the new tokens in the one that has the last range."""
    for order in permutations(range(3)):
        text = Text(rng.randint(1, 150), group=group, dtype=disk.spec.groups[0].components[0].dtype)
        total = len(text.k)
        new = rng.randint(1, min(5, total))
        cuts = sorted(rng.choice([0, total - new, rng.randint(0, total - new)]) for _ in range(2))
        ranges = [range(0, cuts[0]), range(cuts[0], cuts[1]), range(cuts[1], total - new)]
        with open_host(text, backend) as device, open_host(text, backend) as host:
            disk.open(1)
            parts = []
            for place, tokens in zip(order, ranges, strict=True):
                tier: Near = [HostAttention(device), HostAttention(host), disk][place]
                rows = [text.k[total - new :], text.v[total - new :]] if tokens is ranges[-1] else []
                if place == 2:
                    disk.append(1, [1], text.k[tokens], text.v[tokens])
                    sequence = 1
                else:
                    sequence = filled([device, host][place], text, list(tokens))
                    sequence.extend(new if rows else 0)
                parts.append(tier.attend(1, [sequence], text.q[total - new :], *rows))
                assert (parts[-1].lse == -torch.inf).all() == (not tokens and not rows)
            disk.free(1)
        for some in permutations(parts):
            assert difference(merge(some), text.full(total - new, total)) <= TOLERANCE[text.dtype]


def test_several_sequences_of_different_lengths_in_one_call(
    disk: DiskAttention, backend: str, rng: random.Random
) -> None:
    texts = [Text(rng.randint(5, 90), dtype=disk.spec.groups[0].components[0].dtype) for _ in range(3)]
    new = [0, 1, 4]
    first = [len(text.k) - count for text, count in zip(texts, new, strict=True)]
    q, k, v = (torch.cat([getattr(t, name)[at:] for t, at in zip(texts, first, strict=True)]) for name in "qkv")
    expected = [text.full(at, len(text.k)) for text, at in zip(texts, first, strict=True)]
    whole = Part(*(torch.cat(x) for x in list(zip(*expected, strict=True))[:2]))
    for number, text in enumerate(texts):
        disk.open(number)
        disk.append(0, [number], text.k[: first[number]], text.v[: first[number]])
    assert difference(disk.attend(0, [0, 1, 2], q, k, v, counts=new), whole) <= TOLERANCE[q.dtype]
    for number in range(3):
        disk.free(number)
    with open_host(texts[0], backend) as alloc:
        sequences = [filled(alloc, text, list(range(at))) for text, at in zip(texts, first, strict=True)]
        for sequence, count in zip(sequences, new, strict=True):
            sequence.extend(count)
        host = HostAttention(alloc)
        assert difference(host.attend(1, sequences, q, k, v, counts=new), whole) <= TOLERANCE[q.dtype]
        empty = host.attend(1, [], q[:0])
        assert empty.out.shape == (0, *q.shape[1:]) and empty.lse.shape == q[:0, :, 0].shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_lse_of_halves_is_float32(backend: str, dtype: torch.dtype, tmp_path: object) -> None:
    text = Text(40, dtype=dtype)
    with open_host(text, backend) as alloc:
        found = HostAttention(alloc).attend(1, [filled(alloc, text, list(range(40)))], text.q[-1:])
    assert found.out.dtype == dtype and found.lse.dtype == torch.float32
    assert difference(found, text.full(39, 40)) < (2e-3 if dtype == torch.float16 else 2e-2)
    halves = [Part(torch.zeros(1, 4, 32, dtype=dtype), torch.zeros(1, 4)), found]
    assert merge(halves).out.dtype == dtype and merge(halves).lse.dtype == torch.float32
