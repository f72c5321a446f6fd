"""Summaries are those of the real keys, whatever happened to the blocks: appended, cut, forked, hit, evicted, moved."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from selector_world import BLOCK, HEADS, LAYERS, WIDTH, World

from kvmem import Sequence
from kvmem.errors import OutOfMemory
from kvmem.selectors import Clustered, LayerView, Quest
from kvmem.tiers import Tiers


def check_bounds(world: World) -> None:
    for sequence in world.tokens:
        for layer in range(LAYERS):
            keys = world.keys(sequence, layer)
            expected = torch.stack((keys.amin(1), keys.amax(1)), 1).flatten(1)
            assert torch.equal(world.summary(sequence, layer, "k_bounds"), expected)


class Segments:
    """How many blocks each segment had when it was written, by its number: what tells a whole one from a part."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}

    @staticmethod
    def ids(world: World, sequence: Sequence, layer: int) -> torch.Tensor:
        numbers = world.summary(sequence, layer, "k_labels")[:, BLOCK * HEADS :][:, :4]
        return numbers.contiguous().view(torch.int64).flatten()

    def check(self, world: World) -> int:
        """Returns how many whole segments of several blocks there were."""
        whole = 0
        for sequence in world.tokens:
            for layer in range(LAYERS):
                keys, ids = world.keys(sequence, layer), self.ids(world, sequence, layer)
                vectors = world.summary(sequence, layer, "k_centroids").view(len(keys), 2, HEADS, WIDTH)
                torch.testing.assert_close(vectors[:, 1], keys.mean(1), atol=1e-5, rtol=1e-5)
                near = world.summary(sequence, layer, "k_labels")[:, : BLOCK * HEADS].view(-1, BLOCK, HEADS).long()
                labels = near + torch.arange(len(keys)).view(-1, 1, 1)
                for number in ids.unique().tolist():
                    blocks = (ids == number).nonzero().flatten()
                    size = self.sizes.setdefault(number, len(blocks))  # seen first right after it was written
                    assert len(blocks) <= size and (blocks.diff() == 1).all()
                    if len(blocks) == size:
                        whole += size > 1
                        self.check_means(keys[blocks], labels[blocks] - blocks[0], vectors[blocks, 0])
        return whole

    @staticmethod
    def check_means(keys: torch.Tensor, labels: torch.Tensor, centroids: torch.Tensor) -> None:
        assert labels.min() >= 0 and labels.max() < len(centroids)
        for head in range(HEADS):
            for label in labels[..., head].unique().tolist():
                mean = keys[:, :, head][labels[..., head] == label].mean(0)
                torch.testing.assert_close(centroids[label, head], mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bounds", "clusters"])
def test_random_worlds(kind: str, backend: str, rng: random.Random, seed: int) -> None:
    # 40 pages: a few hundred tokens, so that cached blocks are evicted and their memory is used again.
    selector = Quest() if kind == "bounds" else Clustered(iterations=3)
    world, segments, whole = (
        World(selector, backend, seed, memory=(40 + 16 * (backend == "virtual")) * 4096),
        Segments(),
        0,
    )
    for _ in range(120):
        try:
            world.random_step(rng)
        except OutOfMemory:
            for sequence in list(world.tokens)[1:]:
                world.free(sequence)
        if kind == "bounds":
            check_bounds(world)
        else:
            whole += segments.check(world)
        assert world.alloc.check() == []
    assert kind == "bounds" or whole


def test_cut_in_a_block_and_written_anew(backend: str) -> None:
    world = World(Quest(), backend)
    one = world.open(list(range(3 * BLOCK)))
    other = world.fork(one)
    world.truncate(one, BLOCK + 3)
    world.grow({one: [49] * (2 * BLOCK)})
    check_bounds(world)  # the fork has the blocks of before
    hit = world.alloc.sequence(world.tokens[other] + [1])
    assert hit.num_cached_tokens == 3 * BLOCK
    world.tokens[hit] = list(world.tokens[other])
    check_bounds(world)


def test_draft_tokens_that_are_taken_back(backend: str) -> None:
    world = World(Quest(), backend)
    one = world.open(list(range(BLOCK - 2)))
    world.grow({one: [7, 8, 9, 10]}, commit=False)  # completes the block
    world.truncate(one, BLOCK - 1)
    one.commit([7])
    world.grow({one: [30]})
    check_bounds(world)


@pytest.mark.parametrize("cut", [8 * BLOCK, 8 * BLOCK + 5])
@pytest.mark.parametrize("forked", [False, True])
def test_a_part_of_a_segment_is_scored_by_means(forked: bool, cut: int, backend: str) -> None:
    """Who has a part of a prompt, from a fork or after a cut, cannot have the centroids of the rest."""
    world = World(Clustered(), backend)
    one = world.open([n % 50 for n in range(16 * BLOCK)])
    part = world.fork(one) if forked else one
    world.truncate(part, cut)
    for new in (0, 2 * BLOCK):  # then with other centroids where those of the rest were
        if new:
            world.grow({part: [n % 7 for n in range(new)]})
        batch, m = world.alloc.batch([part], new_tokens=[0]), len(world.tokens[part]) // BLOCK
        labels = world.summary(part, 0, "k_labels")[:, : BLOCK * HEADS].view(-1, BLOCK, HEADS).long()
        target, ids = labels + torch.arange(m).view(-1, 1, 1), Segments.ids(world, part, 0)
        assert (target[:8] >= 8).any(), "some tokens had their centroid in the rest"
        assert not new or ids[0] != ids[-1]
        vectors = world.summary(part, 0, "k_centroids").view(m, 2, HEADS, WIDTH).double()
        q = torch.randn(1, 1, HEADS, 1, WIDTH, dtype=torch.float64)
        scores = torch.empty(m, BLOCK, HEADS, dtype=torch.float64)
        for block, token, head in itertools.product(range(m), range(BLOCK), range(HEADS)):
            at = int(target[block, token, head])
            cut_off = not 0 <= at < m or ids[at] != ids[block]
            scores[block, token, head] = q[0, 0, head, 0] @ (vectors[block, 1] if cut_off else vectors[at, 0])[head]
        view = LayerView(world.alloc, 0, batch, -(-len(world.tokens[part]) // BLOCK))
        found = Clustered().logits(q, view, 1.0)[0, 0, :, 0, :m]
        torch.testing.assert_close(found, scores.logsumexp(1).T, atol=1e-9, rtol=1e-9)


def test_summaries_come_back_from_a_tier(backend: str) -> None:
    world = World(Quest(), backend, memory="256KiB", policy="lru", tiers=Tiers(host="1MiB"))
    prompt = [n % 50 for n in range(12 * BLOCK)]
    world.free(world.open(prompt))
    for n in range(3):  # fill the device with others
        world.free(world.open([(n + 3 * i) % 50 for i in range(40 * BLOCK)]))
    assert world.alloc.match([*prompt, 1]).by_tier["host"] > 0
    hit = world.alloc.sequence([*prompt, 1])
    assert hit.num_cached_tokens == len(prompt)
    world.tokens[hit] = prompt
    check_bounds(world)


def test_moved_and_written_by_hand(backend: str) -> None:
    """compact() moves blocks with their summaries; ``first_token`` makes those of K that was written without any."""
    world = World(Quest(), backend)
    first, second = world.open([1] * 40), world.open([n % 50 for n in range(80)])
    world.free(first)
    world.alloc.clear_cache()
    world.alloc.compact()
    check_bounds(world)
    batch = world.alloc.batch([second], new_tokens=[0])
    ids = batch.block_table[0].long()
    for layer in range(LAYERS):
        world.alloc.tensor(layer, "k_bounds")[ids] = 0.0
        world.chooser.update(layer, batch)  # nothing is new
        assert not world.summary(second, layer, "k_bounds").any()
        world.chooser.update(layer, batch, first_token=0)
    check_bounds(world)
