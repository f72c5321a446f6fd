"""The suite of tiers on a dict: it shows that the suite asks for nothing that a tier without faults cannot do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from dict_tier import DictTier
from tier_suite import LARGEST, TierSuite

from kvmem.tiers import Tier


class TestDictTier(TierSuite):
    @pytest.fixture
    def make(self) -> Callable[..., Tier]:
        return lambda num_blocks=64: DictTier(num_blocks, LARGEST)
