"""A chunk: the KV of some tokens in canonical form, taken from one sequence and appended to another, in another process
or at another position (Knowledge Delivery Network, https://github.com/LMCache/LMCache).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from kvmem.allocator import Allocator, Batch
from kvmem.allocator.prefix import Tokens, token_ids
from kvmem.allocator.sequence import Sequence
from kvmem.arguments import check_size
from kvmem.errors import SpecError
from kvmem.geometry.group_layout import GroupLayout
from kvmem.kernels.blocks import scatter_tokens
from kvmem.kernels.checks import as_bytes
from kvmem.layouts.reading import Held
from kvmem.layouts.rope import Rope, check_rope
from kvmem.spec import CacheSpec, Group
from kvmem.tiers.keys import Identity

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["Chunk", "Head", "Ropes", "Section", "export", "export_layers", "import_", "import_layers", "sections_of"]

#: How keys are rotated: the same in all layers, or by layer, None for a layer that does not rotate.
Ropes = Rope | Mapping[int, Rope | None] | None


class Part(NamedTuple):
    """One component within a section: ``[token][head][width]``, as ``Allocator.tensor`` shows a token."""

    group: int
    layer: int
    name: str
    heads: int
    width: int
    dtype: torch.dtype
    rope: str

    @property
    def token_bytes(self) -> int:
        """The bytes of one token."""
        return self.heads * self.width * self.dtype.itemsize


#: What one layer of one group stores, its components in the order of the spec.
Section = tuple[Part, ...]


@lru_cache(maxsize=64)
def sections_of(spec: CacheSpec) -> tuple[Section, ...]:
    """Return the sections of a chunk: by layer, then by group. A copy that layers share is in the first one's."""
    found: dict[tuple[int, int], list[Part]] = {}
    for index, group in enumerate(spec.groups):
        layout = GroupLayout(group, "none")
        for layer in group.layers:
            for component in group.components:
                if component.scope == "layer" or layer == group.layers[0]:
                    where = layout.slice(layer, component.name)
                    shape, rope = (where.heads, where.width, where.dtype), group.rope(component.name, layer)
                    part = Part(index, layer, component.name, *shape, rope)
                    found.setdefault((layer, index), []).append(part)
    return tuple(tuple(found[key]) for key in sorted(found))


@dataclass(frozen=True, eq=False)
class Head:
    """What a chunk says of its bytes.

    spec, identity: of the cache that wrote it. tokens: their ids, int32 ``[n]``. position: of the first one, when it
    was computed. before: ``digest_before`` of the ids in front of them then. exact: False for bytes that a lossy codec
    or a composition has made. spans: of a whole sequence, the tokens ``[first, end)`` that each group holds; None: all
    groups hold the chunk's tokens.
    """

    spec: CacheSpec
    identity: Identity
    tokens: npt.NDArray[np.int32]
    position: int
    before: bytes
    exact: bool = True
    spans: tuple[tuple[int, int], ...] | None = None

    def span(self, group: int) -> tuple[int, int]:
        """Return the tokens of a group, ``[first, end)``, counted as in the sequence."""
        return (self.position, self.position + len(self.tokens)) if self.spans is None else self.spans[group]

    def bytes_of(self, section: Section) -> int:
        """Return the length of a section."""
        return sum(size for _, _, size in self.places(section))

    def places(self, section: Section) -> list[tuple[Part, int, int]]:
        """Return each part, where it begins in its section, and its bytes."""
        found, at = [], 0
        for part in section:
            first, end = self.span(part.group)
            size = (end - first) * part.token_bytes
            found.append((part, at, size))
            at += size
        return found


@dataclass(frozen=True, eq=False)
class Chunk:
    """The bytes of some tokens. head: what they are. sections: uint8 tensors on the CPU, one for each of
    ``sections_of(head.spec)``.
    """

    head: Head
    sections: tuple[torch.Tensor, ...]

    @property
    def num_bytes(self) -> int:
        """The bytes of all sections."""
        return sum(len(section) for section in self.sections)


#: The sequences of each allocator whose KV is approximate: composed, moved, or from a lossy codec.
_APPROXIMATE: WeakKeyDictionary[Allocator, set[int]] = WeakKeyDictionary()


def is_exact(alloc: Allocator, sequence: Sequence) -> bool:
    """Return whether nothing here has made the sequence's KV approximate. Of its forks this is not known."""
    return sequence.id not in _APPROXIMATE.get(alloc, ())


def mark_approximate(alloc: Allocator, sequence: Sequence) -> None:
    """What is exported of the sequence from now on is not exact."""
    known = _APPROXIMATE.get(alloc, set())
    _APPROXIMATE[alloc] = {handle for handle in known if alloc.core.is_live(handle)} | {sequence.id}


def digest_before(ids: npt.NDArray[np.int32]) -> bytes:
    """Return what names the tokens in front of a chunk: SHA-256 over their ids as little-endian int32."""
    return hashlib.sha256(np.ascontiguousarray(ids, "<i4").tobytes()).digest()


# --- out of a sequence ---


def export(
    alloc: Allocator, sequence: Sequence, tokens: Tokens, *, identity: Identity, first: int = 0, end: int | None = None
) -> Chunk:
    """Return tokens ``[first, end)`` of a sequence as a chunk in host memory.

    tokens: the ids of the sequence from its start on, at least ``end`` of them, since an allocator gives none back.
    end: default the last committed token whose id is given. The chunk is exact unless ``import_`` or ``compose`` has
    made the sequence approximate. REQUIRES: it is no fork of such a sequence, which is not known of it.

    ``SpecError`` for tokens that are not committed, that a sliding window has dropped, or that the sequence's layers
    cannot cut out: a recurrent state is that after all tokens, and cross attention depends on the encoder's input.
    """
    head, sections = export_layers(alloc, sequence, tokens, identity=identity, first=first, end=end)
    return Chunk(head, tuple(sections))


def export_layers(
    alloc: Allocator, sequence: Sequence, tokens: Tokens, *, identity: Identity, first: int = 0, end: int | None = None
) -> tuple[Head, Iterator[torch.Tensor]]:
    """As ``export``, one section at a time: only what the caller keeps is in memory.

    The sections are read as they are asked for; ``StaleHandle`` if the sequence was freed or cut meanwhile.
    """
    ids, committed = token_ids(tokens), sequence.num_committed_tokens
    end = min(committed, len(ids)) if end is None else check_size("end", end, 0)
    if not check_size("first", first, 0) <= end <= min(committed, len(ids)):
        got = f"tokens [{first}, {end}) of {len(ids)} ids"
        raise SpecError(f"first, end: got {got}; the sequence has {committed} committed tokens")
    for index, group in enumerate(alloc.spec.groups):
        _check_cut(alloc, sequence, index, group, first)
    exact = is_exact(alloc, sequence)
    head = Head(alloc.spec, identity, ids[first:end].copy(), first, digest_before(ids[:first]), exact)
    return head, read_sections(alloc, sequence, head)


def _check_cut(alloc: Allocator, sequence: Sequence, index: int, group: Group, first: int) -> None:
    """``SpecError`` unless the tokens from ``first`` on can be cut out of the group."""
    if group.growth == "fixed":
        raise SpecError(
            f"group {group.name!r}: its recurrent state is that after all tokens, so no bytes of it belong to some of "
            "them: keep the whole sequence with kvmem.chunks.save()"
        )
    if group.growth == "prefill":
        raise SpecError(
            f"group {group.name!r}: what cross attention reads depends on the encoder's input, not on these tokens: "
            "keep the whole sequence with kvmem.chunks.save()"
        )
    held = alloc.core.first_token(sequence.id, index)
    if held > first:
        raise SpecError(
            f"first: got {first}; the window of group {group.name!r} has dropped the tokens before {held}: export "
            f"from {held} on, or before the window has moved on"
        )


def read_sections(alloc: Allocator, sequence: Sequence, head: Head) -> Iterator[torch.Tensor]:
    """Yield the sections of the tokens that head describes."""
    batch = alloc.batch([sequence])
    for section in sections_of(head.spec):
        batch.check_current()
        data = torch.empty(head.bytes_of(section), dtype=torch.uint8)
        for part, at, size in head.places(section):
            first, end = head.span(part.group)
            found = as_bytes(Held(alloc, batch, part.layer, part.name).tokens(0, first, end)).view(torch.uint8)
            data[at : at + size].view(found.shape).copy_(found)
        yield data


# --- into a sequence ---


def import_(
    alloc: Allocator, sequence: Sequence, chunk: Chunk, *, prefix: Tokens | None = None, rope: Ropes = None,
    skip: int = 0,
) -> None:  # fmt: skip
    """Append the tokens of a chunk to a sequence: extend, write, commit.

    prefix: the ids of the tokens that the sequence has. If the chunk was computed after exactly these and is exact, its
    tokens are committed by their ids, so other prompts find them; otherwise by count, and neither they nor later tokens
    of this sequence are shared. An empty sequence needs no prefix.
    rope: how the model rotates keys, needed where the chunk was computed at another position: components that the spec
    calls ``"post"`` are rotated by the difference; ``"pre"`` and ``"none"`` are position-free. skip: tokens of the
    chunk's start that are left out, because the sequence has them.

    REQUIRES: the chunk was computed with the sequence's adapter and extra keys. A chunk that was computed after other
    tokens than the sequence's is exact in layer 0 only: ``compose`` corrects the other layers.

    ``SpecError`` for another spec, and where a shift is not possible; ``OutOfMemory``; the sequence is then as it was.
    """
    import_layers(alloc, sequence, chunk.head, chunk.sections, prefix=prefix, rope=rope, skip=skip)


def import_layers(
    alloc: Allocator, sequence: Sequence, head: Head, sections: Iterable[torch.Tensor], *,
    prefix: Tokens | None = None, rope: Ropes = None, skip: int = 0,
) -> None:  # fmt: skip
    """As ``import_``, from sections that arrive one at a time. Nothing is committed unless all arrive."""
    start = sequence.num_committed_tokens
    shift = start - skip - head.position
    check_import(alloc, sequence, head, shift, rope)
    check_size("skip", skip, 0, len(head.tokens))
    known = token_ids([] if prefix is None else prefix)
    if prefix is not None and len(known) != start:
        raise SpecError(f"prefix: got {len(known)} ids; the sequence has {start} tokens")
    cut = start - skip
    follows = len(known) == start and cut >= 0 and np.array_equal(known[max(cut, 0) :], head.tokens[:skip])
    exact = head.exact and follows and digest_before(known[:cut]) == head.before
    new = head.tokens[skip:]
    try:
        sequence.extend(len(new))
        write_sections(alloc, alloc.batch([sequence]), head, sections, shift, rope)
        commit(alloc, sequence, new, exact)
    except BaseException:
        sequence.truncate(start)
        raise


def commit(alloc: Allocator, sequence: Sequence, tokens: npt.NDArray[np.int32], exact: bool) -> None:
    """Commit tokens by their ids if their KV is exact; else by count, so that no other prompt finds it."""
    if exact:
        sequence.commit(tokens)
    else:
        sequence.commit(count=len(tokens))
        mark_approximate(alloc, sequence)


def check_import(alloc: Allocator, sequence: Sequence, head: Head, shift: int, rope: Ropes) -> None:
    """``SpecError`` unless the tokens of head can follow those of the sequence, ``shift`` positions later."""
    if head.spec != alloc.spec:
        fields = ("num_layers", "block_size", "num_query_heads", "groups")
        differ = [name for name in fields if getattr(head.spec, name) != getattr(alloc.spec, name)]
        raise SpecError(f"chunk: was written with another spec than the allocator's; they differ in {differ}")
    if head.spans is not None:
        raise SpecError("chunk: it is a whole sequence; kvmem.chunks.load() restores it")
    if sequence.num_tokens != sequence.num_committed_tokens:
        raise SpecError(
            f"sequence: has {sequence.num_tokens - sequence.num_committed_tokens} tokens that are not committed, which "
            "the chunk would follow: commit() or truncate() them first"
        )
    for index, group in enumerate(alloc.spec.groups):
        _check_cut(alloc, sequence, index, group, sequence.num_tokens)
    if shift:
        for part in {(part.name, part.layer): part for section in sections_of(head.spec) for part in section}.values():
            _check_shift(part, shift, rope)


def _check_shift(part: Part, shift: int, rope: Ropes) -> None:
    if part.rope != "post":
        return
    here = f"component {part.name!r} of layer {part.layer}"
    if not part.dtype.is_floating_point or part.dtype.itemsize == 1:
        raise SpecError(
            f"{here}: holds {part.dtype}, quantised after rotation, and a shift by {shift} positions would quantise it "
            "once more: import it at the position where it was computed, or store K before rotation"
        )
    if rope is None or (isinstance(rope, Mapping) and part.layer not in rope):
        raise SpecError(
            f"rope: got none for {here}, which was rotated to {shift} positions {'before' if shift > 0 else 'after'} "
            "its new one: give the model's kvmem.layouts.rope.Rope, such as Rope.from_config(config)"
        )
    check_rope(_rope_of(rope, part), part.width)


def _rope_of(rope: Ropes, part: Part) -> Rope | None:
    return rope[part.layer] if isinstance(rope, Mapping) else rope


def write_sections(
    alloc: Allocator, batch: Batch, head: Head, sections: Iterable[torch.Tensor], shift: int = 0, rope: Ropes = None
) -> None:
    """Write the head's sections to the new tokens of the batch's only row; if these are fewer, the last ones."""
    todo = iter(sections_of(head.spec))
    for data in sections:
        for part, slots, values in placed_parts(batch, head, next(todo, ()), data, shift, rope):
            scatter_tokens(alloc.tensor(part.layer, part.name), slots, values.to(slots.device))
    if (missing := len(list(todo))) > 0:
        raise SpecError(f"sections: {missing} are missing of {len(sections_of(head.spec))}")


def placed_parts(
    batch: Batch, head: Head, section: Section, data: torch.Tensor | None, shift: int, rope: Ropes
) -> Iterator[tuple[Part, torch.Tensor, torch.Tensor]]:
    """Yield each part of a section, the slots of the batch's last new tokens, and their values, rotated by ``shift``.

    ``SpecError`` unless data are the section's bytes.
    """
    if not isinstance(data, torch.Tensor) or not section or data.shape != (head.bytes_of(section),):
        got = f"{data.numel()} bytes" if isinstance(data, torch.Tensor) else type(data).__name__
        raise SpecError(f"sections: got {got}; must be {head.bytes_of(section)} for {section[:1] or 'no further one'}")
    for part, at, size in head.places(section):
        raw = data[at : at + size]
        raw = raw.clone() if at % part.dtype.itemsize else raw  # a view needs aligned elements
        values = raw.view(part.dtype).view(-1, part.heads, part.width)
        group = batch.group(part.group)
        fixed = head.spec.groups[part.group].growth == "fixed"  # a state is not a new token: its block says where it is
        slots = group.block_table[0, :1].long() if fixed else group.slot_mapping
        count = min(len(slots), len(values))
        slots, values = slots[len(slots) - count :], values[len(values) - count :]
        by = _rope_of(rope, part) if shift and part.rope == "post" else None
        yield part, slots, values if by is None else by.shift(values, shift)
