"""Blocks below the device: which host slot and which lower tier has what, and the moves between them.

The device's blocks go to host slots when they are evicted, inside the core (``csrc/allocator/tiers.h``). This module
knows what the slots hold: it follows the core's queue of moves and names each block by its key
(``kvmem.tiers.keys``). From the slots, blocks go to the lower tiers (disk, remote), and back to the slots and to the
device, in the canonical form of ``kvmem.tiers.slot_form``.

Two rules keep wrong bytes out. A slot is used only under its generation, which the core checks. And threads of the
transfer engine touch host slots that they hold, never the device's memory: what they have verified is copied to the
device by a call of the allocator, like everything else that changes it.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from math import lcm
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvmem import _core
from kvmem.allocator.tiers.events import Facts, TierEvents
from kvmem.allocator.tiers.loads import Block, Load
from kvmem.allocator.tiers.moves import Batch, Moves
from kvmem.allocator.tiers.places import Located, Prompt
from kvmem.allocator.tiers.transfers import Transfers
from kvmem.arguments import parse_bytes
from kvmem.errors import OutOfMemory, SpecError
from kvmem.events.digests import ExtraKey, encode_key, key_marks, placed
from kvmem.events.stream import Event
from kvmem.geometry.group_layout import GroupLayout
from kvmem.spec import CacheSpec
from kvmem.tiers.base import Tier
from kvmem.tiers.config import Tiers
from kvmem.tiers.keys import BlockKeys, Identity
from kvmem.tiers.slot_form import SlotForm

if TYPE_CHECKING:
    import numpy.typing as npt

    Ids = npt.NDArray[np.int32]
    Name = tuple[int, int]  # a host slot and its generation

__all__ = ["MOVE_TOKENS", "Tiering", "open_tiers"]

MOVE_TOKENS = 1 << 20  # tokens in the core's queue of moves; where a call moves more, some slots lose their names


class Tiering:
    """The tiers of one allocator. Thread-safe.

    core: an allocator's, with host slots opened and a queue of moves. layouts: by group. counts: of slots by group.
    tiers: below the host, the fastest first. block_size: tokens of a block of the index.
    write, admit, deadline_seconds: as in ``Tiers``. Three quarters of all blocks are never read again, so
        ``"second_use"`` saves most of a disk's writes.
    """

    def __init__(
        self,
        core: _core.Allocator,
        spec: CacheSpec,
        layouts: Sequence[GroupLayout],
        *,
        fingerprint: bytes,
        counts: Sequence[int],
        tiers: Sequence[Tier],
        block_size: int,
        write: str,
        admit: str,
        deadline_seconds: float,
    ) -> None:
        self.core, self.tiers, self.counts, self.layouts = core, tuple(tiers), list(counts), tuple(layouts)
        self.block_keys = BlockKeys(fingerprint, block_size)
        self.block_size = block_size
        self.kinds = ["state" if g.growth == "fixed" else "window" if g.window_tokens else "full" for g in spec.groups]
        self.full_groups = [g for g, kind in enumerate(self.kinds) if kind == "full"]
        self.other_groups = [g for g, kind in enumerate(self.kinds) if kind != "full"]
        self.forms = [
            SlotForm(layout, 1 if kind == "state" else block_size)
            for layout, kind in zip(layouts, self.kinds, strict=True)
        ]
        self._write, self._admit = write, admit
        self.counters: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._taken = 0  # the last batch of moves that was received
        self._batch: Batch | None = None  # the latest
        self._moves = Moves(self.block_keys)
        self._lost = 0  # core.lost_slots() when names were compared with the slots
        self._host: list[OrderedDict[bytes, Name]] = [OrderedDict() for _ in spec.groups]  # the oldest first
        self._owner: dict[int, tuple[int, bytes]] = {}  # by slot
        self._seen: Counter[tuple[int, bytes]] = Counter()  # how often a block came to a slot, the oldest first
        self.leaving: set[Block] = set()  # on their way to a lower tier
        self.events: TierEvents | None = None
        self.transfers = Transfers(self, deadline_seconds)

    # --- what lies where ---

    def settle(self) -> None:
        """Learn what the core has evicted since the last call. Cost: some microseconds a block."""
        self.transfers.release_left()
        with self._lock:
            number, records, roots = self.core.drain_moves(self._taken)
            onward: list[Block] = []
            if number != self._taken:
                if self._batch is None or self._batch.number != number:
                    self._batch = self._moves.read(number, records, roots, self.events)
                self._apply(self._batch, onward)
                self._taken = number
                if self._write == "back" and self.tiers:
                    onward = self._written_back()
            if self.core.lost_slots() != self._lost:
                self._compare()
            fence = self.core.latest_fence()
        if onward:
            self.transfers.put(onward, fence)

    def _apply(self, batch: Batch, onward: list[Block]) -> None:
        """Note what the slots have got. onward: receives what is written to a lower tier at once."""
        self._moves.learn(batch)
        through = self._write == "through" and len(self.tiers) > 0
        while batch.kept:
            block, facts = batch.kept[0]
            self.note(block, facts)
            if self._admit == "second_use":
                self._count(block)
            if through and self._is_admitted(block):
                onward.append(block)
            batch.kept.popleft()
        if batch.lossy:
            self._compare()

    def note(self, block: Block, facts: Facts | None) -> None:
        """The slot has the block from now on, unless it has been given to another since."""
        with self._lock:
            slot = block.name[0]
            if not self._displace(block.name):
                return
            older = self._host[block.group].pop(block.digest, None)
            if older is not None and older != block.name:  # one copy is enough
                self.core.drop_slots([older])
            self._host[block.group][block.digest] = block.name
            self._owner[slot] = (block.group, block.digest)
            if self.events is not None and facts is not None:
                self.events.kept(block.group, block.digest, facts)

    def take(self, group: int, prompt: Prompt, block: int) -> Name:
        """Return a slot for a block of a prompt, held; slot -1 if all are held."""
        follows = block > 0 and self.kinds[group] == "full"
        keys = prompt.digests[block], prompt.digests[block - 1] if follows else b""
        with self._lock:
            name = self.core.take_slot(group, *(int.from_bytes(key[:8], "little") for key in keys))
            self._displace(name)
        return name

    def _displace(self, name: Name) -> bool:
        """Forget what the slot had under an older name. Return False if ``name`` is the older one: the queue of moves
        may tell of a slot that a load has taken since.
        """
        group, digest = self._owner.get(name[0], (0, b""))
        slot, generation = self._host[group].get(digest, (-1, -1))
        if slot == name[0] and generation < name[1]:
            self._forget(group, digest)
        return slot != name[0] or generation <= name[1]

    def _forget(self, group: int, digest: bytes) -> None:
        self._host[group].pop(digest, None)
        if self.events is not None:
            self.events.gone(group, digest)

    def forget(self, block: Block) -> None:
        """The slot does not have the block any more."""
        with self._lock:
            if self._host[block.group].get(block.digest) == block.name:
                self._forget(block.group, block.digest)

    def _compare(self) -> None:
        """Forget all names whose slots have other content, after slots were lost of which the queue does not tell."""
        self._lost = self.core.lost_slots()
        for g, blocks in enumerate(self._host):
            for (digest, _), here in zip(list(blocks.items()), self.core.has_slots(list(blocks.values())), strict=True):
                if not here:
                    self._forget(g, digest)

    def _count(self, block: Block) -> None:
        key = (block.group, block.digest)
        self._seen[key] = self._seen.pop(key, 0) + 1
        if len(self._seen) > 4 * sum(self.counts) + 1024:
            del self._seen[next(iter(self._seen))]

    def _is_admitted(self, block: Block) -> bool:
        return self._admit == "always" or self._seen[block.group, block.digest] > 1

    def _written_back(self) -> list[Block]:
        """Return the oldest blocks of groups whose slots run short, an eighth of all slots."""
        found = []
        for g, blocks in enumerate(self._host):
            leaving = sum(block.group == g for block in self.leaving)
            short = max(1, self.counts[g] // 8) - self.core.free_slots(g) - leaving
            for digest, name in blocks.items():
                if short <= 0:
                    break
                block = Block(g, digest, name)
                if block not in self.leaving and self._is_admitted(block):
                    short -= 1
                    found.append(block)
        return found

    def leave(self, blocks: Sequence[Block]) -> None:
        """The blocks, whose slots are held, are on their way to a lower tier until ``written()``."""
        with self._lock:
            self.leaving.update(blocks)

    def written(self, block: Block, stored: bool) -> None:
        """The transfer engine is done with a block of ``settle``; its slot is still held."""
        with self._lock:
            self.leaving.discard(block)
            if stored and self._write == "back" and self._host[block.group].get(block.digest) == block.name:
                self.core.drop_slots([block.name])
                self._forget(block.group, block.digest)

    def prompt(
        self,
        ids: Ids,
        keys: tuple[bytes, bytes],
        salt: str | bytes | None,
        extra_key: ExtraKey,
        adapter: str | None,
        leave: int,
    ) -> Prompt:
        """Return the whole blocks of the ids without the last ``leave`` of them. keys: what the core calls the rest."""
        marks = placed(key_marks(extra_key), ids)  # by all ids: the last ones may say where the placeholders begin
        if marks:
            keyed = b"".join(at.to_bytes(8, "little", signed=True) + key for at, key in marks)
            keys = keys[0], encode_key(adapter) + keyed
        blocks = max(0, len(ids) - leave) // self.block_size
        ids = np.ascontiguousarray(ids[: blocks * self.block_size])
        digests = self.block_keys.chain(ids, salt=salt, marks=marks, adapter=adapter)
        return Prompt(ids, keys, digests, (salt, adapter), marks)

    def locate(self, prompt: Prompt) -> Located:
        """Return where device and host have the blocks now."""
        self.settle()
        device = np.frombuffer(self.core.residency(prompt.ids, *prompt.keys), np.uint8)
        device = device.reshape(prompt.num_blocks, len(self.kinds))
        with self._lock:
            names = {
                (k, g): blocks[digest]
                for g, blocks in enumerate(self._host)
                for k, digest in enumerate(prompt.digests)
                if not device[k, g] and digest in blocks
            }
            have = self.core.has_slots(list(names.values()))
        return Located(device, {place: name for (place, name), here in zip(names.items(), have, strict=True) if here})

    def reach(self, blocks: int, has: Callable[[int, int], bool]) -> int:
        """Return the largest number of blocks, at most ``blocks``, behind which a sequence can begin: ``has(block,
        group)`` is true wherever it needs the group's bytes.
        """
        whole = next((k for k in range(blocks) for g in self.full_groups if not has(k, g)), blocks)
        while whole > 0 and not all(has(k, g) for k, g in self._needed(whole, self.other_groups)):
            whole -= 1
        return whole

    def needed(self, blocks: int) -> Iterable[tuple[int, int]]:
        """Yield (block, group) of what a sequence needs that begins behind ``blocks`` blocks."""
        return self._needed(blocks, range(len(self.kinds)))

    def _needed(self, blocks: int, groups: Iterable[int]) -> Iterable[tuple[int, int]]:
        for g in groups:
            first = {"full": 0, "state": max(0, blocks - 1)}.get(self.kinds[g])
            if first is None:
                first = self.core.first_needed(g, blocks * self.block_size) // self.block_size
            for k in range(blocks - 1, first - 1, -1):  # what is missing is mostly the last
                yield k, g

    # --- between device and host ---

    def promote(self, prompt: Prompt, most: int | None = None) -> int:
        """Copy to the device what host slots have of the prompt's first ``most`` blocks, as cached content. Return how
        many blocks a sequence can begin behind now: fewer if memory is short. Cost: the copies, in this call.
        """
        located = self.locate(prompt)
        blocks = self.reach(prompt.num_blocks if most is None else most, located.has)
        while blocks > self.reach(blocks, located.on_device):
            try:
                self._promote(prompt, blocks, located)
            except OutOfMemory:
                blocks = self.reach(blocks // 2, located.has)
            except SpecError:  # what was on the device went in between: a miss
                return 0
            else:
                return blocks
        return blocks

    def _promote(self, prompt: Prompt, blocks: int, located: Located) -> None:
        groups = len(self.kinds)
        slots = [-1] * (blocks * groups)
        wanted = [(place, located.names[place]) for place in self.needed(blocks) if place in located.names]
        held: list[bool] = []
        try:
            held[:] = self.core.hold_slots([name for _, name in wanted])
            used = list(compress(wanted, held))
            names = [name for _, name in used]
            for (k, g), name in used:
                slots[k * groups + g] = name[0]
            self.core.promote(prompt.ids[: blocks * self.block_size], *prompt.keys, slots)
            self.core.drop_slots(names)  # the device has them: the slots serve others
            self.counters["host"] += len(names)
            with self._lock:
                for (k, g), name in used:
                    if self._host[g].get(prompt.digests[k]) == name:
                        self._forget(g, prompt.digests[k])
        finally:
            self.core.release_slots([name for _, name in compress(wanted, held)])

    def store(self, prompt: Prompt) -> int:
        """Copy blocks that the device has to slots, unless they have one. Return how many."""
        located = self.locate(prompt)
        with self._lock:
            names = [blocks.get(digest, (-1, 0)) for digest in prompt.digests for blocks in self._host]
        has = self.core.has_slots(names)
        groups = len(self.kinds)
        wanted = [not here and located.on_device(*divmod(at, groups)) for at, here in enumerate(has)]
        if any(wanted):
            self.core.store(prompt.ids, *prompt.keys, wanted)
            if self.tiers:  # without, the next call reads what moved
                self.settle()
        return sum(wanted)

    def load(self, prompt: Prompt, *, to_device: bool) -> Load:
        """Start to bring back what lower tiers have of the prompt, and what host slots have."""
        return self.transfers.load(prompt, self.locate(prompt), to_device=to_device)

    def clear(self) -> None:
        """Forget what host slots have."""
        self.settle()
        with self._lock:
            for g, blocks in enumerate(self._host):
                self.core.drop_slots(list(blocks.values()))
                for digest in list(blocks):
                    self._forget(g, digest)
            self._owner.clear()

    def take_events(self, *, restart: bool) -> list[Event]:
        """Return what host slots have got and lost since the last call; with ``restart``, all that they have."""
        self.settle()
        with self._lock:
            return [] if self.events is None else self.events.take(restart=restart)

    def host_blocks(self) -> list[int]:
        """Return how many blocks of each group host slots have."""
        self.settle()
        with self._lock:
            return [sum(self.core.has_slots(list(blocks.values()))) for blocks in self._host]


def open_tiers(
    core: _core.Allocator, spec: CacheSpec, layouts: Sequence[GroupLayout], device: str, tiers: Tiers
) -> Tiering:
    """Give an allocator host slots and the tiers below them. device: the type of its device."""
    if tiers.lower and device == "meta":
        raise SpecError('tiers: device "meta" has no bytes to write to a lower tier; it can have host slots only')
    host = parse_bytes("host", tiers.host)
    shares = ["state" if g.growth == "fixed" else g.growth for g in spec.groups]
    size = lcm(*(g.block_size for g in spec.groups if g.growth == "token"))
    sizes = [core.slot_bytes(g) for g in range(len(shares))]
    # States are large, and few of them are ever wanted: a quarter as many as blocks.
    weights = [0.25 if kind == "state" else 1.0 for kind in shares]
    blocks = int(host / sum(w * b for w, b in zip(weights, sizes, strict=True)))
    if blocks < 1:
        raise SpecError(f"host: got {host} bytes; a block of each group takes {sum(sizes)}, so give a multiple of that")
    counts = [max(1, int(w * blocks)) for w in weights]
    core.open_host_slots(counts, tiers.policy)
    if device == "cuda":  # copies from and to pinned memory do not hold up the host
        memory = core.host_bytes()
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
    identity = tiers.identity or Identity("this process")
    return Tiering(
        core,
        spec,
        layouts,
        fingerprint=identity.fingerprint(spec),
        counts=counts,
        tiers=tiers.lower,
        block_size=size,
        write=tiers.write,
        admit=tiers.admit,
        deadline_seconds=tiers.deadline_seconds,
    )
