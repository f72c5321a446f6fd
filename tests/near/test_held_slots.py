"""Blocks that the device has evicted are attended in their host slots, which nothing reuses meanwhile."""

from __future__ import annotations

import gc
import random
import threading
from typing import Any

import pytest
import torch
from near_world import Text, difference, filled

import kvmem
from kvmem import CacheSpec, Component, Group, SpecError, StaleHandle
from kvmem.kernels.write import write_kv
from kvmem.near import HostAttention, SparF, merge
from kvmem.tiers import Tiers

PROMPT = list(range(61))


def evicted(
    text: Text, backend: str, *, interleave: Any = "all", host_blocks: int = 20, keep: int = 0
) -> kvmem.Allocator:
    """An allocator whose host slots have the prompt's blocks, but for the first ``keep``, which the device has."""
    spec = text.spec
    alloc = kvmem.Allocator(
        spec, backend=backend, device="cpu", memory="1MiB", page_bytes=4096, max_sequences=4, max_tokens=128,
        interleave=interleave, tiers=Tiers(host=host_blocks * spec.bytes_per_token * 4), debug=True,
    )  # fmt: skip
    with alloc.sequence(PROMPT) as sequence:
        sequence.extend(len(PROMPT))
        for layer in range(2):
            write_kv(
                alloc.kv(layer), alloc.batch([sequence]), text.k[: len(PROMPT)] + layer, text.v[: len(PROMPT)] - layer
            )
        sequence.commit(PROMPT)
    alloc.core.clear_cache()
    if keep:
        alloc.prefetch(PROMPT[: keep * 4]).wait()
    return alloc


@pytest.mark.parametrize("interleave", ["all", 1, "none"])
def test_slots_and_device_together_are_the_whole(backend: str, interleave: Any) -> None:
    text = Text(70)
    with evicted(text, backend, interleave=interleave, keep=3) as alloc:
        host, layer = HostAttention(alloc), 1
        with alloc.hold([*PROMPT, 500]) as held:
            assert (held.first_token, held.num_tokens) == (12, 48)
            part = host.attend(layer, [held], text.q[69:] - 0.5)
            with pytest.raises(SpecError, match="nothing is appended"):
                host.attend(layer, [held], text.q[69:], text.k[69:], text.v[69:])
            with pytest.raises(SpecError, match="apart"):
                host.attend(layer, [held, alloc.sequence()], text.q[68:])
        text.k, text.v, text.q = text.k + layer, text.v - layer, text.q - 0.5
        prefix = alloc.sequence(PROMPT[:13], load="device")
        assert prefix.num_cached_tokens == 12
        rest = filled(alloc, text, list(range(60, 69)), layer=layer)
        rest.extend(1)
        parts = [
            host.attend(layer, [prefix], text.q[69:]),
            part,
            host.attend(layer, [rest], text.q[69:], text.k[69:], text.v[69:]),
        ]
        assert difference(merge(parts), text.full(69, 70)) < 1e-6
        assert alloc.tiering.counters["host"] == 3  # nothing else came back


def test_held_slots_survive_pressure_clearing_and_closing(backend: str, rng: random.Random) -> None:
    text = Text(len(PROMPT))
    alloc = evicted(text, backend, host_blocks=16)
    host, held = HostAttention(alloc), alloc.hold(PROMPT)
    assert held.num_tokens == 60
    before = host.attend(0, [held], text.q[:1])
    assert difference(before, HostAttention(alloc).attend(0, [alloc.sequence(PROMPT)], text.q[:1])) < 1e-6  # promoted
    for round in range(20):  # other content wants the slots
        other = [1000 + 100 * round + rng.randrange(50) for _ in range(40)]
        with alloc.sequence(other) as sequence:
            sequence.extend(40)
            write_kv(alloc.kv(0), alloc.batch([sequence]), torch.zeros(40, 2, 32), torch.zeros(40, 2, 32))
            sequence.commit(other)
        alloc.core.clear_cache()
        assert alloc.check() == []
    alloc.clear_cache()
    assert difference(host.attend(0, [held], text.q[:1]), before) == 0
    assert alloc.core.free_slots(0) == 1  # 15 of 16 are held
    alloc.close()
    assert difference(host.attend(0, [held], text.q[:1]), before) == 0
    held.release()
    held.release()
    with pytest.raises(SpecError, match="released"):
        host.attend(0, [held], text.q[:1])
    with pytest.raises(StaleHandle):
        alloc.hold(PROMPT)


def test_a_hold_that_nobody_has_any_more_ends(backend: str) -> None:
    with evicted(Text(70), backend) as alloc:
        held = alloc.hold(PROMPT)
        assert held.num_tokens == 60
        alloc.clear_cache()
        assert alloc.core.free_slots(0) == 5
        del held
        gc.collect()
        alloc.tiering.settle()
        assert alloc.core.free_slots(0) == 20 and alloc.check() == []


def test_nothing_to_hold(backend: str) -> None:
    text = Text(70)
    with evicted(text, backend) as alloc:
        for tokens in ([], [7, 7, 7], [5] * 40):
            with alloc.hold(tokens) as held:
                assert (held.num_tokens, held.first_token) == (0, 0)
                part = HostAttention(alloc).attend(0, [held], text.q[:2])
                assert (part.lse == -torch.inf).all() and (part.out == 0).all()
    alloc = kvmem.Allocator(text.spec, backend=backend, memory="1MiB", max_sequences=1, max_tokens=64)
    with alloc, pytest.raises(SpecError, match="tiers"):
        alloc.hold(PROMPT)


def test_sparf_over_slots_is_that_over_a_sequence(backend: str) -> None:
    text, sparse = Text(70), SparF(8, 12)
    with evicted(text, backend) as alloc, alloc.hold(PROMPT) as held:
        host = HostAttention(alloc)
        twice = [host.attend(0, [held], text.q[:2], sparse=sparse) for _ in range(2)]
        sequence = filled(alloc, text, list(range(60)), layer=0)
        assert difference(twice[0], host.attend(0, [sequence], text.q[:2], sparse=sparse)) < 1e-6
        assert difference(*twice) == 0 and not twice[0].exact


def test_attending_while_other_threads_evict(backend: str) -> None:
    text = Text(len(PROMPT))
    with evicted(text, backend, host_blocks=18) as alloc:
        errors: list[BaseException] = []
        held, done = alloc.hold(PROMPT), threading.Event()

        def churn() -> None:
            try:
                for round in range(30):
                    with alloc.sequence([round] * 9) as sequence:
                        sequence.extend(9)
                        sequence.commit([round] * 9)
                    alloc.clear_cache()
            except Exception as error:  # noqa: BLE001  # of a thread: looked at below
                errors.append(error)
            finally:
                done.set()

        thread = threading.Thread(target=churn)
        thread.start()
        host, expected = HostAttention(alloc), None
        while expected is None or not done.is_set():
            part = host.attend(1, [held], text.q[:2])
            assert expected is None or part.out.equal(expected)
            expected = part.out
        thread.join()
        held.release()
        assert not errors and alloc.check() == []


def test_slots_of_every_group_and_layer(backend: str) -> None:
    """Groups of unequal rows and block sizes, with a window and a state between them: the bytes of each are found."""

    def kv(width: int) -> tuple[Component, ...]:
        return tuple(Component(name, heads=2, width=width, dtype=torch.float32) for name in "kv")

    state = Component("state", heads=1, width=40, dtype=torch.float32, growth="fixed")
    groups = (
        Group("a", kv(16), (0, 2), block_size=4), Group("w", kv(8), (1,), window_tokens=5, block_size=4),
        Group("s", (state,), (3,)), Group("b", kv(24), (4, 5), block_size=8),
    )  # fmt: skip
    spec, tokens = CacheSpec(groups, block_size=4), list(range(33))
    rows = {
        layer: (torch.randn(33, 2, width), torch.randn(33, 2, width))
        for layer, width in ((0, 16), (2, 16), (4, 24), (5, 24), (1, 8))
    }
    alloc = kvmem.Allocator(
        spec, backend=backend, device="cpu", memory="1MiB", page_bytes=4096, max_sequences=2, max_tokens=64,
        tiers=Tiers(host="256KiB"), interleave=1, debug=True,
    )  # fmt: skip
    with alloc, alloc.sequence(tokens) as sequence:
        sequence.extend(33)
        batch = alloc.batch([sequence])
        for layer, (k, v) in rows.items():
            write_kv(alloc.kv(layer), batch.group(spec.group_of(layer, "k")), k, v)
        sequence.commit(tokens)
        sequence.free()
        alloc.core.clear_cache()
        with alloc.hold(tokens) as held:
            assert held.num_tokens == 32
            for layer in (0, 2, 4, 5):
                found = held.blocks(spec, layer)
                for stored, expected in zip(found[:2], rows[layer], strict=True):
                    assert stored[found[2]].flatten(0, 1).equal(expected[:32])
            for layer in (1, 3):
                with pytest.raises(SpecError):
                    HostAttention(alloc).attend(layer, [held], torch.zeros(1, 2, 8))
