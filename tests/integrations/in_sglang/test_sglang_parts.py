"""What needs no SGLang: keys, several tiers as one store with a deadline, pages of buffers, and the check of names."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support_sglang import DictTier, open_store

from kvmem.errors import SpecError, TierError
from kvmem.integrations.names import missing_arguments, missing_names
from kvmem.integrations.sglang.keys import PageKeys, Rank, fingerprint
from kvmem.integrations.sglang.names import LINKER, STORAGE, check_names
from kvmem.integrations.sglang.pages import PoolPages
from kvmem.integrations.sglang.store import ends_of_runs
from kvmem.integrations.tier_list import open_tiers
from kvmem.integrations.weights import weights_name
from kvmem.tiers.base import Result, Status
from kvmem.tiers.disk import DiskTier
from kvmem.tiers.host import HostTier

KEYS = [bytes([i]) * 32 for i in range(8)]


def views(count: int, fill: int = 0) -> list[memoryview]:
    return [memoryview(bytearray([fill + i] * 16)) for i in range(count)]


def test_keys_differ_in_all_that_bytes_depend_on() -> None:
    version = ["1"]
    ranks = {"kv": Rank(1, 2), "swa": Rank(1, 2).shared()}
    keys = PageKeys(fingerprint("model", ["float32"]), ranks, lambda: version[0])
    found = {*keys.of("kv", ["a", "b"]), *keys.of("swa", ["a"])}
    found.update(PageKeys(fingerprint("model", ["float16"]), ranks, lambda: "1").of("kv", ["a"]))
    for rank in (Rank(0, 2), Rank(1, 4), Rank(1, 2, 1, 2), Rank(1, 2, 0, 1, 1, 2)):
        found.update(PageKeys(fingerprint("model", ["float32"]), {"kv": rank}, lambda: "1").of("kv", ["a"]))
    version[0] = "2"
    found.update(keys.of("kv", ["a"]))
    assert len(found) == 9 and all(len(key) == 32 for key in found)
    version[0] = "1"
    assert set(keys.of("kv", ["a", "b"])) <= found, "and are the same each time"
    assert keys.of("kv", []) == []
    with pytest.raises(SpecError, match="'mamba'"):
        keys.of("mamba", ["a"])


def test_weights_of_a_folder_that_changes(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = weights_name(str(tmp_path), None)
    assert before == weights_name(str(tmp_path), None)
    (tmp_path / "model.safetensors").write_bytes(b"12")
    assert weights_name(str(tmp_path), None) != before
    assert weights_name("org/model", "main") == "org/model@main"


@pytest.fixture
def slow() -> Iterator[DictTier]:
    """A tier that does not answer until the test has ended."""
    tier, gate = DictTier(), threading.Event()
    tier.fault = lambda call, keys: gate.wait(20) and None
    yield tier
    gate.set()


def test_tiers_complete_each_other() -> None:
    first, second = DictTier(), DictTier()
    first.put(KEYS[0:1] + KEYS[2:3], views(2))
    second.put(KEYS[1:2] + KEYS[3:4], views(2, 7))
    store = open_store(first, second)
    assert store.leading(KEYS) == 4 and store.leading(KEYS[4:]) == 0 and store.leading([]) == 0
    assert store.present(KEYS) == [True] * 4 + [False] * 4
    buffers = views(5)
    assert [result.status for result in store.get(KEYS[:5], buffers)] == [Status.OK] * 4 + [Status.MISS]
    assert [bytes(buffer)[0] for buffer in buffers[:4]] == [0, 7, 1, 8]
    first.damage(KEYS[0])
    assert store.get(KEYS[:1], views(1))[0].status is Status.CORRUPT
    second.put(KEYS[:1], views(1, 5))
    assert store.get(KEYS[:1], buffers[:1])[0].ok and buffers[0][0] == 5, "the next tier has it whole"
    assert store.get(KEYS[:1], [memoryview(bytearray(17))])[0].status is Status.CORRUPT, "another length"
    assert all(result.ok for result in store.put(KEYS[2:6], views(4)))
    assert len(first.held) == 5 and len(second.held) == 6
    first.fault = lambda call, keys: Result(Status.FULL, 0, "full") if call == "put" else None
    assert store.put(KEYS[7:], views(1))[0].ok, "one tier has it"
    store.close()
    assert first.closed and store.get(KEYS[:1], views(1))[0].reason == "the tiers are closed"
    assert store.leading(KEYS) == 0 and store.put(KEYS, views(8))[0].status is Status.FAILED


def test_a_slow_tier_is_waited_for_once(slow: DictTier) -> None:
    fast = DictTier()
    fast.put(KEYS[:2], views(2))
    store = open_store(fast, slow)
    results = store.get(KEYS[:3], views(3))
    assert [result.status for result in results] == [Status.OK, Status.OK, Status.FAILED]
    assert "no answer to get within" in results[2].reason
    assert "has not been answered yet" in store.get(KEYS[2:3], views(1))[0].reason
    assert slow.calls.count("get") == 1, "it is left alone"
    assert store.leading(KEYS) == 2 and store.put(KEYS[:1], views(1))[0].ok
    store.close()


def test_no_other_tier_gets_a_buffer_that_a_late_one_may_write_to(slow: DictTier) -> None:
    fast = DictTier()
    fast.put(KEYS[:1], views(1, 5))
    store, buffers = open_store(slow, fast), views(1)
    assert store.get(KEYS[:1], buffers)[0].status is Status.FAILED
    assert fast.calls.count("get") == 0 and store.get(KEYS[:1], views(1))[0].ok, "the next call leaves the late one out"
    store.close()


@pytest.mark.parametrize("answer", [[], [None, None], None, 7])
def test_a_tier_that_answers_with_anything(answer: Any) -> None:
    tier, right = DictTier(), DictTier()
    right.put(KEYS[:2], views(2))
    tier.get = tier.put = tier.contains = lambda *given: answer  # type: ignore[method-assign]
    store = open_store(tier, right)
    assert all(result.ok for result in store.get(KEYS[:2], views(2)))
    assert "no answer for 1 keys" in store.get(KEYS[3:4], views(1))[0].reason
    assert store.put(KEYS[2:3], views(1))[0].ok
    assert store.leading(KEYS) == (8 if answer == 7 else 3) and len(store.present(KEYS)) == len(KEYS)


def test_ends_of_runs(rng: random.Random) -> None:
    for _ in range(200):
        there, window = [rng.random() < 0.7 for _ in range(rng.randint(0, 12))], rng.randint(1, 8)
        wanted = {end for end in range(1, len(there) + 1) if all(there[max(0, end - window) : end])}
        assert ends_of_runs(there, window) == wanted


def test_what_a_tier_raises_is_a_result() -> None:
    tier = DictTier()
    store = open_store(tier)

    def broken(call: str, keys: Any) -> None:
        raise TierError("gone")

    tier.fault = broken
    assert store.get(KEYS[:1], views(1))[0] == Result(Status.FAILED, 0, "dict: TierError: gone")
    assert store.put(KEYS[:1], views(1))[0].status is Status.FAILED and store.leading(KEYS) == 0
    store.close()


@pytest.mark.parametrize("span", [1, 4])
def test_pages_of_buffers(span: int) -> None:
    buffers = [torch.arange(19 * 6).view(19, 2, 3).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    pool = PoolPages([buffers[:1], buffers[1:]], {0: (0,), 5: (0,)}, span)
    assert pool.page_bytes == span * 6 * (4 + 2)
    pages = torch.tensor([3, 0])
    staging, before = pool.staging(2), [buffer.clone() for buffer in buffers]
    pool.gather(pages, staging)
    for buffer in buffers:
        buffer.zero_()
    pool.scatter(7, pages, staging)
    assert all((buffer == 0).all() for buffer in buffers), "no layer of this pool"
    pool.scatter(5, pages.flip(0), staging.flip(0))
    for buffer, was in zip(buffers, before, strict=True):
        there = torch.zeros(19, dtype=torch.bool)
        for page in (0, 3):
            there[page * span : (page + 1) * span] = True
        assert torch.equal(buffer[there], was[there]) and (buffer[~there] == 0).all()
    assert pool.form != PoolPages([buffers[1:], buffers[:1]], {0: (0,), 5: (0,)}, span).form


def test_buffers_that_have_no_pages() -> None:
    with pytest.raises(SpecError, match="cannot see as pages of 4 rows"):
        PoolPages([[torch.zeros(8, 6).T]], {0: (0,)}, 4)
    with pytest.raises(SpecError, match="cannot see as pages of 4 rows"):
        PoolPages([[torch.zeros(3, 6)]], {0: (0,)}, 4)


def test_tiers_by_configuration(tmp_path: Path) -> None:
    listed = [{"type": "host", "capacity": "1MiB"}, {"type": "disk", "path": str(tmp_path), "capacity": "1MiB"}]
    found = open_tiers(listed, rank="tp0of2", fingerprint=bytes(32), block_bytes=64)
    assert [type(tier) for tier in found] == [HostTier, DiskTier] and (tmp_path / "tp0of2").is_dir()
    for tier in found:
        tier.close()
    (own,) = open_tiers([{"type": "support_sglang:DictTier"}], rank="", fingerprint=bytes(32), block_bytes=64)
    assert isinstance(own, DictTier)
    for wrong, said in [
        ([], "must be a list"),
        ([{"type": "tape"}], "type is host, disk"),
        ([{"type": "host", "capacity": 1}, {"type": "host", "capacity": 1}], "two of type host"),
        ([{"type": "host", "size": 1}], "size"),
        ([{"type": "nothing_here:Tier"}], "nothing_here"),
        ([{"type": "pathlib:Path"}], "is no kvmem.tiers.Tier"),
        ([{"type": "disk", "capacity": "1MiB"}], "path"),
    ]:
        with pytest.raises(SpecError, match=said):
            open_tiers(wrong, rank="r", fingerprint=bytes(32), block_bytes=64)


class Theirs:
    field: int
    __abstractmethods__ = frozenset({"load"})

    def load(self, rid: str, transfers: list[Any]) -> bool:
        raise NotImplementedError


def test_names_that_are_gone() -> None:
    here = f"{__name__}:Theirs"
    assert missing_names([f"{here}.field", f"{here}.load", "os:path.join"]) == []
    assert missing_names([f"{here}.store", "os:nothing", "nothing.here:x"]) == [
        f"{here}.store",
        "os:nothing",
        "nothing.here:x",
    ]
    assert missing_arguments(Theirs.load, lambda self, rid: None) == ["transfers"]

    class Older:
        def load(self, rid: str) -> bool:
            return False

    with pytest.raises(
        SpecError, match=r"cannot run in .*has no `os:nothing`; it calls `Theirs.load` with transfers, .*pip install"
    ):
        check_names(("os:nothing",), Older, Theirs)
    check_names(("os:path.join",), Theirs, Theirs)
    assert len(set(LINKER)) == len(LINKER) > 30 and len(set(STORAGE)) == len(STORAGE) > 30
