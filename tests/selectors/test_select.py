"""Each selector chooses what a slow reference chooses, and attention over the choice is attention over those tokens."""

from __future__ import annotations

import itertools
import random
from functools import partial
from typing import Any

import pytest
import torch
from selector_world import BLOCK, HEADS, LAYERS, WIDTH, World

from kvmem.kernels import cpu, flash_attention, flashinfer
from kvmem.kernels.reference import oracle, sdpa, sdpa_lse
from kvmem.selectors import Clustered, LayerView, Quest, Recent, Selector, SparF
from kvmem.selectors.clustered import k_means

close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
QUERY_HEADS, SCALE = 3 * HEADS, WIDTH**-0.5
SELECTORS: dict[str, Selector] = {
    "quest": Quest(), "sparf": SparF(4), "all channels": SparF(WIDTH), "clustered": Clustered(), "recent": Recent(),
}  # fmt: skip


def block_logits(
    name: str, keys: list[torch.Tensor], q: torch.Tensor, queries: torch.Tensor, written: int
) -> list[float]:
    """The logarithm of each block's mass. keys: of each block ``[tokens, WIDTH]``. q: of one query head. queries: all
    of the KV head's, ``[n, WIDTH]``. written: blocks that the prompt completed.
    """
    if name == "recent":
        return [float(n) for n in range(len(keys))]
    if name == "quest":
        return [
            sum(max(float(q[c] * k[:, c].min()), float(q[c] * k[:, c].max())) for c in range(WIDTH)) * SCALE
            for k in keys
        ]
    if name == "clustered":
        keys = list(keys)
        for begin, end in ((0, written), (written, len(keys) - (len(keys[-1]) < BLOCK))):
            if begin < end:
                centroids, labels = k_means(torch.stack(keys[begin:end]).flatten(0, 1)[None], end - begin, 10)
                keys[begin:end] = centroids[0][labels[0]].split(BLOCK)
    channels = sorted(range(WIDTH), key=lambda c: -float(queries[:, c].abs().sum()))[: 4 if name == "sparf" else WIDTH]
    temperature = (q[channels].abs().sum() / q.abs().sum()).sqrt()
    return [float(((k.double()[:, channels] @ q[channels]) * SCALE / temperature).exp().sum().log()) for k in keys]


def reference(world: World, name: str, sequence: Any, q: torch.Tensor, budget: int, heads: list[int]) -> list[int]:
    """The numbers of the blocks that these KV heads choose together. q: ``[n, QUERY_HEADS, WIDTH]``."""
    length = len(world.tokens[sequence])
    number = -(-length // BLOCK)
    always = {0, *range((length - len(q)) // BLOCK, number)}
    scored = length // BLOCK if name in ("quest", "clustered") else number
    mass = torch.zeros(number, dtype=torch.float64)
    for head in heads:
        k = world.kv(0, world.tokens[sequence])[0][:, head]
        mine = q[:, 3 * head : 3 * head + 3].flatten(0, 1)
        for query in mine:
            logits = torch.tensor(
                block_logits(name, list(k.split(BLOCK)), query, mine, (length - len(q)) // BLOCK), dtype=torch.float64
            )
            mass[:scored] += logits[:scored].softmax(0)
    ranked = sorted(set(range(number)) - always, key=lambda n: -float(mass[n]))
    return sorted([*always, *ranked[: max(0, min(number, budget // BLOCK) - len(always))]])


def rows_of(world: World, new: int) -> tuple[list[Any], Any]:
    """Sequences of several lengths with ``new`` tokens each that are not committed, the second with one and the last
    without others. What a summary would be of their incomplete blocks is spoilt: nothing may depend on it.
    """
    lengths = (94, 16 * BLOCK - 1, 5)
    sequences = [world.open([(3 * n + i) % 50 for n in range(length)]) for i, length in enumerate(lengths)]
    sequences.append(empty := world.alloc.sequence())
    world.tokens[empty] = []
    counts = (new, 1, new, new)
    batch = world.grow({s: [(7 * n + 1) % 50 for n in range(c)] for s, c in zip(sequences, counts, strict=True)}, False)
    for row, sequence in enumerate(sequences):
        if len(world.tokens[sequence]) % BLOCK:
            last = int(batch.block_table[row, len(world.tokens[sequence]) // BLOCK])
            for layer, component in itertools.product(range(LAYERS), world.alloc.spec.groups[0].components[2:]):
                world.alloc.tensor(layer, component.name)[[last]] = 12345
    return sequences, batch


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("name", SELECTORS)
def test_a_slow_reference_chooses_the_same(name: str, per_head: bool, new: int, backend: str) -> None:
    world = World(SELECTORS[name], backend)
    sequences, batch = rows_of(world, new)
    q = torch.randn(3 * new + 1, QUERY_HEADS, WIDTH, dtype=torch.float64)
    for budget in (1, 4 * BLOCK, 9 * BLOCK + 3):
        chosen = world.chooser.select(q, 0, batch, budget_tokens=budget, per_head=per_head)
        found = iter(chosen.blocks.tolist())
        for sequence, mine in zip(sequences, q.split(batch.cu_seqlens_q_cpu.diff().tolist()), strict=True):
            for heads in [[h] for h in range(HEADS)] if per_head else [list(range(HEADS))]:
                expected = reference(world, name, sequence, mine, budget, heads)
                assert [n for n in next(found) if n >= 0] == expected, f"{sequence}, heads {heads}, budget {budget}"


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("new", [1, 3])
def test_unmodified_kernels_read_the_chosen_tokens(new: int, per_head: bool, backend: str) -> None:
    world = World(SELECTORS["quest"], backend)
    sequences, batch = rows_of(world, new)
    q = torch.randn(3 * new + 1, QUERY_HEADS, WIDTH)
    chosen = world.chooser.select(q, 1, batch, budget_tokens=5 * BLOCK, per_head=per_head)
    assert int(chosen.cu_seqlens_k_cpu[-1]) < int(batch.cu_seqlens_k_cpu[-1]) * (HEADS if per_head else 1)
    cache = chosen.cache(*world.alloc.kv(1))
    results = [oracle(chosen.queries(q), cache, chosen), sdpa_lse(chosen.queries(q), cache, chosen)]
    results.append((sdpa(chosen.queries(q), cache, chosen), results[0][1]))
    results.append(cpu.attention(chosen.queries(q), cache, chosen))
    for row, sequence in enumerate(sequences):
        k, v = world.kv(1, world.tokens[sequence])
        begin, end = batch.cu_seqlens_q_cpu[row : row + 2].tolist()
        for head, at in itertools.product(range(HEADS), range(begin, end)):
            blocks = chosen.blocks[row * HEADS + head if per_head else row].tolist()
            tokens = [t for t in range(len(k) - end + at + 1) if t // BLOCK in blocks]
            mine = slice(3 * head, 3 * head + 3)
            scores = q[at, mine].double() @ k[tokens, head].double().T * SCALE
            for out, lse in results:
                expected = scores.softmax(-1) @ v[tokens, head].double()
                close(chosen.outputs(out)[at, mine].double(), expected)
                close(chosen.outputs(lse)[at, mine].double(), scores.logsumexp(-1))


@pytest.mark.parametrize("name", SELECTORS)
def test_every_block_chosen_is_dense_attention_exactly(name: str, backend: str) -> None:
    world = World(SELECTORS[name], backend)
    _, batch = rows_of(world, 2)
    q = torch.randn(7, QUERY_HEADS, WIDTH)
    chosen = world.chooser.select(q, 0, batch, budget_tokens=10_000)
    fields = ("seq_lens", "kv_indptr", "kv_indices", "kv_last_page_len", "cu_seqlens_q", "cu_seqlens_k", "first_tokens")
    for field in fields:
        assert torch.equal(getattr(chosen, field), getattr(batch, field)), field
        assert getattr(chosen, field).dtype == getattr(batch, field).dtype
    used = chosen.block_table.shape[1]
    assert torch.equal(chosen.block_table, batch.block_table[:, :used]) and not batch.block_table[:, used:].any()
    for found, dense in zip(sdpa_lse(q, world.alloc.kv(0), chosen), sdpa_lse(q, world.alloc.kv(0), batch), strict=True):
        assert torch.equal(found, dense)


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("per_head", [False, True])
def test_batches_without_rows_and_without_tokens(name: str, per_head: bool, backend: str) -> None:
    world = World(SELECTORS[name], backend)
    for sequences in ([], [world.alloc.sequence(), world.alloc.sequence()]):
        batch, q = world.alloc.batch(sequences), torch.randn(0, QUERY_HEADS, WIDTH)
        chosen = world.chooser.select(q, 0, batch, budget_tokens=40, per_head=per_head)
        assert chosen.num_rows == len(sequences) * (HEADS if per_head else 1) and chosen.num_indices == 0
        assert not chosen.seq_lens.any() and not chosen.kv_indptr.any() and chosen.blocks.numel() == 0
        out = oracle(chosen.queries(q), chosen.cache(*world.alloc.kv(0)), chosen)[0] if sequences else q
        assert chosen.outputs(out).shape == q.shape or not sequences


@pytest.mark.parametrize("options", [{}, {"interleave": "all", "page_bytes": 36_864}], ids=["apart", "side by side"])
def test_what_flashinfer_and_flash_attention_are_called_with(options: dict[str, Any], backend: str) -> None:
    world = World(SELECTORS["quest"], backend, **options)
    sequences, batch = rows_of(world, 1)
    q = torch.randn(4, QUERY_HEADS, WIDTH)
    sizes: dict[str, Any] = {
        "head_dim": WIDTH,
        "dtype": torch.float16,
        "num_query_heads": QUERY_HEADS,
        "num_kv_heads": HEADS,
    }
    chosen = world.chooser.select(q, 0, batch, budget_tokens=4 * BLOCK)
    plan = flashinfer.decode_plan(chosen, **sizes)
    ids = [
        [int(batch.block_table[row, n]) for n in blocks if n >= 0] for row, blocks in enumerate(chosen.blocks.tolist())
    ]
    assert plan["indices"].tolist() == list(itertools.chain(*ids)) and plan["indices"].dtype == torch.int32
    assert plan["indptr"].tolist() == [0, *itertools.accumulate(map(len, ids))] and plan["indptr"].dtype == torch.int32
    lengths = [len(world.tokens[s]) for s in sequences]
    assert plan["last_page_len"].tolist() == [(n - 1) % BLOCK + 1 for n in lengths]
    assert plan["page_size"] == BLOCK and plan["num_kv_heads"] == HEADS and plan["window_left"] == -1
    expected = [(len(blocks) - 1) * BLOCK + (n - 1) % BLOCK + 1 for blocks, n in zip(ids, lengths, strict=True)]
    assert (
        flashinfer.batch_attention_plan(chosen, **sizes)["kv_len_arr"].tolist() == expected == chosen.seq_lens.tolist()
    )
    assert flashinfer.prefill_plan(chosen, **sizes)["qo_indptr"].tolist() == [0, 1, 2, 3, 4]
    assert flash_attention.fa3_args(chosen)["page_table"] is chosen.block_table
    heads = world.chooser.select(q, 0, batch, budget_tokens=4 * BLOCK, per_head=True)
    k, v = flashinfer.cache_of(*heads.cache(*world.alloc.kv(0)))
    plan = flashinfer.decode_plan(heads, **sizes | {"num_query_heads": 3, "num_kv_heads": 1})
    assert len(plan["indptr"]) == 4 * HEADS + 1 and k.shape[1:] == (BLOCK, 1, WIDTH)
    for row, (head, tensor) in itertools.product(
        range(4), itertools.product(range(HEADS), zip((k, v), world.alloc.kv(0), strict=True))
    ):
        begin = int(plan["indptr"][row * HEADS + head])
        for n, block in enumerate(b for b in heads.blocks[row * HEADS + head].tolist() if b >= 0):
            view, whole = tensor
            found = view[int(plan["indices"][begin + n])][:, 0]
            assert torch.equal(found, whole[int(batch.block_table[row, block])][:, head])


def test_the_bound_of_quest_holds(rng: random.Random, backend: str) -> None:
    """No token of a block has a larger score than the block's bound; some block has one that is equal."""
    world = World(SELECTORS["quest"], backend)
    for trial in range(20):
        length = rng.randint(2, 12) * BLOCK
        sequence = world.open([rng.randrange(50) for _ in range(length)])
        batch = world.alloc.batch([sequence], new_tokens=[0])
        q = torch.randn(1, 3, HEADS, 4, WIDTH, dtype=torch.float64) * rng.choice((1e-3, 1.0, 50.0))
        q[:, 0, :, 0, 1:] = 0  # a query in one channel: the bound is the score
        bounds = Quest().logits(q, LayerView(world.alloc, 0, batch, length // BLOCK), SCALE)[0]
        keys = world.keys(sequence, 0).double()
        largest = torch.einsum("nhgw,mthw->nhgmt", q[0], keys).amax(-1) * SCALE
        slack = 1e-12 * q.abs().max() * keys.abs().max() * WIDTH
        assert (largest <= bounds + slack).all(), f"trial {trial}"
        torch.testing.assert_close(largest[0, :, 0], bounds[0, :, 0], atol=1e-12, rtol=1e-12)
        world.free(sequence)


def test_padding_rows_and_graphs_of_one_plan(backend: str) -> None:
    """The host's part of the metadata does not depend on the layer, nor on the query."""
    world = World(SELECTORS["quest"], backend)
    sequences, _ = rows_of(world, 1)
    batch = world.alloc.batch(sequences, pad_to=6)
    chosen = [
        world.chooser.select(torch.randn(6, QUERY_HEADS, WIDTH), layer, batch, budget_tokens=40) for layer in (0, 1)
    ]
    assert not torch.equal(chosen[0].blocks, chosen[1].blocks)
    for field in ("seq_lens_cpu", "kv_indptr_cpu", "kv_last_page_len_cpu", "cu_seqlens_q_cpu"):
        assert torch.equal(getattr(chosen[0], field), getattr(chosen[1], field)), field
    assert chosen[0].block_table[4:].eq(0).all() and chosen[0].seq_lens[4:].tolist() == [1, 1]


def test_no_block_is_read_that_may_be_unmapped(backend: str) -> None:
    """On a GPU such a read loses the context. Block 0, which a table names past a row's end, is no block of a row."""
    world = World(SELECTORS["quest"], backend)
    _, batch = rows_of(world, 1)
    view = LayerView(world.alloc, 0, batch, int(batch.kv_indptr_cpu.diff().max()))
    assert (batch.block_table == 0).any() and set(view.table.flatten().tolist()) == set(batch.kv_indices.tolist())


def test_reads_are_counted(backend: str) -> None:
    world = World(SELECTORS["quest"], backend)
    _, batch = rows_of(world, 1)
    complete = int((batch.seq_lens_cpu // BLOCK).sum())
    world.alloc.ledger.reset()
    world.chooser.select(torch.randn(4, QUERY_HEADS, WIDTH), 0, batch, budget_tokens=40)
    assert sum(world.alloc.ledger.read.values()) == complete * 2 * HEADS * WIDTH * 4
    sparse = World(SELECTORS["sparf"], backend)
    _, batch = rows_of(sparse, 1)
    sparse.alloc.ledger.reset()
    sparse.chooser.select(torch.randn(4, QUERY_HEADS, WIDTH), 0, batch, budget_tokens=40)
    assert sum(sparse.alloc.ledger.read.values()) == int(batch.seq_lens_cpu.sum()) * HEADS * 4 * 4
