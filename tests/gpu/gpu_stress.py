"""Random operations on an allocator while kernels read and write its memory: every token carries a pattern that follows
from the ids up to it, and whatever a kernel finds elsewhere is counted, on the device, without waiting for it.

    python tests/gpu/gpu_stress.py --seconds 60 [--device cpu] [--backend paged] [--seed N]

Needs kvmem installed, or PYTHONPATH=. ; under compute-sanitizer: make sanitize-gpu.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np
import torch

import kvmem
from kvmem.kernels.checks import all_tokens

LAYERS = 3
SLEEP_CYCLES = 300_000  # about 0.2 ms before each read, so that what follows on the host overtakes it


@dataclass
class Live:
    seq: kvmem.Sequence
    ids: list[int]  # committed
    chain: list[int]  # per token, a number that follows from all ids up to it


class Stress:
    """One allocator under random calls. ``errors`` counts, on the device, tokens that held something else."""

    def __init__(self, *, device: str, backend: str, seed: int) -> None:
        on_gpu = device != "cpu"
        self.rng, self.device, self.backend = random.Random(seed), torch.device(device), backend
        shape = (4, 128) if on_gpu else (2, 8)  # 12 KiB a token of all layers: 170 in a page of 2 MiB
        spec = kvmem.CacheSpec.kv(
            num_layers=LAYERS, num_kv_heads=shape[0], head_dim=shape[1], dtype=torch.int16, block_size=16
        )  # fmt: skip
        page = {} if on_gpu else {"page_bytes": 4096}
        self.page_bytes = 2 << 20 if on_gpu else 4096
        self.pages = 64 if on_gpu else 160
        self.alloc = kvmem.Allocator(
            spec, backend=backend, device=device, memory=self.pages * self.page_bytes, max_sequences=10,
            max_tokens=2000 if on_gpu else 600, map_ahead_tokens=64, **page,
        )  # fmt: skip
        self.lengths = (1, 1, 1, 7, 60, 300) if on_gpu else (1, 1, 1, 7, 60, 130)
        self.live: list[Live] = []
        self.prompts = [[self.rng.randrange(50_000) for _ in range(self.alloc.max_tokens // 2)] for _ in range(4)]
        self.errors = torch.zeros((), dtype=torch.int64, device=self.device)
        width = torch.arange(shape[0] * shape[1], dtype=torch.int64, device=self.device)
        self.lanes = (width * 0x27D4EB2F + 1).view(1, *shape)
        self.done: Counter[str] = Counter()
        self.last: deque[str] = deque(maxlen=30)

    # ---- Kernels ----

    def pattern(self, chain: torch.Tensor, place: int) -> torch.Tensor:
        """int16 ``[tokens, heads, width]``."""
        mixed = (chain + place * 0x51ED27).view(-1, 1, 1) * self.lanes
        return (mixed >> 24).to(torch.int16)

    def upload(self, numbers: list[int] | np.ndarray) -> torch.Tensor:
        return torch.tensor(np.asarray(numbers, np.int64), device=self.device)

    def places(self) -> list[tuple[int, str, int]]:
        return [(layer, name, 2 * layer + i) for layer in range(LAYERS) for i, name in enumerate(("k", "v"))]

    def write(self, one: Live, chain: list[int]) -> None:
        """The reserved tokens of one sequence, in every layer."""
        batch, numbers = self.alloc.batch([one.seq], new_tokens=[len(chain)]), self.upload(chain)
        for layer, name, place in self.places():
            all_tokens(self.alloc.tensor(layer, name))[batch.slot_mapping] = self.pattern(numbers, place)

    def read(self, some: list[Live]) -> None:
        """Every token of some sequences, in one layer, by block table; nothing waits for the result."""
        some = [one for one in some if one.ids]
        if not some:
            return
        batch = self.alloc.batch([one.seq for one in some], new_tokens=[0] * len(some))
        size = batch.block_size
        row = self.upload(np.repeat(np.arange(len(some)), [len(one.ids) for one in some]))
        position = self.upload(np.concatenate([np.arange(len(one.ids)) for one in some]))
        chain = self.upload(np.concatenate([one.chain for one in some]))
        slots = batch.block_table[row, position // size].long() * size + position % size
        if self.device.type == "cuda":
            torch.cuda._sleep(SLEEP_CYCLES)
        for layer, name, place in self.rng.sample(self.places(), 2):
            found = all_tokens(self.alloc.tensor(layer, name))[slots]
            self.errors += (found != self.pattern(chain, place)).flatten(1).any(1).sum()

    # ---- Operations ----

    def open(self) -> None:
        if len(self.live) == self.alloc.max_sequences:
            return
        prompt = self.rng.choice(self.prompts)[: self.rng.randrange(1, self.alloc.max_tokens // 2)]
        seq = self.alloc.sequence(prompt, salt=self.rng.choice([None, None, None, "other"]))
        cached = seq.num_cached_tokens
        one = Live(seq, prompt[:cached], extend_chain([], prompt[:cached]))
        self.live.append(one)
        self.done["cached tokens"] += cached
        self.read([one])
        self.grow(one, prompt[cached : cached + self.rng.choice(self.lengths)])

    def grow(self, one: Live, ids: list[int]) -> None:
        ids = ids[: self.alloc.max_tokens - len(one.ids)]
        if not one.seq.try_extend(len(ids)):
            self.done["out of memory"] += 1
            return
        chain = extend_chain(one.chain, ids)
        self.write(one, chain)
        one.seq.commit(ids)
        one.ids += ids
        one.chain += chain

    def extend(self) -> None:
        for one in self.rng.sample(self.live, min(len(self.live), 4)):
            self.grow(one, [self.rng.randrange(50_000) for _ in range(self.rng.choice(self.lengths))])

    def reject(self) -> None:
        """Drafts that are reserved and written, and then not committed."""
        one = self.rng.choice(self.live)
        room = min(5, self.alloc.max_tokens - len(one.ids))
        if one.seq.try_extend(room):
            self.write(one, list(range(room)))
            one.seq.truncate(len(one.ids))

    def fork(self) -> None:
        one = self.rng.choice(self.live)
        if len(self.live) == self.alloc.max_sequences:
            return
        try:
            child = one.seq.fork()
        except kvmem.OutOfMemory:
            self.done["out of memory"] += 1
            return
        self.live.append(Live(child, list(one.ids), list(one.chain)))
        self.read(self.live[-1:])

    def truncate(self) -> None:
        one = self.rng.choice(self.live)
        keep = self.rng.randrange(len(one.ids) + 1)
        one.seq.truncate(keep)
        del one.ids[keep:], one.chain[keep:]

    def free(self) -> None:
        for one in self.rng.sample(self.live, self.rng.randint(1, min(3, len(self.live)))):
            self.live.remove(one)
            one.seq.free()

    def trim(self) -> None:
        self.alloc.trim(None if self.rng.random() < 0.3 else self.rng.randrange(1, 8) * self.page_bytes)

    def set_memory(self) -> None:
        try:
            self.alloc.set_memory(self.rng.randrange(self.pages // 3, self.pages + 1) * self.page_bytes)
        except kvmem.OutOfMemory:
            self.done["out of memory"] += 1

    def clear_cache(self) -> None:
        self.alloc.clear_cache()

    def step(self) -> None:
        weights = {
            self.open: 4, self.extend: 12, self.reject: 2, self.fork: 2, self.truncate: 1, self.free: 3, self.trim: 1,
            self.set_memory: 1, self.clear_cache: 0.2,
        }  # fmt: skip
        call = self.rng.choices(list(weights), list(weights.values()))[0] if self.live else self.open
        self.last.append(call.__name__)
        self.done[call.__name__] += 1
        call()
        if self.live:
            self.read(self.rng.sample(self.live, min(3, len(self.live))))

    def verify(self) -> None:
        """Waits for the kernels. ``AssertionError`` if one found what does not belong there."""
        self.read(self.live)
        wrong = int(self.errors.item())
        assert wrong == 0, f"{wrong} tokens held something else, after {', '.join(self.last)}"
        assert self.alloc.check() == []

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(20):
                self.step()
            self.verify()


def extend_chain(chain: list[int], ids: list[int]) -> list[int]:
    """Of the tokens ``ids`` that come after those of ``chain``."""
    made, last = [], chain[-1] if chain else 1
    for token in ids:
        last = ((last ^ token) * 0x5851F42D4C957F2D + 0x14057B7EF767814F) & ((1 << 62) - 1)
        made.append(last)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", choices=["virtual", "paged", "both"], default="both")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    given = parser.parse_args()
    print(f"seed: {given.seed} (repeat with --seed)", flush=True)
    backends = ["virtual", "paged"] if given.backend == "both" else [given.backend]
    for backend in backends:
        stress = Stress(device=given.device, backend=backend, seed=given.seed)
        stress.run(given.seconds / len(backends))
        print(f"{backend}: " + ", ".join(f"{n} {what}" for what, n in sorted(stress.done.items())), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
