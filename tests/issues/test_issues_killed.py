"""A client that is killed in the middle of a store, beside another: real processes over one folder, and one redis-server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from remote_servers import free_port, redis_command, running
from support import LONG

KILLS = 40 if LONG else 2
HAS_REDIS = shutil.which("redis-server") is not None


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How many kills each store and backend stood, or a traceback."""
    program, port = Path(__file__).parent / "killed_clients.py", free_port() if HAS_REDIS else 0
    folder, seed = tmp_path_factory.mktemp("killed"), request.config.getoption("--seed")
    with running(redis_command("redis", port), port) if HAS_REDIS else nullcontext():
        done = subprocess.run(
            [sys.executable, program, folder, str(port), str(KILLS), str(seed)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            check=False,
            timeout=100,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"said": done.stderr}  # type: ignore[no-any-return]


@pytest.mark.parametrize("store", ["disk", "redis"])
def test_a_client_that_is_killed_while_it_stores(store: str, backend: str, outcomes: dict[str, Any], seed: int) -> None:
    """LMCache#4676: a client died in a store, the server deadlocked, and its memory never came back. Here a client is
    killed with a record half written: the other goes on with right bytes, and every byte of the store serves again."""
    if store == "redis" and not HAS_REDIS:
        pytest.skip("no redis-server: apt-get install redis-server")
    assert outcomes[f"{store} {backend}"] == KILLS, f"{outcomes[f'{store} {backend}']}\n{outcomes['said']}"
