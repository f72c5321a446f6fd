"""What every tier must do, whatever it stores in. A test file derives a class from :class:`TierSuite` for each tier."""

from __future__ import annotations

import mmap
import random
import threading
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import pytest
from support import LONG

from kvmem.errors import SpecError, TierError
from kvmem.tiers import Result, Status, Tier

LARGEST = 5000  # the largest payload of the suite's tiers: no multiple of any alignment


def key_of(n: int) -> bytes:
    return blake2b(n.to_bytes(8, "little"), digest_size=32).digest()


def payload_of(key: bytes, version: int, size: int) -> bytes:
    """Bytes that follow from key and version; the version is readable from the first eight where there are so many."""
    content = random.Random(key + version.to_bytes(8, "little")).randbytes(max(0, size - 8))
    return (version.to_bytes(8, "little") + content)[:size]


def put(tier: Tier, contents: dict[bytes, bytes]) -> list[Result]:
    return tier.put(list(contents), [memoryview(data) for data in contents.values()])


def get(tier: Tier, key: bytes, room: int = LARGEST) -> bytes | Result:
    """The payload of a key, or the result that says why not."""
    buffer = bytearray(room)
    (result,) = tier.get([key], [memoryview(buffer)])
    return bytes(buffer[: result.num_bytes]) if result.ok else result


def assert_miss(tier: Tier, key: bytes) -> None:
    result = get(tier, key)
    assert isinstance(result, Result) and result.status is Status.MISS, result
    assert result.num_bytes == 0 and result.reason
    assert tier.contains([key]) == 0


class TierSuite:
    """The subclass has a fixture ``make(num_blocks=64)``: it opens an empty tier that holds that many payloads of up to
    ``LARGEST`` bytes. The fixture closes what it opened."""

    bounded = True  # never holds more than num_blocks, and refuses a payload above LARGEST; a remote store may not
    overhead_bytes = 0  # by which what it says it uses may differ between two answers
    steps = 10_000 if LONG else 400  # of a random walk; half as many for each thread

    def test_empty(self, make: Callable[..., Tier]) -> None:
        tier = make()
        assert tier.name and isinstance(tier.name, str)
        assert_miss(tier, key_of(0))
        assert tier.contains([]) == 0 and tier.get([], []) == [] and tier.put([], []) == [] and tier.delete([]) == []
        assert tier.capacity().num_blocks == 0

    @pytest.mark.parametrize("size", [0, 1, 95, 96, 511, 512, 4000, 4095, 4096, 4097, LARGEST])
    def test_round_trip(self, make: Callable[..., Tier], size: int) -> None:
        tier, key = make(), key_of(size)
        data = payload_of(key, 1, size)
        assert put(tier, {key: data}) == [Result(Status.OK, size)]
        assert get(tier, key) == data
        assert get(tier, key, size) == data  # no byte of room to spare
        assert tier.contains([key]) == 1

    def test_a_batch_answers_in_order(self, make: Callable[..., Tier]) -> None:
        tier = make()
        stored = {key_of(n): payload_of(key_of(n), 1, 100 * n) for n in range(10)}
        assert [r.num_bytes for r in put(tier, stored)] == [100 * n for n in range(10)]
        keys = [key_of(n) for n in (9, 70, 0, 3, 71, 3)]
        buffers = [bytearray(LARGEST) for _ in keys]
        results = tier.get(keys, [memoryview(b) for b in buffers])
        assert [r.ok for r in results] == [True, False, True, True, False, True]
        for key, buffer, result in zip(keys, buffers, results, strict=True):
            if result.ok:
                assert buffer[: result.num_bytes] == stored[key]
            else:
                assert result.status is Status.MISS and result.reason

    def test_contains_counts_the_leading_run(self, make: Callable[..., Tier]) -> None:
        tier = make()
        put(tier, {key_of(n): b"x" for n in (0, 1, 3)})
        assert tier.contains([key_of(n) for n in range(5)]) == 2
        assert tier.contains([key_of(n) for n in (3, 1, 0)]) == 3
        assert tier.contains([key_of(n) for n in (2, 0, 1)]) == 0

    @pytest.mark.parametrize("sizes", [(100, 100), (100, 4500), (4500, 100), (LARGEST, 0)])
    def test_a_new_payload_replaces_the_old_one(self, make: Callable[..., Tier], sizes: tuple[int, int]) -> None:
        tier, key = make(), key_of(0)
        for version, size in enumerate(sizes):
            assert put(tier, {key: payload_of(key, version, size)})[0].ok
            assert get(tier, key) == payload_of(key, version, size)
        assert tier.capacity().num_blocks == 1

    def test_equal_keys_in_one_batch(self, make: Callable[..., Tier]) -> None:
        tier, key = make(), key_of(0)
        data = [payload_of(key, version, 300) for version in range(3)]
        results = tier.put([key] * 3, [memoryview(d) for d in data])
        assert any(r.ok for r in results)
        assert get(tier, key) in data
        assert tier.capacity().num_blocks == 1

    def test_a_put_does_not_keep_the_buffer(self, make: Callable[..., Tier]) -> None:
        tier, key = make(), key_of(0)
        buffer = bytearray(payload_of(key, 1, 700))
        assert tier.put([key], [memoryview(buffer)])[0].ok
        buffer[:] = bytes(700)
        assert get(tier, key) == payload_of(key, 1, 700)

    def test_a_smaller_buffer_is_a_miss(self, make: Callable[..., Tier]) -> None:
        tier, key = make(), key_of(0)
        put(tier, {key: payload_of(key, 1, 1000)})
        for room in (0, 1, 904, 999):
            result = get(tier, key, room)
            assert isinstance(result, Result) and result.status is Status.MISS and "1000" in result.reason, result
        assert get(tier, key) == payload_of(key, 1, 1000)

    @pytest.mark.parametrize("shift", [0, 1, 64, 512])
    def test_nothing_is_written_beside_a_buffer(self, make: Callable[..., Tier], shift: int) -> None:
        """Buffers on pages and off them, which end anywhere."""
        tier, key = make(), key_of(0)
        for size, room in ((1000, 1000), (1000, 1001), (4096, 4096), (4097, 4097), (300, LARGEST)):
            data = payload_of(key, size, size)
            around = mmap.mmap(-1, 20480)
            around[shift + 8192 : shift + 8192 + size] = data
            whole = memoryview(around)
            assert tier.put([key], [whole[shift + 8192 : shift + 8192 + size]])[0].ok
            around[:] = b"\x5a" * 20480
            assert tier.get([key], [whole[shift + 8192 : shift + 8192 + room]])[0] == Result(Status.OK, size)
            assert around[shift + 8192 : shift + 8192 + size] == data
            assert not around[: shift + 8192].strip(b"\x5a") and not around[shift + 8192 + room :].strip(b"\x5a")

    def test_delete(self, make: Callable[..., Tier]) -> None:
        tier = make()
        put(tier, {key_of(n): b"x" * 10 for n in range(3)})
        assert [r.status for r in tier.delete([key_of(1), key_of(7)])] == [Status.OK, Status.MISS]
        assert_miss(tier, key_of(1))
        assert get(tier, key_of(0)) == get(tier, key_of(2)) == b"x" * 10
        assert [r.status for r in tier.delete([key_of(1)])] == [Status.MISS]
        assert put(tier, {key_of(1): b"new"})[0].ok and get(tier, key_of(1)) == b"new"

    def test_capacity(self, make: Callable[..., Tier]) -> None:
        tier = make()
        put(tier, {key_of(n): b"x" * 4000 for n in range(5)})
        seen = tier.capacity()
        assert seen.num_blocks == 5 and seen.used_bytes >= 5 * 4000
        assert seen.total_bytes is None or seen.used_bytes <= seen.total_bytes
        tier.delete([key_of(n) for n in range(4)])
        assert (
            tier.capacity().num_blocks == 1
            and 4000 <= tier.capacity().used_bytes < seen.used_bytes + self.overhead_bytes
        )

    def test_more_than_fits(self, make: Callable[..., Tier]) -> None:
        """Each put is answered, the tier stays within its bounds, and what it still has is right."""
        tier = make(num_blocks=4)
        held = 0
        for n in range(20):
            (result,) = put(tier, {key_of(n): payload_of(key_of(n), n, LARGEST)})
            assert result.status in (Status.OK, Status.FULL), result
            assert not result.ok or get(tier, key_of(n)) == payload_of(key_of(n), n, LARGEST)
            assert not self.bounded or tier.capacity().num_blocks <= 4
        for n in range(20):
            data = get(tier, key_of(n))
            if isinstance(data, Result):
                assert data.status is Status.MISS
            else:
                assert data == payload_of(key_of(n), n, LARGEST)
                held += 1
        assert held >= 1 and held == tier.capacity().num_blocks

    def test_a_batch_larger_than_the_tier(self, make: Callable[..., Tier]) -> None:
        tier = make(num_blocks=4)
        stored = {key_of(n): payload_of(key_of(n), n, LARGEST) for n in range(11)}
        results = put(tier, stored)
        assert len(results) == 11 and all(r.status in (Status.OK, Status.FULL) for r in results)
        found = [get(tier, key) for key in stored]
        assert all(isinstance(got, Result) or got == want for got, want in zip(found, stored.values(), strict=True))
        assert any(isinstance(got, bytes) for got in found)

    def test_a_payload_that_is_too_large(self, make: Callable[..., Tier]) -> None:
        if not self.bounded:
            pytest.skip("this store takes payloads of any size")
        tier = make()
        put(tier, {key_of(0): b"x"})
        results = put(tier, {key_of(1): b"y", key_of(2): bytes(LARGEST + 1), key_of(3): b"z"})
        assert [r.status for r in results] == [Status.OK, Status.FULL, Status.OK] and str(LARGEST) in results[1].reason
        assert_miss(tier, key_of(2))
        assert [get(tier, key_of(n)) for n in (0, 1, 3)] == [b"x", b"y", b"z"]

    @pytest.mark.parametrize("bad", [b"short", b"x" * 33, "x" * 32, bytearray(32), None, 7])
    def test_keys_of_another_form(self, make: Callable[..., Tier], bad: Any) -> None:
        tier, buffer = make(), memoryview(bytearray(8))
        calls: list[Callable[[], object]] = [
            lambda: tier.contains([key_of(0), bad]),
            lambda: tier.get([key_of(0), bad], [buffer, buffer]),
            lambda: tier.put([key_of(0), bad], [buffer, buffer]),
            lambda: tier.delete([key_of(0), bad]),
        ]
        for call in calls:
            with pytest.raises(SpecError, match="keys"):
                call()
        assert_miss(tier, key_of(0))  # a refused call changed nothing

    def test_buffers_of_another_form(self, make: Callable[..., Tier]) -> None:
        tier, good = make(), memoryview(bytearray(8))
        bad: list[Any] = [bytearray(8), None, good[::2], memoryview(bytearray(8)).cast("i")]
        for buffer in bad:
            for call in (tier.get, tier.put):
                with pytest.raises(SpecError, match="buffers"):
                    call([key_of(0), key_of(1)], [good, buffer])
        for call in (tier.get, tier.put):
            with pytest.raises(SpecError, match="buffers"):
                call([key_of(0), key_of(1)], [good])
        with pytest.raises(SpecError, match="read-only"):
            tier.get([key_of(0)], [memoryview(b"immutable")])
        assert_miss(tier, key_of(0))

    def test_use_after_close(self, make: Callable[..., Tier]) -> None:
        tier, buffer = make(), memoryview(bytearray(8))
        with tier as same:
            assert same is tier
            put(tier, {key_of(0): b"x"})
        tier.close()
        calls: list[Callable[[], object]] = [
            lambda: tier.contains([key_of(0)]),
            lambda: tier.get([key_of(0)], [buffer]),
            lambda: tier.put([key_of(0)], [buffer]),
            lambda: tier.delete([key_of(0)]),
            tier.capacity,
        ]
        for call in calls:
            with pytest.raises(TierError, match="closed"):
                call()

    def test_random_walk(self, make: Callable[..., Tier], rng: random.Random) -> None:
        """Every answer is compared with a dict. The keys fit, so nothing may be lost."""
        tier, model = make(num_blocks=32), dict[bytes, bytes]()
        for step in range(self.steps):
            keys = [key_of(n) for n in rng.sample(range(24), rng.randint(1, 6))]
            kind = rng.choice(("put", "put", "get", "get", "contains", "delete"))
            if kind == "put":
                contents = {key: payload_of(key, step, rng.randint(0, LARGEST)) for key in keys}
                assert [r.status for r in put(tier, contents)] == [Status.OK] * len(keys)
                model.update(contents)
            elif kind == "get":
                buffers = [bytearray(LARGEST) for _ in keys]
                for key, buffer, result in zip(
                    keys, buffers, tier.get(keys, [memoryview(b) for b in buffers]), strict=True
                ):
                    assert result.ok == (key in model), (step, result)
                    assert not result.ok or buffer[: result.num_bytes] == model[key], step
            elif kind == "contains":
                assert tier.contains(keys) == next((i for i, key in enumerate(keys) if key not in model), len(keys))
            else:
                assert [r.ok for r in tier.delete(keys)] == [key in model for key in keys]
                for key in keys:
                    model.pop(key, None)
            assert tier.capacity().num_blocks == len(model)
        assert {key: get(tier, key) for key in model} == model

    def test_threads(self, make: Callable[..., Tier], seed: int) -> None:
        """Four threads on six keys, in a tier with room for four: each payload found is one that was put under its key."""
        tier, errors, found = make(num_blocks=4), list[BaseException](), list[int]()

        def work(name: int) -> None:
            rng = random.Random(f"{seed} {name}")
            try:
                for step in range(self.steps // 2):
                    keys = [key_of(n) for n in rng.sample(range(6), 2)]
                    if (kind := rng.randrange(8)) < 3:
                        put(tier, {key: payload_of(key, step, rng.randint(8, LARGEST)) for key in keys})
                    elif kind < 7:
                        for key in keys:
                            data = get(tier, key)
                            if not isinstance(data, Result):
                                assert data == payload_of(key, int.from_bytes(data[:8], "little"), len(data))
                                found.append(1)
                    else:
                        tier.delete(keys)
            except BaseException as e:  # noqa: BLE001 - shown by the test's own thread
                errors.append(e)

        threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        assert found, "no thread ever found a payload"

    def test_close_while_threads_use_it(self, make: Callable[..., Tier]) -> None:
        """A call that runs is answered or meets the closed tier; none hangs, and nothing else is raised."""
        tier, errors, under_way = make(), list[BaseException](), threading.Barrier(4)

        def work(name: int) -> None:
            under_way.wait()
            try:
                for n in range(10**6):
                    put(tier, {key_of(n % 8): payload_of(key_of(n % 8), name, 3000)})
                    get(tier, key_of(n % 8))
            except BaseException as e:  # noqa: BLE001 - judged by the test's own thread
                errors.append(e)

        threads = [threading.Thread(target=work, args=(name,)) for name in range(3)]
        for thread in threads:
            thread.start()
        under_way.wait()
        tier.close()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert len(errors) == 3 and all(isinstance(e, TierError) and "closed" in str(e) for e in errors), errors
