"""A vLLM of another version, or none: one sentence that says what is gone and what to install."""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType

import pytest

import kvmem.integrations.vllm as plugin
from kvmem import SpecError


@pytest.fixture
def other_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name and a version, in which nothing is where it was."""
    fake = ModuleType("vllm")
    fake.__version__ = "9.9.9"  # type: ignore[attr-defined]
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    for name in ("connector", "offloading"):
        monkeypatch.delitem(sys.modules, f"kvmem.integrations.vllm.{name}", raising=False)


@pytest.mark.parametrize(
    ("module", "name"),
    [("connector", "KVConnectorBase_V1.get_mem_pool_context"), ("offloading", "OffloadingWorker.submit_store")],
)
@pytest.mark.usefixtures("other_vllm")
def test_another_version_is_refused_in_one_sentence(module: str, name: str) -> None:
    with pytest.raises(SpecError, match=rf"0\.32\.0.*9\.9\.9.*{name}.*pip install") as raised:
        importlib.import_module(f"kvmem.integrations.vllm.{module}")
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("other_vllm")
def test_the_entry_point_disturbs_no_other_version(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plugin, "_registered", False)
    with caplog.at_level(logging.WARNING, "kvmem"):
        plugin.register()
    assert "does not know kvmem's parts by name" in caplog.text and not plugin._registered


def test_the_entry_point_is_declared() -> None:
    from pathlib import Path

    text = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points."vllm.general_plugins"]\nkvmem = "kvmem.integrations.vllm:register"' in text
    assert callable(plugin.register) and "vllm==0.32.0" in text
