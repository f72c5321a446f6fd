"""What tests write in place of keys and values. Patterns go through the views that callers use: bytes that follow from who
wrote the token and where, for each layer and component, so that any byte that strays into another token, layer, component
or sequence is seen. Tags go to all bytes of a token's memory, padding too, and are fast to read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

import kvmem

Places = list[tuple[int, str]]


def places(spec: kvmem.CacheSpec, group: int) -> Places:
    """(layer, component) of every copy that a group stores; a shared one once."""
    found: Places = []
    for component in spec.groups[group].components:
        layers = spec.groups[group].layers[:1] if component.scope == "shared" else spec.groups[group].layers
        found += [(layer, component.name) for layer in layers]
    return found


def pattern(writers: np.ndarray, positions: np.ndarray, place: int, width: int) -> torch.Tensor:
    """uint8 [tokens, width]: the bytes that writer ``writers[i]`` gives the token at ``positions[i]``."""
    seed = writers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + positions.astype(np.uint64) * np.uint64(
        0xC2B2AE3D27D4EB4F
    )
    seed += np.uint64(place * 0x165667B19E3779F9 + 1)
    mixed = (seed[:, None] + np.arange(width, dtype=np.uint64) * np.uint64(0xD6E8FEB86659FD93)) * np.uint64(
        0xFF51AFD7ED558CCD
    )
    return torch.from_numpy((mixed >> np.uint64(40)).astype(np.uint8))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """``[..., heads, width]`` of any dtype as uint8, the same memory; NaN payloads and signed zeroes stay apart."""
    return tensor if tensor.dtype == torch.uint8 else tensor.view(torch.uint8)


def write_slots(
    alloc: kvmem.Allocator, group: int, slots: torch.Tensor, writers: np.ndarray, positions: np.ndarray
) -> None:
    """Writes tokens as a paged kernel does: at flat slots of the block view, in every layer and component of a
    group."""
    size = alloc.spec.groups[group].block_size
    for number, (layer, name) in enumerate(places(alloc.spec, group)):
        view = _bytes(alloc.tensor(layer, name))
        shape = view.shape[2:]
        data = pattern(writers, positions, number, shape.numel())
        view[slots // size, slots % size] = data.view(-1, *shape).to(view.device)


def write_row(
    alloc: kvmem.Allocator, group: int, row: int, start: int, writers: np.ndarray, positions: np.ndarray
) -> None:
    """Writes tokens as a kernel for contiguous sequences does: at ``start`` of a row (virtual backend)."""
    for number, (layer, name) in enumerate(places(alloc.spec, group)):
        view = _bytes(alloc.rows(layer, name)[row, start : start + len(positions)])
        view.copy_(pattern(writers, positions, number, view.shape[1:].numel()).view_as(view))


def by_sequence(alloc: kvmem.Allocator, handles: list[int], group: int) -> Iterator[torch.Tensor]:
    """uint8 [tokens held, row bytes] of every place of a group, one sequence after another, by ``sequence_tensor``."""
    for layer, name in places(alloc.spec, group):
        yield torch.cat([_bytes(alloc.sequence_tensor(h, layer, name)).flatten(1).cpu() for h in handles])


def by_table(alloc: kvmem.Allocator, handles: list[int], group: int) -> Iterator[torch.Tensor]:
    """The same, walking the block table of one batch as a paged kernel does."""
    batch, size = alloc.batch(handles).group(group), alloc.spec.groups[group].block_size
    assert batch.block_table is not None and batch.seq_lens is not None and batch.first_tokens is not None
    table, firsts, ends = batch.block_table.cpu().numpy(), batch.first_tokens.tolist(), batch.seq_lens.tolist()
    held = [np.arange(first, end) for first, end in zip(firsts, ends, strict=True)]
    blocks = np.concatenate([row[positions // size] for row, positions in zip(table, held, strict=True)])
    rows = torch.from_numpy(blocks.astype(np.int64)).to(alloc.device)
    columns = torch.from_numpy(np.concatenate(held) % size).to(alloc.device)
    for layer, name in places(alloc.spec, group):
        yield _bytes(alloc.tensor(layer, name)[rows, columns]).flatten(1).cpu()


def expected(spec: kvmem.CacheSpec, group: int, writers: np.ndarray, positions: np.ndarray) -> Iterator[torch.Tensor]:
    """What the two readers above should find."""
    for number, (layer, name) in enumerate(places(spec, group)):
        yield pattern(writers, positions, number, spec.groups[group].row_bytes(name, layer))


class Tags:
    """A number of its own for each token, in every 8 bytes that the token has in every arena, where ``fill()`` says it is."""

    def __init__(self, alloc: kvmem.Allocator) -> None:
        self.alloc, self.groups = alloc, alloc.spec.groups
        self.batch = alloc.make_batch(max_new_tokens=alloc.max_sequences * alloc.max_tokens)
        parts = list(self.batch.groups)
        self.tables = [part.full("block_table").numpy() for part in parts]
        self.firsts = [part.full("first_tokens").numpy() for part in parts]
        self._memory: dict[int, list[np.ndarray]] = {}

    def fill(self, handles: list[int]) -> None:
        self.alloc.fill(np.array(handles, np.int32), self.batch)

    def _tokens(self, g: int) -> list[np.ndarray]:
        """Per arena of the group, its memory as [tokens, token_bytes / 8] of int64; none on a device without memory."""
        if g not in self._memory:
            self._memory[g] = []
            for arena, size in enumerate(
                self.alloc._layouts[g].token_bytes if self.alloc.device.type != "meta" else []
            ):
                flat = self.alloc._arena(g, arena).numpy().view(np.int64)
                shape = (flat.nbytes // size, size // 8)
                self._memory[g].append(np.lib.stride_tricks.as_strided(flat, shape, (size, 8)))
        return self._memory[g]

    def _slots(self, g: int, row: int, positions: np.ndarray) -> np.ndarray:
        size = self.groups[g].block_size
        return self.tables[g][row, positions // size].astype(np.int64) * size + positions % size

    @staticmethod
    def _tags(writers: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return (writers << 16) + positions

    def write(self, g: int, row: int, first: int, n: int, writer: int) -> None:
        """Of the sequence in this row of the batch that was filled last."""
        positions = np.arange(first, first + n)
        for tokens in self._tokens(g):
            tokens[self._slots(g, row, positions)] = self._tags(np.full(n, writer), positions)[:, None]

    def wrong(self, g: int, row: int, first: int, writers: list[int]) -> list[int]:
        """The positions from ``first`` on that read otherwise than their writers wrote them; 0 wrote nothing."""
        by = np.array(writers[first:], np.int64)
        positions = np.arange(first, len(writers))[by != 0]
        tags, found = self._tags(by[by != 0], positions), np.zeros(len(positions), bool)
        for tokens in self._tokens(g):
            found |= (tokens[self._slots(g, row, positions)] != tags[:, None]).any(1)
        return positions[found].tolist()  # type: ignore[no-any-return]
