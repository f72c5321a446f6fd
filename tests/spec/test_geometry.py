"""Byte layouts, and what may and may not be done with the tensors over them."""

from __future__ import annotations

import copy
import pickle
import signal

import pytest
import torch
from contents import places
from reference import arena_bytes
from support import LAYOUTS, make_allocator, plain, unequal
from support_drivers import assert_runs_on_both, run_python

import kvmem
from kvmem import _core
from kvmem.geometry.group_layout import GroupLayout, Interleave

INTERLEAVES: tuple[Interleave, ...] = (1, 2, 3, 99, "none")


def planes(block_size: int) -> kvmem.CacheSpec:
    """As AlignedKV: the bits of a number in three planes."""
    parts = [kvmem.Component(name, heads=2, width=8, dtype=torch.float16, planes=(8, 4, 4)) for name in ("k", "v")]
    return kvmem.CacheSpec(components=parts, num_layers=3, block_size=block_size)


def keys_only(block_size: int) -> kvmem.CacheSpec:
    parts = [kvmem.Component("k", heads=3, width=12, dtype=torch.float16)]
    return kvmem.CacheSpec(components=parts, num_layers=4, block_size=block_size)


SPECS = {make.__name__: make for make in (*(layout.spec for layout in LAYOUTS.values()), planes, keys_only)}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("interleave", INTERLEAVES)
def test_slices_are_aligned_and_never_overlap(name: str, interleave: Interleave) -> None:
    spec = SPECS[name](16)
    for g, group in enumerate(spec.groups):
        layout = GroupLayout(group, interleave)
        taken: list[set[int]] = [set() for _ in layout.token_bytes]
        for layer, component in places(spec, g):
            where = layout.slice(layer, component)
            size = where.heads * where.width * where.dtype.itemsize
            assert size == group.row_bytes(component, layer) and where.offset_bytes % 16 == 0
            assert where.offset_bytes + size <= layout.token_bytes[where.arena]
            mine = set(range(where.offset_bytes, where.offset_bytes + size))
            assert not mine & taken[where.arena], (layer, component)
            taken[where.arena] |= mine
        assert layout.token_bytes == arena_bytes(group, interleave)
        for bytes_, used in zip(layout.token_bytes, taken, strict=True):
            assert bytes_ % 16 == 0 and bytes_ - len(used) < 16 * len(group.layers) * len(group.components), (
                "padding only"
            )
        if interleave == "none":
            everything = [layout.slice(layer, component) for layer, component in places(spec, g)]
            assert sorted(where.arena for where in everything) == list(range(len(everything))), "an arena each"
            assert not any(where.offset_bytes for where in everything)


@pytest.mark.parametrize("interleave", [1, 2, "none"])
def test_a_shared_component_is_one_copy(interleave: Interleave) -> None:
    spec = LAYOUTS["shared scope"].spec(16)
    layout = GroupLayout(spec.groups[0], interleave)
    assert len({layout.slice(layer, "ck") for layer in spec.groups[0].layers}) == 1
    alloc = make_allocator(spec, "paged", interleave=interleave)
    with alloc.sequence() as seq:
        seq.extend(1)
        assert len({alloc.tensor(layer, "ck").data_ptr() for layer in range(3)}) == 1
        assert len({alloc.tensor(layer, "v").data_ptr() for layer in range(3)}) == 3


def test_what_kernels_ask_of_k_and_v(backend: str) -> None:
    for interleave in INTERLEAVES:
        alloc = make_allocator(plain(16), backend, interleave=interleave)
        with alloc.sequence() as seq:
            seq.extend(40)
            for layer in range(3):
                k, v = alloc.kv(layer)
                assert k.shape == v.shape and k.stride() == v.stride() and k.shape[1:] == (16, 2, 8)
                assert k.stride(-1) == 1 and k.stride(0) < 2**32
                assert k.data_ptr() % 16 == v.data_ptr() % 16 == 0
            if backend == "virtual":
                rows = alloc.rows(0)
                assert rows.shape[0] == 1 + alloc.max_sequences + alloc.cached_rows and rows.shape[1] % 256 == 0


def test_apart_every_component_is_as_dense_as_a_contiguous_tensor() -> None:
    """The padding to 16 bytes aside, which none of these has."""
    alloc = make_allocator(unequal(16), "virtual", interleave="none", memory="8MiB")
    assert alloc.interleave == "none", "what it was made with makes another one like it"
    with alloc.sequence() as seq:
        seq.extend(300)
        for layer, component in places(alloc.spec, 0):
            tokens = alloc.sequence_tensor(seq, layer, component)
            assert tokens.is_contiguous() and len(tokens) == 300, (layer, component)
            row = alloc.rows(layer, component)[1]
            assert row.stride() == (row.shape[1] * row.shape[2], row.shape[2], 1)
            blocks = alloc.tensor(layer, component)
            assert blocks.stride()[:2] == (16 * row.stride(0), row.stride(0))
            tokens.fill_(layer + (component == "v") / 2)
        for layer, component in places(alloc.spec, 0):
            assert alloc.sequence_tensor(seq, layer, component).unique().tolist() == [layer + (component == "v") / 2]


def test_apart_k_and_v_have_one_shape_even_when_one_range_gave_up_more() -> None:
    """Parked pages go one range after the other, so the last mapped block of K may lie before that of V."""
    spec = kvmem.CacheSpec.kv(num_layers=2, num_kv_heads=2, head_dim=64, dtype=torch.float16)
    alloc = make_allocator(spec, "virtual", interleave="none", page_bytes=4096, prefix_cache=False)
    with alloc.sequence() as first:
        first.extend(100)
        with alloc.sequence() as last:
            last.extend(400)
        assert alloc.trim(4096) == 4096
        assert alloc.core.mapped_extent_bytes(0, 0) < alloc.core.mapped_extent_bytes(0, 1)
        k, v = alloc.kv(0)
        assert k.shape == v.shape and k.stride() == v.stride()
        assert len(k) < len(alloc.tensor(0, "v")) and "CacheTensor" in repr(k) and "CacheTensor" in repr(v)
        assert len(k) > int(alloc.batch([first]).block_table.max()), "all blocks in use are there"


def test_unknown_layers_and_components_are_refused(backend: str) -> None:
    alloc = make_allocator(plain(16), backend)
    for layer, name in ((3, "k"), (-1, "k"), (0, "q")):
        with pytest.raises(kvmem.SpecError, match="component|layer"):
            alloc.tensor(layer, name)


def test_meta_has_no_tensors(backend: str) -> None:
    alloc = make_allocator(plain(16), backend, device="meta", memory="80GiB", max_tokens=4096)
    with alloc.sequence() as seq:
        seq.extend(1000)
        for call in (lambda: alloc.kv(0), lambda: seq.kv(0)):
            with pytest.raises(kvmem.DeviceError, match="meta"):
                call()
        assert alloc.stats().used_bytes == 1000 * 192


def test_a_view_cannot_be_pickled_or_copied(backend: str) -> None:
    alloc = make_allocator(plain(16), backend)
    with alloc.sequence() as seq:
        seq.extend(3)
        for call in (pickle.dumps, copy.deepcopy):
            with pytest.raises(kvmem.SpecError, match="not read, copied or written whole"):
                call(alloc.kv(0)[0])
        assert pickle.loads(pickle.dumps(seq.kv(0)[0].clone())).shape == (3, 2, 8)


SETUP = """
    import torch, kvmem
    spec = kvmem.CacheSpec.kv(num_layers=2, num_kv_heads=2, head_dim=64, dtype=torch.float16)
    alloc = kvmem.Allocator(spec, backend=backend, device="cpu", memory="8MiB", max_sequences=4, max_tokens=5000,
                            page_bytes=4096)
    seqs = [alloc.sequence() for _ in range(3)]
    for seq in seqs:
        seq.extend(100)
    seqs[0].free()
    alloc.trim()
"""


def test_printing_does_not_touch_unmapped_memory() -> None:
    """In a process of its own: a mistake here is a segmentation fault."""
    code = """
    views = [*alloc.kv(0), *alloc.kv(1)]
    if backend == "virtual": views.append(alloc.rows(0))
    for view in views:
        text = repr(view), str(view), f"{view}", format(view), f"{view!r:>300}"
        assert all("CacheTensor(shape=" in t for t in text), text
    print([views], {"k": views[0]})
    """
    assert assert_runs_on_both(SETUP + code).count("CacheTensor") >= 2 * 5


def test_an_unmapped_row_reads_as_zeros_and_faults_when_debugging() -> None:
    """Why views end at the last mapped block, and why to index by a batch: addresses are reserved, not backed."""
    setup = "    backend = 'virtual'" + SETUP
    read = setup + "    assert float(alloc.rows(0)[1:, 4000].sum()) == 0\n"
    write = setup + "    alloc.rows(0)[1:, 4000] = 1\n"
    for code, debug, status in (
        (read, "0", -signal.SIGSEGV if _core.debug_build else 0),
        (read, "1", -signal.SIGSEGV),
        (write, "0", -signal.SIGSEGV),
    ):
        done = run_python(code, env={"KVMEM_DEBUG": debug})
        assert done.returncode == status, (done.returncode, done.stderr)


def test_tensors_stay_readable_when_the_allocator_is_gone() -> None:
    assert_runs_on_both(
        SETUP
        + """
    import gc
    k = alloc.sequence_tensor(seqs[1], 0, "k")
    block = int(alloc.batch([seqs[1]]).block_table[0, 0])
    view = alloc.kv(0)[0]
    k.fill_(2.0)
    view[block].fill_(3.0)
    del alloc, seqs, seq
    gc.collect()
    assert float(view[block].float().mean()) == 3.0
    assert float(k[50:].float().mean()) == 2.0
    """
    )


def test_sequence_tensor(backend: str) -> None:
    alloc = make_allocator(plain(16), backend)
    with alloc.sequence() as seq:
        assert seq.kv(0)[0].shape == (0, 2, 8)
        seq.extend(50)
        k, v = seq.kv(2)
        assert k.shape == v.shape == (50, 2, 8)
        batch = alloc.batch([seq])
        cache = alloc.kv(2)[0]
        cache[batch.slot_mapping // 16, batch.slot_mapping % 16] = (
            torch.arange(50, dtype=torch.float16).view(50, 1, 1).expand(50, 2, 8)
        )
        assert seq.kv(2)[0][:, 1, 7].tolist() == list(range(50))
        assert not seq.kv(2)[1].any() and not seq.kv(1)[0].any()
