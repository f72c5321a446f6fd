"""What cache tensors and sequences' tensors let through: never a crash, and what is allowed is what torch gives."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support_drivers import assert_runs, assert_runs_on_both

import kvmem
from kvmem.geometry.views import CacheTensor
from kvmem.kernels.blocks import scatter
from kvmem.kernels.checks import plain

SPEC = kvmem.CacheSpec.kv(num_layers=2, num_kv_heads=2, head_dim=8, dtype=torch.float32, block_size=4)


def make(backend: str, **options: object) -> kvmem.Allocator:
    sizes = {"memory": "1MiB", "page_bytes": 4096, "max_sequences": 4, "max_tokens": 200, "debug": False}
    return kvmem.Allocator(SPEC, backend=backend, device="cpu", **(sizes | options))


def filled(alloc: kvmem.Allocator, count: int) -> kvmem.Sequence:
    seq = alloc.sequence()
    seq.extend(count)
    for layer in range(2):
        for name in "kv":
            scatter(alloc, seq, layer, name, torch.randn(count, 2, 8))
    return seq


# ---- The whole cache -------------------------------------------------------------------------------------------------

REFUSED: list[Callable[[torch.Tensor], object]] = [
    lambda t: t.sum(), lambda t: torch.sum(t), lambda t: t.max(), lambda t: t.mean(), lambda t: t.isnan(),
    lambda t: t.any(), lambda t: t.clone(), lambda t: t.zero_(), lambda t: t.fill_(1), lambda t: t.copy_(t[0]),
    lambda t: t.tolist(), lambda t: t.numpy(), lambda t: np.asarray(t), lambda t: t.cpu(), lambda t: t.to(torch.float64),
    lambda t: t.double(), lambda t: t == 0, lambda t: t != t, lambda t: t + 1, lambda t: 1 + t, lambda t: t.add_(1),
    lambda t: torch.add(t[0], t), lambda t: torch.cat([t[:1], t]), lambda t: torch.stack([t]), lambda t: -t,
    lambda t: list(t), lambda t: 1.0 in t, lambda t: bool(t), lambda t: t.share_memory_(), lambda t: torch.save(t, io.BytesIO()),
    lambda t: pickle.dumps(t), lambda t: copy.copy(t), lambda t: copy.deepcopy(t), lambda t: t.__setitem__(slice(None), 0),
    lambda t: t.__setitem__(Ellipsis, 0), lambda t: t.__setitem__((slice(None), 0), 0), lambda t: t[:, torch.tensor([0])],
    lambda t: t[:, 0].sum(), lambda t: t[None].sum(), lambda t: t.transpose(1, 2).sum(), lambda t: t.transpose(0, 1)[0].sum(),
    lambda t: t.permute(3, 0, 1, 2)[0].clone(), lambda t: t[..., 0].clone(), lambda t: t.flatten()[:].clone(),
    lambda t: t.transpose(1, 2).contiguous(), lambda t: t.permute(3, 0, 1, 2).reshape(-1), lambda t: t.index_select(1, torch.tensor([0])),
    lambda t: torch.empty(t.shape).copy_(t), lambda t: t[0].index_copy_(0, torch.tensor([0]), t), lambda t: t.unbind(),
    lambda t: torch.index_select(torch.empty(t.shape), 0, torch.tensor([0]), out=t), lambda t: t.data.sum(),
    lambda t: t.detach().sum(), lambda t: t.view(torch.uint8).sum(), lambda t: torch.ops.aten.sum(t),
    lambda t: torch.ops.aten.clone.default(t), lambda t: torch.equal(t, t), lambda t: torch.allclose(t, t),
    lambda t: torch.nn.functional.scaled_dot_product_attention(t, t, t), lambda t: torch.einsum("abcd->a", t),
    lambda t: torch.ops.aten.index_put_(t, [None, torch.tensor([0])], torch.zeros(())), lambda t: torch.empty_like(t),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_touches_the_whole_cache_is_refused(number: int, backend: str) -> None:
    alloc = make(backend)
    seq = filled(alloc, 30)
    before = [t.clone() for t in seq.kv(0)]
    tensors = [alloc.kv(0)[0], alloc.tensor(1, "v"), *([alloc.rows(0)] if backend == "virtual" else [])]
    for tensor in tensors:
        with pytest.raises(kvmem.SpecError, match=r"not read, copied or written whole.*Name the blocks"):
            REFUSED[number](tensor)
    assert all(torch.equal(a, b) for a, b in zip(seq.kv(0), before, strict=True))


EVERY_FUNCTION = """
    import inspect, sys, warnings
    import torch, kvmem
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    spec = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=4, dtype={dtype}, block_size=4)
    alloc = kvmem.Allocator(spec, backend={backend!r}, device="cpu", memory="1MiB", page_bytes=4096, max_sequences=6,
                            max_tokens=5000, prefix_cache=False)
    seqs = [alloc.sequence() for _ in range(4)]
    for seq in seqs:
        seq.extend(600)
    for seq in seqs[:3]:
        seq.free()
    alloc.trim()
    alloc.batch([seqs[3]], pad_to=2)  # blocks 0 and 1 are there
    tensors = [alloc.kv(0)[0], *([alloc.rows(0)] if {backend!r} == "virtual" else [])]
    ids = torch.zeros(2, dtype=torch.long)
    fill = [0, 1, 1.0, ids, torch.zeros(()), (0,), [0], torch.float32, "x", None, (0, 1, 2, 3), lambda *a: None]
    answered = refused = 0
    shown = set()  # what gives plain views
    ignored = torch.overrides.get_ignored_functions()
    for func, dummy in torch.overrides.get_testing_overrides().items():
        if func in ignored:
            continue
        count = len([p for p in inspect.signature(dummy).parameters.values() if p.default is p.empty
                     and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)])
        # Ids name what they touch: block 0 is there whole, of row 0 only some tokens are.
        by_id = func.__name__ in ("__getitem__", "__setitem__", "gather", "embedding") or "index_" in func.__name__
        for tensor in tensors[: 1 if by_id or "scatter" in func.__name__ else 2]:
            for place in range(min(max(count, 1), 3)):
                for other in fill[: len(fill) if count > 1 else 1]:
                    args = [other] * max(count, 1)
                    args[place] = tensor
                    try:
                        found = func(*args)
                        for each in found if isinstance(found, (tuple, list)) else [found]:
                            if isinstance(each, torch.Tensor) and type(each) is torch.Tensor and each.device.type == "cpu":
                                if each.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                                    shown.add(func.__name__)
                        answered += 1
                    except kvmem.SpecError:
                        refused += 1
                    except Exception:
                        pass
    live = alloc.batch([seqs[3]])
    for tensor, held in zip(tensors, [live.block_table[0, :1].long(), *([live.rows.long()] if live.rows is not None else [])]):
        at = held.view(1, 1, 1, 1)
        ones = torch.ones(1, *tensor.shape[1:])
        part = torch.ones(1, 4, 1, 4)
        tensor.gather(0, at), tensor.scatter_(0, at, 1.0), tensor.scatter_add_(0, at, torch.ones(1, 1, 1, 1))
        tensor[held, :4] = part
        tensor.index_put_((held, torch.tensor([0])), torch.tensor(2.0))
        if tensor is tensors[0]:  # of a row, only the tokens held are mapped
            tensor.index_select(0, held), tensor.index_copy_(0, held, ones), tensor.index_fill_(0, held, 1.0)
            tensor.index_add_(0, held, ones), tensor.narrow(0, int(held), 1).sum(), tensor[held].sum()
            torch.nn.functional.embedding(held * 4, tensor.view(-1, 4))
    print(answered, refused, sorted(shown))
    assert shown <= {{"__getitem__", "as_subclass", "select", "narrow"}}, shown
    assert answered > 50 and refused > 2000
"""


def test_no_function_of_torch_touches_what_is_not_mapped(backend: str) -> None:
    """All that torch lets a subclass override, with the tensor at each place; an unmapped read ends the process here."""
    code = EVERY_FUNCTION.format(backend=backend, dtype="torch.float32")
    assert_runs(code, timeout=300, env={"KVMEM_DEBUG": "1"})


def random_index(rng: random.Random, shape: tuple[int, ...]) -> tuple[object, ...]:
    """Parts for some of the leading dimensions, and None here and there."""
    parts: list[object] = []
    for size in shape[: rng.randint(1, len(shape))]:
        if rng.random() < 0.1:
            parts.append(None)
        ids = [rng.randrange(size) for _ in range(2)]
        start, end = sorted(rng.randint(0, size) for _ in range(2))
        parts.append(
            rng.choice(
                [ids[0], -1, np.int64(ids[0]), slice(start, end), slice(None), slice(None, None, 2), slice(0, None),
                 slice(start, None), ids, torch.tensor(ids), np.array(ids), torch.tensor(ids[0])]
            )
        )  # fmt: skip
    return tuple(parts)


def names_blocks(index: tuple[object, ...]) -> bool:
    first = next(part for part in index if part is not None)
    return not isinstance(first, slice) or first.stop is not None or first.start not in (None, 0)


def test_an_index_that_names_blocks_is_torchs(rng: random.Random) -> None:
    """Over ordinary memory, so that whatever an index names is there."""
    whole = torch.randn(9, 4, 2, 8)
    guarded = CacheTensor.over(whole)
    for _ in range(1500):
        index = random_index(rng, whole.shape)
        basic = all(part is None or isinstance(part, (slice, int, np.integer)) for part in index)
        if names_blocks(index):
            found, want = guarded[index], whole[index]
            assert type(found) is torch.Tensor
            assert torch.equal(found, want)
            if basic:
                assert found.data_ptr() == want.data_ptr(), "a view"
            value = rng.random()
            guarded[index] = value
            assert bool((whole[index] == value).all())
        elif basic:
            found = guarded[index]
            assert isinstance(found, CacheTensor)
            assert (found.shape, found.stride(), found.data_ptr()) == (
                whole[index].shape, whole[index].stride(), whole[index].data_ptr(),
            )  # fmt: skip
            with pytest.raises(kvmem.SpecError, match="leaves the first dimension whole"):
                guarded[index] = 0.0
        else:
            with pytest.raises(kvmem.SpecError, match="leaves the first dimension whole"):
                guarded[index]


def test_views_and_answers(backend: str) -> None:
    alloc = make(backend)
    seq = filled(alloc, 30)
    t = alloc.kv(0)[0]
    whole = t.as_subclass(torch.Tensor)
    assert type(whole) is torch.Tensor and plain(t).data_ptr() == whole.data_ptr() == t.data_ptr()
    assert (t.shape, t.dtype, t.device, t.ndim, len(t)) == (whole.shape, whole.dtype, whole.device, 4, len(whole))
    assert t.untyped_storage().nbytes() == whole.untyped_storage().nbytes()
    assert hash(t) == hash(t) and t in {t} and "CacheTensor(shape=" in f"{t!r}"
    blocks = alloc.batch([seq]).block_table[0].long()
    flat = t.view(-1, *t.shape[2:])
    for view, ids, want in (
        (t.transpose(1, 2), blocks, whole.transpose(1, 2)),
        (t.view(torch.int32), blocks, whole.view(torch.int32)),
        (flat, blocks * 4 + 1, whole.view(-1, 2, 8)),
        (t.unfold(3, 4, 4), blocks, whole.unfold(3, 4, 4)),
        (t.as_strided((len(t), 8), (t.stride(0), 1)), blocks, whole.as_strided((len(t), 8), (t.stride(0), 1))),
    ):
        assert view.shape == want.shape and view.stride() == want.stride()
        assert torch.equal(view[ids], want[ids])
        assert torch.equal(view.index_select(0, ids), want.index_select(0, ids))
        assert torch.equal(torch.index_select(view, dim=0, index=ids), want.index_select(0, ids))
    assert torch.equal(torch.nn.functional.embedding(blocks, flat.flatten(1)), whole.view(-1, 16)[blocks])
    assert torch.equal(t.narrow(0, int(blocks[0]), 1), whole[blocks[:1]])
    t.index_fill_(0, blocks[:1], 3.0)
    t.index_copy_(0, blocks[1:2], torch.full((1, 4, 2, 8), 4.0))
    t.index_put_((blocks[2:3],), torch.tensor(5.0))
    assert [float(block.mean()) for block in t[blocks[:3]]] == [3.0, 4.0, 5.0]
    assert "tensor" in repr(t[int(blocks[0])])


def test_a_custom_operator_is_given_the_plain_tensor(backend: str) -> None:
    seen = []

    @torch.library.custom_op(f"kvmem_test::first_{backend}", mutates_args=())
    def first(cache: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        seen.append(type(cache))
        return cache[ids].clone()

    alloc = make(backend)
    seq = filled(alloc, 9)
    ids = alloc.batch([seq]).block_table[0].long()
    t = alloc.kv(0)[0]
    assert torch.equal(first(t, ids), plain(t)[ids]) and seen == [torch.Tensor]


# ---- One sequence ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleave", ["all", 1, "none"])
@pytest.mark.parametrize("debug", [False, True])
def test_a_sequences_tensors_can_be_saved_and_copied(backend: str, interleave: object, debug: bool) -> None:
    """Their storage ends where the tokens do: torch saves and shares storages, not tensors."""
    alloc = make(backend, interleave=interleave, debug=debug)
    for count in (0, 1, 3, 30):
        seq = filled(alloc, count)
        for t in seq.kv(1):
            assert t.shape == (count, 2, 8)
            span = (count - 1) * t.stride(0) + 16 if count else 0
            assert t.untyped_storage().nbytes() <= max(span * 4, 36 * 64), "no more than the tokens, and a block"
            want = torch.tensor(t.tolist()).view(t.shape)
            file = io.BytesIO()
            torch.save(t, file)
            file.seek(0)
            for again in (
                torch.load(file), pickle.loads(pickle.dumps(t)), copy.deepcopy(t), copy.copy(t), t.clone(),
                torch.from_numpy(t.numpy()), torch.from_numpy(np.asarray(t)), t.cpu(), t.contiguous(), t[:],
                t.to(torch.float64).float(),
            ):  # fmt: skip
                assert torch.equal(again, want)
            assert "tensor" in repr(t) or count
            t.share_memory_()
            assert torch.equal(t, want)
        seq.free()


def test_a_view_of_a_sequence_is_the_cache() -> None:
    alloc = make("virtual")
    seq = filled(alloc, 30)
    k, _ = seq.kv(1)
    k[7] = 2.0
    assert bool((seq.kv(1)[0][7] == 2.0).all())
    slot = alloc.batch([seq]).slot_mapping[9]
    alloc.kv(1)[0].view(-1, 2, 8)[slot] = 5.0
    assert bool((k[9] == 5.0).all())
    seq.extend(60)
    assert k.data_ptr() == seq.kv(1)[0].data_ptr()


def test_a_write_to_gathered_tokens_is_told() -> None:
    alloc = make("paged")
    seq = filled(alloc, 30)
    writes: list[Callable[[torch.Tensor], object]] = [
        lambda t: t.fill_(1.0), lambda t: t.__setitem__(3, 1.0), lambda t: t[3].zero_(), lambda t: t.view(-1).add_(1),
        lambda t: t.__iadd__(1), lambda t: torch.add(t, 1, out=t), lambda t: t.transpose(0, 1)[0].mul_(2),
    ]  # fmt: skip
    for write in writes:
        t = seq.kv(0)[0]
        with pytest.warns(UserWarning, match="does not reach the cache"):
            write(t)
        t.fill_(9.0)  # told once
        assert not torch.equal(seq.kv(0)[0], t)
    t = seq.kv(0)[0]
    t.clone().fill_(1.0)
    (t + 1).zero_()
    torch.empty(30, 2, 8).copy_(t)
    (t @ t.transpose(1, 2)).mul_(2)


def test_a_use_after_the_end_is_found_when_debugging(rng: random.Random) -> None:
    alloc = make("virtual", debug=True)
    uses: list[Callable[[torch.Tensor], object]] = [
        lambda t: t.sum(), lambda t: t[0].tolist(), repr, lambda t: t.fill_(1.0), pickle.dumps, copy.deepcopy,
        lambda t: t.numpy(), lambda t: torch.empty(t.shape), lambda t: t + t,
    ]  # fmt: skip
    for _ in range(60):
        seq = filled(alloc, 30)
        kept = [*seq.kv(0), *(t[3:9] for t in seq.kv(1)), seq.kv(0)[0].transpose(0, 1)]
        copied = seq.kv(0)[0].clone()
        seq.extend(5)
        assert torch.equal(kept[0], copied)
        change = rng.choice([seq.free, lambda seq=seq: seq.truncate(29)])
        change()
        for t in kept:
            with pytest.raises(kvmem.StaleHandle):
                rng.choice(uses)(t)
        assert copied.shape == (30, 2, 8)
        if seq.id in alloc.core.handles():
            assert seq.kv(0)[0].shape == (29, 2, 8)
            seq.free()


def test_a_tensor_outlives_its_sequence_without_a_crash() -> None:
    """Freed and unmapped: what it shows is nobody's any more, but reading it ends nothing."""
    assert_runs_on_both(
        """
        import torch, kvmem
        spec = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32", block_size=4)
        alloc = kvmem.Allocator(spec, backend=backend, memory="1MiB", page_bytes=4096, max_sequences=4,
                                max_tokens=200, debug=False, prefix_cache=False)
        seq = alloc.sequence()
        seq.extend(130)
        k, v = seq.kv(0)
        seq.free()
        alloc.trim()
        print(k, v.sum(), k.clone().shape, len(k.tolist()))
        """,
        env={"KVMEM_DEBUG": "0"},
    )
