"""The drivers' conformance suite on every driver: host, CUDA over its stand-in, CUDA on a GPU, each also checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from driver_conformance import *  # noqa: F403
from support_drivers import DEVICES, Device, open_device


@pytest.fixture(params=[pytest.param(d, marks=[pytest.mark.gpu] * d.endswith("cuda")) for d in DEVICES])
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Device]:
    opened, close = open_device(request.param, tmp_path)
    yield opened
    if opened.name.startswith("checked"):
        live = opened.driver.live()
        assert (live.reservations, live.pages, live.mappings) == (0, 0, 0), "the test left something behind"
    if opened.stub:
        held = opened.stub.held()
        assert (held["reservations"], held["allocations"], held["mappings"], held["physical_bytes"]) == (0, 0, 0, 0)
    if "host" in opened.name:
        assert opened.driver.physical_bytes() == 0
    close()
