"""The worker process: it dies, hangs, is forked, is given nonsense, finds the disk full; never a hang, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from near_world import LocalStore, Text, difference

import kvmem
from kvmem import CacheSpec, Component, Group, SpecError, TierError
from kvmem.near import DiskAttention, HostAttention, SparF
from kvmem.near.page_file import Region

TEXT_TOKENS = 50


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiskAttention]:
    with DiskAttention(tmp_path_factory.mktemp("disk"), Text(0).spec, capacity="64KiB", k_channels_per_page=8) as disk:
        yield disk


def has_ended(pid: int) -> bool:
    """Whether the process has gone, and was waited for."""
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_in_the_middle_is_an_error_within_the_bound(how: int, tmp_path: Path) -> None:
    text = Text(TEXT_TOKENS)
    disk = DiskAttention(tmp_path, text.spec, capacity="1MiB", timeout_seconds=0.5)  # starting takes longer
    assert list(tmp_path.iterdir()) == []  # the file has no name
    disk.open(1)
    disk.append(0, [1], text.k, text.v)
    os.kill(disk.pid, signal.SIGSTOP)  # the call begins, and is not answered
    killer = threading.Timer(0.1, os.kill, (disk.pid, how))
    killer.start()
    start = time.monotonic()
    with pytest.raises(TierError, match="lost"):
        disk.attend(0, [1], text.q[:1])
    assert time.monotonic() - start < 20  # the bound, and what a loaded machine adds
    killer.join()
    assert has_ended(disk.pid)
    for call in (lambda: disk.open(2), lambda: disk.attend(0, [1], text.q[:1]), disk.used_pages):
        with pytest.raises(TierError, match="gone"):
            call()
    disk.close()
    disk.close()
    assert list(tmp_path.iterdir()) == []


OWNER = """
import os, sys, time
import torch, kvmem
from kvmem.near import DiskAttention
spec = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=16, dtype=torch.float32)
disk = DiskAttention(sys.argv[1], spec, capacity="1MiB")
disk.open(1)
pid = os.fork()
if pid == 0:  # a child has the socket too
    try:
        disk.open(2)
        os._exit(1)
    except kvmem.TierError as error:
        assert "belongs to process" in str(error)
    disk.close()
    time.sleep(60)
    os._exit(0)
disk.open(3)
assert disk.num_tokens(3, 0) == 0
print(disk.pid, pid, flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["killed", "ends"])
def test_the_worker_ends_with_its_owner_although_a_child_lives(how: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(kvmem.__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", "-c", OWNER, str(tmp_path), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as owner:
        assert owner.stdout is not None
        worker, child = (int(word) for word in owner.stdout.readline().split())
        owner.wait(60)
        try:
            end = time.monotonic() + 30
            while _runs(worker) and time.monotonic() < end:
                time.sleep(0.05)
            assert not _runs(worker) and _runs(child)
        finally:
            os.kill(child, signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def _runs(pid: int) -> bool:
    """A process that was not ours may stay as a zombie of init's."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_interrupted_call_ends_the_worker(tmp_path: Path) -> None:
    disk = DiskAttention(tmp_path, Text(0).spec, capacity="1MiB")
    os.kill(disk.pid, signal.SIGSTOP)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            disk.open(1)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert has_ended(disk.pid)
    with pytest.raises(TierError, match="gone"):
        disk.open(1)


def test_closing_ends_a_call_of_another_thread(tmp_path: Path) -> None:
    disk = DiskAttention(tmp_path, Text(0).spec, capacity="1MiB")
    pid, errors = disk.pid, list[Exception]()
    os.kill(pid, signal.SIGSTOP)

    def call() -> None:
        try:
            disk.open(1)
        except TierError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.1)
    disk.close()
    thread.join(20)
    assert len(errors) == 1 and has_ended(pid)


def test_a_place_that_nobody_has_any_more_ends_its_worker(tmp_path: Path) -> None:
    disk = DiskAttention(tmp_path, Text(0).spec, capacity="1MiB")
    pid = disk.pid
    del disk
    assert has_ended(pid)


def test_a_full_disk_refuses_and_nothing_has_changed(disk: DiskAttention) -> None:
    text = Text(200)
    disk.open(5)
    disk.append(0, [5], text.k[:40], text.v[:40])
    used = disk.used_pages()
    for call in (
        lambda: disk.append(0, [5], text.k, text.v),
        lambda: disk.attend(0, [5], text.q, text.k, text.v),
        lambda: disk.append(0, [5, 77], text.k[:40], text.v[:40]),  # 77 is not open: 5 takes back its rows
    ):
        with pytest.raises((TierError, SpecError), match="free sequences|not open"):
            call()
        assert disk.used_pages() == used and disk.num_tokens(5, 0) == 40
        assert difference(disk.attend(0, [5], text.q[39:40]), text.full(39, 40)) < 1e-6
    disk.free(5)
    assert disk.used_pages() == 0


def test_arguments_that_do_not_fit_change_nothing(disk: DiskAttention, backend: str) -> None:
    text = Text(TEXT_TOKENS)
    q, k, v = text.q[:2], text.k[:2], text.v[:2]
    disk.open(6)
    with kvmem.Allocator(
        text.spec, backend=backend, device="cpu", memory="1MiB", max_sequences=2, max_tokens=64
    ) as alloc:
        sequence, host = alloc.sequence(), HostAttention(alloc)
        sequence.extend(2)
        for place, one in ((disk, 6), (host, sequence)):
            wrong: list[tuple[Any, ...]] = [
                (9, [one], q), ("0", [one], q), (0, [one], q.long()), (0, [one], q[:, :3]), (0, [one], q[..., :5]),
                (0, [one], q[0]), (0, [one], None), (0, [one], q, k), (0, [one], q, k, v[:1]), (0, [one], q, k[:1], v[:1]),
                (0, [one], q, k[:, :1], v[:, :1]), (0, [one, one], q), (0, [], q), (0, [-1], q), (0, ["a"], q),
            ]  # fmt: skip
            for arguments in wrong:
                with pytest.raises((SpecError, kvmem.StaleHandle)):
                    place.attend(*arguments)
            for counts in ([1], [3], [1, 1], [-2], [2.0]):
                with pytest.raises(SpecError, match="counts"):
                    place.attend(0, [one], q, k, v, counts=counts)
            with pytest.raises(SpecError):
                place.attend(0, [one], q, k.numpy() if place is disk else np.zeros(3), v)
        assert sequence.num_committed_tokens == 0 and alloc.check() == []
    assert disk.num_tokens(6, 0) == 0
    for wrong_call in (
        lambda: disk.open(6), lambda: disk.open(-1), lambda: disk.free(99), lambda: disk.truncate(6, -1),
        lambda: disk.append(0, [6], k.double(), v.double()), lambda: disk.num_tokens(6, 5), lambda: SparF(0, 1),
        lambda: SparF(1, 2, recent=3), lambda: SparF(True, 1), lambda: SparF(1, 1, blend=1), lambda: HostAttention(None),
    ):  # fmt: skip
        with pytest.raises(SpecError):
            wrong_call()
    disk.free(6)


def test_specs_and_folders_that_do_not_work_are_refused(tmp_path: Path) -> None:
    def spec(k: Any, v: Any, **options: Any) -> CacheSpec:
        return CacheSpec(
            (Group("g", tuple(Component(n, **o) for n, o in (("k", k), ("v", v))), (0,), **options),), block_size=4
        )

    good = {"heads": 2, "width": 32, "dtype": torch.float32}
    for wrong in (
        None, spec(good, good, window_tokens=8), spec(good, {**good, "heads": 1}), spec(good, {**good, "dtype": torch.float16}),
        spec({**good, "dtype": torch.int8}, {**good, "dtype": torch.int8}), spec({**good, "width": ((16, 32),)}, good),
        spec({**good, "scope": "shared"}, good),
    ):  # fmt: skip
        with pytest.raises(SpecError, match="spec"):
            DiskAttention(tmp_path, wrong, capacity="1MiB")
    for options in ({"capacity": -1}, {"k_channels_per_page": 5}, {"k_channels_per_page": 0}, {"timeout_seconds": 0}):
        with pytest.raises(SpecError):
            DiskAttention(tmp_path, spec(good, good), **{"capacity": "1MiB", **options})
    with pytest.raises(SpecError, match="page of each head"):
        DiskAttention(tmp_path, spec(good, good), capacity=4096)
    with pytest.raises(SpecError, match="folder"):
        DiskAttention(None, spec(good, good), capacity=4096)
    with pytest.raises(TierError, match="cannot make a file"):
        DiskAttention(tmp_path / "absent", spec(good, good), capacity="1MiB")


@pytest.mark.parametrize("what", ["read", "write"])
def test_a_disk_that_fails_takes_back_the_step(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Text(60)
    store = LocalStore(text.spec, tmp_path)
    store.open(1)
    store.append(0, [1], text.k[:30], text.v[:30], counts=[30])

    def fail(self: Region, *_: object) -> None:
        raise TierError("the disk cannot be used")

    with monkeypatch.context() as patched:
        patched.setattr(Region, what, fail)
        for call in (
            lambda: store.attend(0, [1], text.q[30:32], text.k[30:32], text.v[30:32], counts=[2]),
            lambda: store.truncate(1, 20) if what == "read" else store.append(0, [1], text.k, text.v, counts=[60]),
        ):
            with pytest.raises(TierError):
                call()
    assert store.num_tokens(1, 0) == 30 and store.store.used_pages() == 2
    found = store.attend(0, [1], text.q[30:60], text.k[30:60], text.v[30:60], counts=[30])
    assert difference(found, text.full(30, 60)) < 1e-6
    store.close()


def test_k_and_v_of_different_widths(tmp_path: Path) -> None:
    text = Text(700, width=32, v_width=48)
    components = (
        Component("k", heads=2, width=32, dtype=torch.float32),
        Component("v", heads=2, width=48, dtype=torch.float32),
    )
    spec = CacheSpec((Group("g", components, (0,)),), block_size=4)
    with LocalStore(spec, tmp_path, channels_per_page=2) as store:
        store.open(1)
        assert difference(store.attend(0, [1], text.q, text.k, text.v), text.full(0, 700)) < 1e-6
        assert store.attend(0, [1], text.q[:1], sparse=SparF(8, 40)).out.shape == (1, 4, 48)
