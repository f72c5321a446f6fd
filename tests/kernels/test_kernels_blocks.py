"""Gathers, copies and zeroing of many blocks in one launch: the same truths for torch and for Triton.

Triton's kernels run in its interpreter, which has to be chosen before Triton is imported. So this file runs itself again in
a process of its own, with ``TRITON_INTERPRET=1``; there, and on a GPU, every test below is about Triton.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import one_thread

import kvmem
from kvmem.kernels import blocks as ops

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WAYS = (
    [pytest.param(("cpu", "triton"), id="triton interpreted")]
    if INTERPRETED
    else [
        pytest.param(("cpu", "torch"), id="torch"),
        pytest.param(("cuda", "torch"), id="torch on a GPU", marks=pytest.mark.gpu),
        pytest.param(("cuda", "triton"), id="triton on a GPU", marks=pytest.mark.gpu),
    ]
)
every_way = pytest.mark.parametrize("way", WAYS)
#: Rows of 32, 24 (padded to 32), 28 (padded), 96 and 5 (padded to 16) bytes, so that words of every width are met.
SHAPES = {
    "fp16": (torch.float16, 2, 8), "uint8": (torch.uint8, 3, 8), "fp8": (torch.float8_e4m3fn, 4, 7),
    "fp32": (torch.float32, 2, 12), "narrow": (torch.uint8, 1, 5),
}  # fmt: skip
LAYERS, SIZE, LENGTHS = 3, 4, (9, 4, 18)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes, for tests of equality that NaN passes; a copy on the CPU."""
    plain = tensor.as_subclass(torch.Tensor)
    return plain.contiguous().view(torch.uint8).cpu()


class World:
    """Three sequences, whose blocks alternate, with random bytes in every layer; a fourth has gone from between them."""

    def __init__(
        self, way: tuple[str, str], seed: int, shape: str = "fp16", backend: str = "paged",
        interleave: int | str = "all", window_tokens: int | None = None,
    ) -> None:  # fmt: skip
        self.device, self.impl = way
        dtype, heads, width = SHAPES[shape]
        spec = kvmem.CacheSpec.kv(
            num_layers=LAYERS, num_kv_heads=heads, head_dim=width, dtype=dtype, block_size=SIZE,
            window_tokens=window_tokens,
        )  # fmt: skip
        host = {"page_bytes": 4096} if self.device == "cpu" else {}
        self.alloc = kvmem.Allocator(
            spec, backend=backend, device=self.device, memory="64MiB", max_sequences=8, max_tokens=4096,
            interleave=interleave, **host,
        )  # fmt: skip
        self.random = np.random.default_rng(seed)
        self.seqs = [self.alloc.sequence() for _ in LENGTHS]
        gap = self.alloc.sequence()
        for seq, length in zip(self.seqs, LENGTHS, strict=True):
            for _ in range(length):
                seq.extend(1)
                seq.commit(count=1)
            gap.extend(700)
        gap.free()
        self.alloc.trim()  # and with it the pages of the gap: whoever touches more than was asked for dies
        for layer, name in self.places:
            for seq in self.seqs:
                self.put(layer, name, seq, self.bytes(self.held(seq)))

    @property
    def places(self) -> list[tuple[int, str]]:
        return [(layer, name) for layer in range(LAYERS) for name in "kv"]

    def held(self, seq: kvmem.Sequence) -> int:
        return seq.num_tokens - self.alloc.core.first_token(seq.id, 0)

    def bytes(self, *lead: int) -> torch.Tensor:
        """Random bytes as tokens of the cache's dtype."""
        tensor = self.alloc.tensor(0, "k")
        made = torch.from_numpy(self.random.integers(0, 256, (*lead, tensor[0, 0].nbytes), np.uint8))
        return made.view(tensor.dtype).view(*lead, *tensor.shape[2:]).to(self.device)

    def slots(self, seq: kvmem.Sequence) -> list[tuple[int, int]]:
        """(block, offset) of each token held, from the block table."""
        table = self.alloc.batch([seq]).block_table[0].tolist()
        first = self.alloc.core.first_token(seq.id, 0)
        return [(table[i // SIZE], i % SIZE) for i in range(first, seq.num_tokens)]

    def put(self, layer: int, name: str, seq: kvmem.Sequence, values: torch.Tensor) -> None:
        tensor = self.alloc.tensor(layer, name)
        for (block, offset), value in zip(self.slots(seq), values, strict=True):
            tensor[block, offset].view(torch.uint8).copy_(value.view(torch.uint8))

    def read(self, layer: int, name: str, seq: kvmem.Sequence) -> torch.Tensor:
        tensor = self.alloc.tensor(layer, name)
        return torch.stack([raw(tensor[block, offset]) for block, offset in self.slots(seq)])

    def all(self) -> dict[tuple[int, str, int], torch.Tensor]:
        return {(*place, seq.id): self.read(*place, seq) for place in self.places for seq in self.seqs}

    def blocks(self) -> list[int]:
        """Whole blocks that the sequences hold."""
        tables = [self.alloc.batch([seq]).block_table[0, : len(self.slots(seq)) // SIZE].tolist() for seq in self.seqs]
        return [block for table in tables for block in table]


KINDS = [
    ("fp16", "paged", "all"), ("fp16", "virtual", 1), ("uint8", "paged", 1), ("fp8", "paged", 2), ("fp32", "virtual", "all"),
    ("narrow", "paged", 1),
]  # fmt: skip


@every_way
@pytest.mark.parametrize(("shape", "backend", "interleave"), KINDS)
def test_tokens_come_and_go(way: tuple[str, str], shape: str, backend: str, interleave: int | str, seed: int) -> None:
    world = World(way, seed, shape, backend, interleave)
    alloc, impl = world.alloc, world.impl
    before = world.all()
    batch = alloc.batch(world.seqs)
    slots = ops.batch_slots(batch)
    assert slots.tolist() == [block * SIZE + i for seq in world.seqs for block, i in world.slots(seq)]
    for layer, name in [(0, "k"), (1, "v"), (2, "k")]:
        tensor = alloc.tensor(layer, name)
        packed = ops.gather_tokens(tensor, slots, impl=impl)
        assert packed.is_contiguous() and packed.shape == (sum(LENGTHS), *tensor.shape[2:])
        assert torch.equal(raw(packed), torch.cat([before[layer, name, seq.id] for seq in world.seqs]))
        for seq in world.seqs:
            assert torch.equal(raw(ops.gather(alloc, seq, layer, name, impl=impl)), before[layer, name, seq.id])
    # A part, of one layer, written anew: every other byte stays.
    layer, seq = 1, world.seqs[2]
    values = world.bytes(7)
    ops.scatter(alloc, seq, layer, "v", values, start=5, impl=impl)
    after = world.all()
    before[layer, "v", seq.id][5:12] = raw(values)
    assert all(torch.equal(after[place], before[place]) for place in before)
    out = torch.empty_like(values)
    assert ops.gather(alloc, seq.id, layer, "v", start=5, end=12, out=out, impl=impl) is out
    assert torch.equal(raw(out), raw(values))
    # Slots in any order, as int32 on the device and as a plain list.
    order = world.random.permutation(len(slots))
    picked = [int(slots[i]) for i in order]
    for ids in (picked, np.array(picked, np.int32), torch.tensor(picked, dtype=torch.int32, device=slots.device)):
        again = ops.gather_tokens(alloc.tensor(layer, "k"), ids, impl=impl)
        assert torch.equal(raw(again), torch.cat([before[layer, "k", s.id] for s in world.seqs])[order])
    assert ops.gather_tokens(alloc.tensor(layer, "k"), [], impl=impl).shape[0] == 0


@every_way
@pytest.mark.parametrize(("shape", "backend", "interleave"), KINDS)
def test_whole_blocks(way: tuple[str, str], shape: str, backend: str, interleave: int | str, seed: int) -> None:
    world = World(way, seed, shape, backend, interleave)
    alloc, impl, ids = world.alloc, world.impl, world.blocks()
    assert len(ids) == 7
    tensors = {place: alloc.tensor(*place) for place in world.places}

    def snapshot() -> dict[tuple[int, str], dict[int, torch.Tensor]]:
        return {place: {block: raw(tensor[block]) for block in ids} for place, tensor in tensors.items()}

    def same(now: dict[tuple[int, str], dict[int, torch.Tensor]]) -> bool:
        return all(torch.equal(now[place][block], expected[place][block]) for place in now for block in ids)

    place, expected = (1, "k"), snapshot()
    cache = tensors[place]
    some = [ids[4], ids[0], ids[2]]
    gathered = ops.gather_blocks(cache, some, impl=impl)
    assert gathered.is_contiguous() and torch.equal(raw(gathered), torch.stack([expected[place][b] for b in some]))
    out = torch.empty_like(gathered)
    assert ops.gather_blocks(cache, torch.tensor(some, device=cache.device), out=out, impl=impl) is out
    assert torch.equal(raw(out), raw(gathered)) and same(snapshot())

    values = world.bytes(3, SIZE)
    ops.scatter_blocks(cache, some, values, impl=impl)
    expected[place].update(zip(some, raw(values), strict=True))
    assert same(snapshot())

    ops.copy_blocks(cache, [ids[4], ids[5], ids[4]], np.array([ids[1], ids[6], ids[3]]), impl=impl)
    for source, target in ((4, 1), (5, 6), (4, 3)):
        expected[place][ids[target]] = expected[place][ids[source]].clone()
    assert same(snapshot())

    ops.zero_blocks(cache, [ids[6], ids[0]], impl=impl)
    for block in (ids[6], ids[0]):
        expected[place][block] = torch.zeros_like(expected[place][block])
    assert same(snapshot())
    ops.zero_blocks(cache, [], impl=impl)
    ops.copy_blocks(cache, [], [], impl=impl)
    assert same(snapshot())


@every_way
def test_windows_padding_and_large_rows(way: tuple[str, str], seed: int) -> None:
    """What a window has dropped reads as the zero block; and a row wider than one program moves."""
    world = World(way, seed, window_tokens=6)
    first = [world.alloc.core.first_token(seq.id, 0) for seq in world.seqs]
    assert max(first) > SIZE
    batch = world.alloc.batch(world.seqs, pad_to=5)
    packed = raw(ops.gather_tokens(world.alloc.tensor(2, "v"), ops.batch_slots(batch), impl=world.impl))
    assert len(packed) == sum(LENGTHS) + 2 and not packed[-2:].any()
    begin = 0
    for seq, length, start in zip(world.seqs, LENGTHS, first, strict=True):
        assert torch.equal(packed[begin + start : begin + length], world.read(2, "v", seq))
        assert not packed[begin : begin + start // SIZE * SIZE].any()
        begin += length
    with pytest.raises(kvmem.SpecError, match=rf"tokens \[0, 3\): the sequence holds \[{first[2]}, 18\)"):
        ops.gather(world.alloc, world.seqs[2], 0, "k", start=0, end=3)

    wide = torch.randint(-9, 9, (4, 2, 3, 1111), dtype=torch.int64, device=world.device)  # 3,333 words a token
    expected = wide.clone()
    expected[0] = wide[3]
    ops.copy_blocks(wide, [3], [0], impl=world.impl)
    assert torch.equal(wide, expected)
    apart = torch.zeros(3, 2, 4, 8, device=world.device)[:, :, ::2]
    with pytest.raises(kvmem.SpecError, match="side by side"):
        ops.zero_blocks(apart, [0], impl=world.impl)


def test_values_are_converted_and_autograd_and_inference_mode_do_not_matter(seed: int) -> None:
    world = World(("cpu", "torch"), seed)
    with torch.inference_mode():
        ops.scatter(world.alloc, world.seqs[0], 0, "k", torch.full((9, 2, 8), 1.5, dtype=torch.float64), impl=None)
    assert (world.alloc.sequence_tensor(world.seqs[0], 0, "k") == 1.5).all()


def test_refusals(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(("cpu", "torch"), seed)
    cache = world.alloc.tensor(0, "k")
    n, (a, b, c) = len(cache), world.blocks()[:3]
    for call, message in [
        (lambda: ops.gather_tokens(cache, [n * SIZE]), f"slots: got {n * SIZE} to"),
        (lambda: ops.gather_tokens(cache, [-1]), "got -1 to -1"),
        (lambda: ops.zero_blocks(cache, torch.tensor([n])), "the tensor has 0 to"),
        (lambda: ops.gather_blocks(cache, [[a]]), "one dimension of integers"),
        (lambda: ops.gather_blocks(cache, [0.5]), "one dimension of integers"),
        (lambda: ops.gather_blocks(cache, [a], out=torch.empty(1, SIZE, 2, 8)), "out: got torch.float32"),
        (lambda: ops.scatter_blocks(cache, [a], torch.empty(2, SIZE, 2, 8)), "values: got shape"),
        (lambda: ops.scatter_tokens(cache, [a], torch.empty(1, 8, 2)), "values: got shape"),
        (lambda: ops.copy_blocks(cache, [a], [b, c]), "go in pairs"),
        (lambda: ops.copy_blocks(cache, [a, b], [c, c]), "written twice"),
        (lambda: ops.copy_blocks(cache, [a, b], [b, c]), f"block {b} is read and written"),
        (lambda: ops.zero_blocks(cache[0], [0]), "num_blocks, block_size, heads, width"),
        (lambda: ops.zero_blocks(cache, [a], impl="numpy"), "torch"),
        (lambda: ops.gather(world.alloc, world.seqs[0], 0, "k", end=10), r"holds \[0, 9\)"),
    ]:
        before = world.all()
        with pytest.raises(kvmem.SpecError, match=message):
            call()
        assert all(torch.equal(now, before[place]) for place, now in world.all().items())
    if not INTERPRETED:
        message = "not installed" if importlib.util.find_spec("triton") is None else "TRITON_INTERPRET=1"
        with pytest.raises(kvmem.SpecError, match=message):
            ops.zero_blocks(cache, [a], impl="triton")
        assert ops.pick(cache) == "torch"
    monkeypatch.setattr(ops, "_has_triton", lambda: False)
    with pytest.raises(kvmem.SpecError, match="not installed"):
        ops.pick(cache, "triton")


@pytest.mark.skipif(INTERPRETED, reason="this is the process that the test starts")
def test_all_of_this_in_tritons_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install -e .[triton]")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", str(Path(__file__))],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= 2 * len(KINDS) + 1, run.stdout


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
def test_the_kernels_compile_for_gpus_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code of two generations of GPUs: words and ids of each width, and with one token to an id, a number
    that Triton compiles in."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install -e .[triton]")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from kvmem.kernels import blocks_triton

    def build(kernel: Any, types: dict[str, str], fixed: dict[str, int | bool], generation: int) -> bytes:
        names = kernel.arg_names
        signature = {name: types.get(name, "i32") for name in names} | dict.fromkeys(fixed, "constexpr")
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in fixed.items()})
        return compile(source, target=GPUTarget("cuda", generation, 32)).asm["cubin"]

    kinds = [("i64", "i64", True, False, 1), ("i32", "i32", False, True, 16), ("i8", "i64", True, True, 16)]
    for generation in (80, 90):
        for word, number, from_ids, to_ids, tokens in kinds:
            types = {"read": "*" + word, "written": "*" + word, "from_ids": "*" + number, "to_ids": "*" + number}
            fixed = {"STEP": 256, "FROM_IDS": from_ids, "TO_IDS": to_ids} | ({"tokens": 1} if tokens == 1 else {})
            assert build(blocks_triton._copy_token, types, fixed, generation)
        types = {"written": "*i64", "ids": "*i64", "block": "i64"}
        assert build(blocks_triton._zero_token, types, {"STEP": 512}, generation)
