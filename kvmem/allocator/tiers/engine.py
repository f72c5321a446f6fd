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
from math import lcm
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kvmem import _core
from kvmem.allocator.tiers.events import TierEvents
from kvmem.allocator.tiers.transfers import Block, Load, Transfers
from kvmem.arguments import parse_bytes
from kvmem.errors import OutOfMemory, SpecError
from kvmem.events.digests import ExtraKey, decode_key
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

__all__ = ["MOVE_TOKENS", "Prompt", "Tiering", "open_tiers"]

_STORED, _KEPT = 0, 3  # EventKind in csrc/index/events.h
MOVE_TOKENS = 1 << 20  # tokens in the core's queue of moves; where a call moves more, some slots lose their names


class Prompt(NamedTuple):
    """Whole blocks of some tokens.

    ids: int32 [blocks * block_size]. keys: salt, and adapter with extra keys, for the core (``encode_keys``).
    digests: of each block, with all blocks before it.
    """

    ids: Ids
    keys: tuple[bytes, bytes]
    digests: list[bytes]

    @property
    def num_blocks(self) -> int:
        return len(self.digests)


class Tiering:
    """The tiers of one allocator. Thread-safe.

    core: an allocator's, with host slots opened and a queue of moves. layouts: by group. counts: of slots by group.
    tiers: below the host, the fastest first. block_size: tokens of a block of the index.
    write, admit: as in ``Tiers``. Three quarters of all blocks are never read again, so ``"second_use"`` saves most of
        a disk's writes.
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
    ) -> None:
        self.core, self.tiers, self.counts = core, tuple(tiers), list(counts)
        self.block_keys = BlockKeys(fingerprint, block_size)
        self.block_size = block_size
        self.kinds = ["state" if g.growth == "fixed" else "window" if g.window_tokens else "full" for g in spec.groups]
        self.full_groups = [g for g, kind in enumerate(self.kinds) if kind == "full"]
        self.forms = [
            SlotForm(layout, 1 if kind == "state" else block_size)
            for layout, kind in zip(layouts, self.kinds, strict=True)
        ]
        self._write, self._admit = write, admit
        self.counters: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._taken = 0  # the last batch of moves that was received
        self._digests: dict[int, bytes] = {}  # by node of the core's index
        self._host: list[OrderedDict[bytes, Name]] = [OrderedDict() for _ in spec.groups]  # the oldest first
        self._owner: dict[int, tuple[int, bytes]] = {}  # by slot
        self._seen: OrderedDict[bytes, None] = OrderedDict()  # blocks that came to a slot before
        self._leaving: set[Name] = set()  # slots that are written back
        self.events: TierEvents | None = None
        self.transfers = Transfers(self)

    # --- what lies where ---

    def settle(self) -> None:
        """Learn what the core has evicted since the last call. Cost: some microseconds a block."""
        with self._lock:
            number, records, roots = self.core.drain_moves(self._taken)
            if number == self._taken:
                return
            written = [block for block in self._follow(records, roots) if self._goes_on(block)]
            self._taken = number
            if self._write == "back" and self.tiers:
                written = self._written_back()
            fence = self.core.latest_fence()
        self.transfers.put(written, fence)

    def _follow(self, records: _core.EventRecords, roots: dict[int, tuple[bytes, bytes]]) -> Iterable[Block]:
        """Yield the blocks that have got a slot."""
        tokens, tags, row = np.ascontiguousarray(records.tokens, "<i4"), records.tags, 0
        keys = {number: (decode_key(salt), decode_key(adapter)) for number, (salt, adapter) in roots.items()}
        starts = {number: self.block_keys.root(*names) for number, names in keys.items()}
        columns = (records.kinds, records.nodes, records.parents, records.roots, records.groups, records.ordinals)
        for kind, node, parent, root, group, ordinal in zip(*(c.tolist() for c in columns), strict=True):
            if kind == _STORED:
                before = starts[root] if parent < 0 else self._digests[parent]
                self._digests[node] = self.block_keys.block(before, tokens[row].data, tags[row] or b"")
                if self.events is not None:
                    self.events.node(node, parent, keys[root], ordinal, tokens[row].tobytes(), tags[row] or b"")
                row += 1
            elif kind == _KEPT:
                block = Block(group, self._digests[node], (ordinal, parent))
                self.note(block)
                if self.events is not None:
                    self.events.kept(node, group, block.digest)
                yield block

    def note(self, block: Block) -> None:
        """The slot has the block from now on."""
        with self._lock:
            slot = block.name[0]
            group, digest = self._owner.get(slot, (0, b""))
            if self._host[group].get(digest, (-1, -1))[0] == slot and digest != block.digest:
                self._forget(group, digest)
            older = self._host[block.group].pop(block.digest, None)
            if older is not None and older != block.name:  # one copy is enough
                self.core.drop_slots([older])
            self._host[block.group][block.digest] = block.name
            self._owner[slot] = (block.group, block.digest)

    def _forget(self, group: int, digest: bytes) -> None:
        del self._host[group][digest]
        if self.events is not None:
            self.events.gone(group, digest)

    def _goes_on(self, block: Block) -> bool:
        """Whether a block that has got a slot is written to a lower tier."""
        if not self.tiers or self._write == "back":
            return False
        if self._admit == "always" or block.digest in self._seen:
            return True
        self._seen[block.digest] = None
        while len(self._seen) > 4 * sum(self.counts) + 1024:
            self._seen.popitem(last=False)
        return False

    def _written_back(self) -> list[Block]:
        """Return the oldest blocks of groups whose slots run short, an eighth of all slots."""
        found = []
        for g, blocks in enumerate(self._host):
            short = max(1, self.counts[g] // 8) - self.core.free_slots(g) - len(self._leaving)
            for digest, name in blocks.items():
                if short <= 0:
                    break
                if name not in self._leaving:
                    short -= 1
                    self._leaving.add(name)
                    found.append(Block(g, digest, name))
        return found

    def written(self, block: Block, stored: bool) -> None:
        """The transfer engine is done with a block of ``settle``; its slot is still held."""
        with self._lock:
            if block.name in self._leaving:
                self._leaving.discard(block.name)
                if stored and self._host[block.group].get(block.digest) == block.name:
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
        blocks = max(0, len(ids) - leave) // self.block_size
        ids = np.ascontiguousarray(ids[: blocks * self.block_size])
        digests = self.block_keys.chain(ids, salt=salt, extra_key=extra_key, adapter=adapter)
        return Prompt(ids, keys, digests)

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
        whole = 0
        while whole < blocks and all(has(whole, g) for g in self.full_groups):
            whole += 1
        while whole > 0 and not all(has(k, g) for k, g in self.needed(whole) if self.kinds[g] != "full"):
            whole -= 1
        return whole

    def needed(self, blocks: int) -> Iterable[tuple[int, int]]:
        """Yield (block, group) of what a sequence needs that begins behind ``blocks`` blocks."""
        for g, kind in enumerate(self.kinds):
            first = {"full": 0, "state": blocks - 1}.get(kind)
            if first is None:
                first = self.core.first_needed(g, blocks * self.block_size) // self.block_size
            for k in range(first, blocks):
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
        slots = np.full((blocks, len(self.kinds)), -1, np.int64)
        wanted = [(place, located.names[place]) for place in self.needed(blocks) if place in located.names]
        held = self.core.hold_slots([name for _, name in wanted])
        used = [one for one, here in zip(wanted, held, strict=True) if here]
        names = [name for _, name in used]
        for place, name in used:
            slots[place] = name[0]
        try:
            self.core.promote(prompt.ids[: blocks * self.block_size], *prompt.keys, slots.ravel().tolist())
            self.core.drop_slots(names)  # the device has them: the slots serve others
            self.counters["host"] += len(names)
            with self._lock:
                for (k, g), name in used:
                    if self._host[g].get(prompt.digests[k]) == name:
                        self._forget(g, prompt.digests[k])
        finally:
            self.core.release_slots(names)

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


class Located:
    """Where device and host have a prompt's blocks.

    names: of host slots by (block, group), for what is not on the device.
    """

    def __init__(self, device: npt.NDArray[np.uint8], names: dict[tuple[int, int], Name]) -> None:
        self._device, self.names = device, names

    def on_device(self, block: int, group: int) -> bool:
        return bool(self._device[block, group])

    def has(self, block: int, group: int) -> bool:
        return bool(self._device[block, group]) or (block, group) in self.names


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
    )
