"""After a loss of power each block is right or absent, whatever the disk did with what was not synced."""

from __future__ import annotations

import random

from disk_simulated import SimulatedFiles
from disk_support import open_disk, version_in
from support import LONG
from tier_suite import get, key_of, payload_of, put

from kvmem.tiers import Result

KEYS = [key_of(n) for n in range(9)]


def test_power_loss(seed: int) -> None:
    """2,000 images, taken within puts, deletes and openings. KVMEM_LONG=1: 20,000."""
    images = found = gone = 0
    rng, wanted = random.Random(seed), 20_000 if LONG else 2_000
    while images < wanted:
        files, deleted = SimulatedFiles(), set[bytes]()

        def after_write(files: SimulatedFiles = files, deleted: set[bytes] = deleted) -> None:
            nonlocal images, found, gone
            if rng.random() < 0.7:
                return
            images += 1
            image = files.after_power_loss(rng)
            with open_disk("disk", files=image, read_only=rng.random() < 0.5) as tier:
                for key in KEYS:
                    data = get(tier, key, 6000)
                    if isinstance(data, Result):
                        gone += 1
                        continue
                    version_in(key, data)
                    assert key not in deleted, "a deleted key came back"
                    found += 1

        files.after_write = after_write
        for _ in range(2):  # the second opening recovers what the first wrote
            with open_disk("disk", files=files) as tier:
                for step in range(rng.randint(5, 15)):
                    keys = rng.sample(KEYS, rng.randint(1, 3))
                    if rng.random() < 0.8:
                        deleted.difference_update(keys)
                        contents = {key: payload_of(key, step, rng.choice((8, 500, 4096, 5000, 6000))) for key in keys}
                        assert all(r.ok for r in put(tier, contents))
                    else:
                        tier.delete(keys)
                        deleted.update(keys)
        lasting = all(not inode.pending for name, inode in files.inodes.items() if name.startswith("segment"))
        assert lasting, "close() left something unsynced"
    assert found > wanted and gone > wanted / 2, (found, gone)


def test_what_was_closed_survives(rng: random.Random) -> None:
    """Not promised for a tier that runs, but a closed one loses nothing."""
    files = SimulatedFiles()
    with open_disk("disk", files=files) as tier:
        contents = {key: payload_of(key, 1, 5000) for key in KEYS[:6]}
        put(tier, contents)
    for _ in range(20):
        with open_disk("disk", files=files.after_power_loss(rng)) as tier:
            assert {key: get(tier, key, 6000) for key in contents} == contents
