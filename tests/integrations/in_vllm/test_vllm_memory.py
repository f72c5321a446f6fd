"""Memory under vLLM's KV cache: resident where it was touched, back at the system when blocks are released."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvmem import DeviceError, SpecError
from kvmem.integrations.vllm.memory import LazyMemory, Placement, lazy_memory
from kvmem.integrations.vllm.planner import Planner
from kvmem.tiers.keys import BlockKeys

pytestmark = pytest.mark.core

PAGE, OS = 12_288, 4096  # bytes of a layer's block: three pages of the system


def make(blocks: int = 64, layers: int = 2, page: int = PAGE) -> tuple[LazyMemory, torch.Tensor]:
    """Memory as vLLM makes it, and its bytes as [layers, blocks, page]."""
    memory = lazy_memory("cpu")
    with memory:
        kept = torch.zeros(8)  # what is no KV cache is made as ever
        tensor = torch.zeros(layers * blocks * page, dtype=torch.int8, device=torch.device("cpu"))
    assert kept.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    memory.place([Placement(i * blocks * page, page, page) for i in range(layers)] * 2, blocks)
    return memory, tensor.view(layers, blocks, page)


def test_random_blocks_are_written_and_released(rng: random.Random) -> None:
    """After each step, exactly the blocks in use are resident, and hold what was written to them."""
    memory, kv = make()
    assert memory.resident_bytes == 0
    in_use: dict[int, int] = {}
    for step in range(150):
        for block in rng.sample(range(64), rng.randint(0, 8)):
            in_use[block] = step % 100
            kv[:, block] = in_use[block]
        gone = rng.sample(sorted(in_use), rng.randint(0, len(in_use)))
        for block in gone:
            del in_use[block]
        assert memory.release_blocks(gone) == len(gone) * 2 * PAGE
        assert memory.resident_bytes == len(in_use) * 2 * PAGE
    for block in range(64):
        assert bool((kv[:, block] == in_use.get(block, 0)).all())


def test_blocks_that_share_a_page_of_the_system() -> None:
    """Of a block that is no whole number of pages, the pages that it has for itself go, and those between two released
    ones."""
    memory, kv = make(blocks=8, layers=1, page=OS + 1024)
    kv.fill_(7)
    whole = memory.resident_bytes
    memory.release_blocks([2])
    assert memory.resident_bytes == whole and bool((kv[0, [1, 3]] == 7).all())
    memory.release_blocks([5, 4, 3, 2, 2])
    assert memory.resident_bytes == whole - 4 * OS
    assert bool((kv[0, [0, 1, 6, 7]] == 7).all())


def test_interleaved_layers_are_released_block_by_block() -> None:
    memory = lazy_memory("cpu")
    with memory:
        kv = torch.zeros(16 * 3 * OS, dtype=torch.int8).view(16, 3, OS)
    memory.place([Placement(i * OS, 3 * OS, OS) for i in (0, 1)], 16)  # the third layer is another's
    kv.fill_(3)
    memory.release_blocks([1, 2])
    assert memory.resident_bytes == (16 * 3 - 4) * OS and bool((kv[1:3, 2] == 3).all()) and not bool(kv[1:3, :2].any())


def test_the_tensor_keeps_the_memory_and_its_end_gives_all_back() -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:kvmem")

    gc.collect()  # what other tests left
    before = mapped()
    memory, kv = make()
    kv.fill_(1)
    view = kv[1, 5]
    assert mapped() > before
    del memory, kv
    gc.collect()
    assert bool((view == 1).all())
    del view
    gc.collect()
    assert mapped() == before


def test_what_is_refused() -> None:
    with pytest.raises(SpecError, match='MemPool.*"memory": "vllm"'):
        lazy_memory("cuda")
    memory, _ = make(blocks=4)
    for bad in ([-1], [4], [0, 99]):
        with pytest.raises(SpecError, match="blocks are 0 to 3"):
            memory.release_blocks(bad)
    assert memory.release_blocks([]) == 0 and lazy_memory("cpu").release_blocks([1]) == 0
    with pytest.raises(DeviceError, match="a second KV cache"), memory:
        torch.zeros(4096, dtype=torch.int8)
    with pytest.raises(DeviceError, match="without torch.zeros"), lazy_memory("cpu"):
        torch.empty(4096, dtype=torch.int8)
    with pytest.raises(ZeroDivisionError), lazy_memory("cpu"):
        1 / 0  # noqa: B018  an error inside is not hidden
    with pytest.raises(SpecError, match="above 0"), lazy_memory("cpu"):
        torch.zeros(0, dtype=torch.int8)


class Manager:
    """A block manager of kvmem, as far as the planner asks it."""

    def __init__(self, answers: list[list[int]]) -> None:
        self.answers = answers

    def take_freed_blocks(self) -> list[int]:
        return self.answers.pop(0)


def released(planner: Planner, used: list[int] | None = None) -> list[int]:
    return planner.step({}, lambda _: None, used or []).released


def planner_of(manager: Any) -> Planner:
    from kvmem.integrations.vllm.blocks import Group

    planner = Planner([Group(4, 0, {"0": Placement(0, 8, 8)})], BlockKeys(b"", 4), [b"r" * 32])
    planner.bind(manager)
    return planner


def test_vllms_own_pool_is_swept_for_blocks_without_user_and_content() -> None:
    pool = [SimpleNamespace(ref_cnt=int(i == 0), block_hash=None) for i in range(600)]
    planner = planner_of(SimpleNamespace(block_pool=SimpleNamespace(blocks=pool)))
    for block in pool[1:500]:
        block.ref_cnt = 1
    assert released(planner, list(range(1, 500))) == [] and not planner.has_memory_to_release
    for i in range(1, 500):
        pool[i].ref_cnt = 0
        pool[i].block_hash = b"cached" if i % 2 else None
    planner.end("request")
    found: list[int] = []
    while planner.has_memory_to_release:  # some steps without work
        found += released(planner)
    assert set(found) - {500} == set(range(2, 500, 2))  # 500 is the free neighbour of 499
    for block in pool[1:]:
        block.block_hash = None  # reset_prefix_cache, with reset_connector; no request needs to come
    planner.reset()
    found = []
    while planner.has_memory_to_release:
        found += released(planner)
    assert set(range(1, 500, 2)) <= set(found) and 0 not in found


def test_kvmems_manager_is_asked_when_a_request_has_ended() -> None:
    manager = Manager([[], [4, 5], [6]])
    planner = planner_of(manager)
    assert manager.answers == [[4, 5], [6]]  # it counts from the binding on
    assert released(planner) == []
    planner.end("request")
    assert planner.has_memory_to_release and released(planner) == [4, 5] and not planner.has_memory_to_release
    assert [r for _ in range(64) if (r := released(planner))] == [[6]]  # windows and preemptions free blocks too
