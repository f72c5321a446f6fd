"""The list of foreign names, and what is said when one is gone: without vLLM."""

from __future__ import annotations

import types
from typing import Any

import pytest

from kvmem import SpecError
from kvmem.integrations.vllm import names
from kvmem.integrations.vllm.manager import BlockManager


class Caller:
    """As vLLM's scheduler calls its manager."""

    manager: Any
    other: Any

    def schedule(self) -> None:
        self.manager.allocate(self.manager.pool.size, self.manager.blocks)
        self.other.nothing()
        manager = self
        manager.manager.not_seen()


class Stand:
    blocks: list[int]
    pool: types.ModuleType
    anything: Any

    def allocate(self, a: int, *, b: int) -> None:
        """Nothing."""


def test_what_is_called_is_read_from_the_source() -> None:
    assert names.called_on(Caller, "manager") == {"allocate", "pool", "pool.size", "blocks"}


def test_what_an_object_offers() -> None:
    for name in ("allocate", "blocks", "anything.whatever", "pool.__name__", "blocks.append"):
        assert names.offers(Stand, name), name
    for name in ("free", "pool.size", "blocks.push"):
        assert not names.offers(Stand, name), name
    assert names.offers(BlockManager, "block_pool.free_blocks") and not names.offers(BlockManager, "block_pool.touch")


def test_arguments_that_are_not_taken() -> None:
    def theirs(self: Any, a: int, b: int = 0, c: int = 0) -> None:
        """Nothing."""

    assert names.missing_arguments(theirs, Stand.allocate) == ["c"]


def test_names_that_are_gone() -> None:
    there = ["json:loads", "json.decoder:JSONDecoder.decode"]
    gone = ["json:load_all", "json.decoder:JSONDecoder.gone.more", "no_such_module:name", "json.none:name"]
    assert names.missing_names([*there, *gone]) == gone


def test_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "vllm_version", lambda: "0.99.0")
    names.check_names("It", ["json:loads"])
    with pytest.raises(SpecError) as refused:
        names.check_names("It", ["json:loads", "json:gone"], unknown={"b", "a"})
    assert str(refused.value) == (
        f"It was made for vLLM {names.VERSION} and cannot run in 0.99.0: it has no `json:gone`; it uses `a`, `b`, which "
        f"kvmem does not have; {names.INSTALL}"
    )


def test_no_vllm_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(names.importlib, "import_module", absent)
    with pytest.raises(SpecError, match=rf"^vllm: not installed.*pip install vllm=={names.VERSION}"):
        names.vllm_version()
