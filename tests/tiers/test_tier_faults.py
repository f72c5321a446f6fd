"""What a tier does wrong is a block that is not found: never a wrong byte, never an error in a step."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from support import Steps
from support_world import checked
from tier_world import SPECS, DictTier, Prompts, World, make, prompts

import kvmem
from kvmem.tiers import Capacity, Identity, Result, Status, Tiers
from kvmem.tiers.base import Buffer

pytestmark = pytest.mark.core


class WorstTier(DictTier):
    """Fails, raises, forgets, is full, or returns too little, at random."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng = rng

    def _check(self) -> None:
        if self.rng.random() < 0.1:
            raise RuntimeError("this tier breaks its promise")

    def get(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        results = super().get(keys, buffers)
        for i, status in enumerate(self.rng.choices([None, *Status], k=len(results))):
            if status in (Status.MISS, Status.CORRUPT, Status.FAILED):
                buffers[i][:] = b"\xee" * len(buffers[i])  # what a buffer of a failed get holds is undefined
                results[i] = Result(status, 0, "at random")
            elif status is Status.FULL and results[i].ok:
                results[i] = Result(Status.OK, results[i].num_bytes - 1)
        return results

    def put(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        self.fails = self.rng.random() < 0.2
        try:
            return super().put(keys, buffers)
        finally:
            self.fails = False


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_tier_that_does_everything_wrong(
    name: str, backend: str, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(seed)
    world = World(make(name, backend, host_blocks=4, lower=[WorstTier(rng), DictTier(most=6)], debug=False))
    texts = prompts(rng, 10)
    for _ in range(80):
        world.run(rng.choice(texts), load=rng.choice(["host", "all"]))
    assert world.alloc.check() == []
    world.alloc.close()
    assert len([r for r in caplog.records if r.name == "kvmem"]) <= 4, "one line for each kind of fault and minute"


@pytest.mark.parametrize("verb", ["load", "store", "map", "copy", "record"])
def test_a_driver_that_fails_while_blocks_move(verb: str, backend: str, seed: int) -> None:
    """Each such call raises and changes nothing; the blocks are found later, or computed again."""
    rng, driver = random.Random(seed), checked()
    world = World(make("window", backend, host_blocks=20, driver=driver))
    texts, failed, loop = Prompts(rng, 8), 0, Steps(120)
    seldom = backend == "paged" and verb in ("map", "copy")  # an admission without the copy does instead
    while loop.next(world.hits > 0 and (failed > 0 or seldom)):
        if rng.random() < 0.4:
            driver.fail(verb, rng.randrange(1, 6), rng.choice([2, 719]))
        try:
            world.run(texts.next())
        except (kvmem.DeviceError, kvmem.OutOfMemory):
            failed += 1
        driver.clear_failures()
        world.alloc.free_batch([live.id for live in world.alloc.sequences()])
        assert world.alloc.check() == []


def test_refusals(backend: str) -> None:
    spec, tier = SPECS["full"](), DictTier()
    sizes = {"backend": backend, "device": "cpu", "memory": "1MiB", "max_sequences": 2, "max_tokens": 64}
    for options, words in [
        ({"host": 100}, "host: got 100 bytes; a block of each group takes"),
        ({"host": "many"}, "host: "),
        ({"host": "1MiB", "lower": [tier]}, "identity: missing"),
        ({"host": "1MiB", "lower": tier}, "lower: got .* must be a list of tiers"),
        ({"host": "1MiB", "lower": ["disk"]}, "lower: got"),
        ({"host": "1MiB", "identity": "llama"}, "identity: got 'llama'"),
        ({"host": "1MiB", "write": "around"}, "write: got 'around'"),
        ({"host": "1MiB", "admit": "never"}, "admit: got 'never'"),
        ({"host": "1MiB", "policy": "random"}, "random"),
        ({"host": "1MiB", "deadline_seconds": 0}, "deadline_seconds: got 0; must be a number above 0"),
    ]:
        with pytest.raises(kvmem.SpecError, match=words):
            kvmem.Allocator(spec, tiers=Tiers(**options), **sizes)  # type: ignore[arg-type]
    with pytest.raises(kvmem.SpecError, match="tiers: got DictTier; must be Tiers"):
        kvmem.Allocator(spec, tiers=tier, **sizes)  # type: ignore[arg-type]
    with pytest.raises(kvmem.SpecError, match="not that of one that follows its ops"):
        where = Tiers(host="1MiB", lower=[tier], identity=Identity("m"))
        kvmem.Allocator(spec, tiers=where, record_ops=True, **sizes)  # type: ignore[arg-type]
    with pytest.raises(kvmem.SpecError, match="nothing is shared"):
        kvmem.Allocator(spec, tiers=Tiers(host="1MiB"), prefix_cache=False, **sizes)  # type: ignore[arg-type]
    with pytest.raises(kvmem.SpecError, match='device "meta" has no bytes'):
        where = Tiers(host="1MiB", lower=[tier], identity=Identity("m"))
        kvmem.Allocator(spec, tiers=where, **{**sizes, "device": "meta", "memory": "64MiB"})  # type: ignore[arg-type]
    for model, rank, ranks in [("", 0, 1), (None, 0, 1), ("m", 2, 2), ("m", -1, 2), ("m", "0", 1)]:
        with pytest.raises(kvmem.SpecError):
            Identity(model, rank=rank, ranks=ranks)  # type: ignore[arg-type]
    alloc = kvmem.Allocator(spec, tiers=Tiers(host="1MiB"), **sizes)  # type: ignore[arg-type]
    with pytest.raises(kvmem.SpecError, match="load: got 'disk'"):
        alloc.sequence([1], load="disk")  # type: ignore[arg-type]
    with pytest.raises(kvmem.SpecError, match="to: got 'disk'"):
        alloc.prefetch([1], to="disk")  # type: ignore[arg-type]
    assert Capacity(None, 0, 0) == tier.capacity()
