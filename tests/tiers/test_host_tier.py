"""The tier in a process's own memory: the suite of tiers, and what it tells of evictions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tier_suite import LARGEST, TierSuite, key_of, put

from kvmem.errors import SpecError
from kvmem.tiers import Tier
from kvmem.tiers.host import HostTier

pytestmark = pytest.mark.core


class TestHostTier(TierSuite):
    @pytest.fixture
    def make(self) -> Callable[..., Tier]:
        return lambda num_blocks=64: HostTier(capacity=num_blocks * 5056, block_bytes=LARGEST)


def test_what_was_evicted_is_told_once() -> None:
    tier = HostTier(capacity=64 * 3, block_bytes=60, tells_evicted=True)
    put(tier, {key_of(n): b"x" * 60 for n in range(5)})
    gone = tier.take_evicted()
    assert len(gone) == 2 and tier.take_evicted() == []
    assert [tier.contains([key_of(n)]) for n in range(5)] == [int(key_of(n) not in gone) for n in range(5)]
    tier.delete([key_of(4)])  # not for want of room
    put(tier, {key_of(4): b"y"})
    assert tier.take_evicted() == []


def test_less_than_a_block_is_refused() -> None:
    with pytest.raises(SpecError, match="one block takes 64 bytes"):
        HostTier(capacity=63, block_bytes=60)
