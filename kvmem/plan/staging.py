"""Device buffers through which the KV of micro-batches passes, one layer at a time, on its way from host memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch

from kvmem.allocator import Allocator, Batch
from kvmem.allocator.cascade import CascadeLevel
from kvmem.arguments import brief, check_size
from kvmem.errors import DeviceError, OutOfMemory, SpecError, StaleHandle
from kvmem.kernels.blocks import gather_blocks, scatter_tokens

if TYPE_CHECKING:
    from kvmem.arguments import Handles

__all__ = ["MicroBatch", "StagedKV", "StagingRing", "open_device"]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Sequences that are attended together, for one step.

    batch: of the host allocator. level: the blocks of each sequence as they lie in a staging buffer, in the form that
    ``kernels.reference.level_attention`` and cascade kernels take. slots: of the new tokens there, int64 ``[n]``.
    """

    batch: Batch
    level: CascadeLevel
    slots: torch.Tensor


class StagedKV:
    """One layer of a micro-batch in a staging buffer, until ``release()``."""

    def __init__(self, ring: StagingRing, buffer: _Buffer, part: MicroBatch, parts: tuple[torch.Tensor, ...]) -> None:
        self._ring, self._buffer, self._parts = ring, buffer, parts
        self.micro_batch = part

    def kv(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, ``[blocks, block_size, heads, width]`` each, for ``micro_batch.level``. On CUDA, what is put on the
        current stream after this call runs after the copy. ``StaleHandle`` after ``release()``.
        """
        self._check()
        self._buffer.before_use()
        k, v = self._parts
        return k, v

    def write(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """The new tokens' K and V, ``[n, heads, width]``: they need not have been in host memory at the copy."""
        for blocks, values in zip(self.kv(), (k, v), strict=True):
            scatter_tokens(blocks, self.micro_batch.slots, values)

    def release(self) -> None:
        """Give the buffer back. It is overwritten only after what is on the current stream now has run. A second call
        raises ``StaleHandle``.
        """
        self._check()
        self._buffer.after_use()
        self._ring._give_back(self, self._buffer)

    def _check(self) -> None:
        if self not in self._ring._held:
            raise StaleHandle("staged KV: was released, and the buffer may hold another micro-batch; fetch it again")


class StagingRing:
    """``buffers`` of ``blocks`` blocks of one layer each, allocated once; 0 blocks where the CPU attends all.

    When all are taken, a fetch is refused and does not wait, because it is the caller who releases them: release the
    oldest first. So no more than ``bytes`` are ever used: that is the back-pressure. On CUDA a released buffer can be
    fetched into at once; the copy stream waits for the kernels that read it, the host for the buffer's last copy.

    host: where the KV lies, with ``device="cpu"`` and K and V in one group of full attention. Its ledger holds
    ``("staging", "staging")``, and counts what is moved there by component. With ``interleave="none"`` K of a layer is
    dense in memory, and fetched fastest. On CUDA blocks are gathered into pinned memory of the same size, and copied in
    one transfer. Not thread-safe.
    """

    def __init__(self, host: Allocator, *, blocks: int, buffers: int = 3, device: torch.device | str = "cpu") -> None:
        self.host, self._kinds = host, _parts(host)
        self.blocks, self.num_buffers = check_size("blocks", blocks, 0), check_size("buffers", buffers)
        self.device = open_device(device)
        size = self.blocks * sum(shape.numel() * dtype.itemsize for shape, dtype in self._kinds.values())
        on_cuda = self.device.type == "cuda"
        stream = torch.cuda.Stream(self.device) if on_cuda else None  # type: ignore[no-untyped-call]
        try:
            self._free = [_Buffer(size, self.device, stream) for _ in range(self.num_buffers)]
        except (RuntimeError, MemoryError) as error:  # torch raises RuntimeError on both devices
            raise OutOfMemory(f"staging: no memory for {buffers} buffers of {size:,} bytes on {self.device}") from error
        self._held: dict[StagedKV, _Buffer] = {}
        self.step: ref[Any] | None = None  # the last ModuleStep, which fills these batches
        self._batches: dict[int, tuple[int, Batch]] = {}
        self.bytes = sum(buffer.memory.nbytes for buffer in self._free)
        self.peak_bytes, self._closed = 0, False
        host.ledger.hold("staging", self.bytes, "staging")

    @property
    def used_bytes(self) -> int:
        """Of the buffers that are taken now; ``peak_bytes`` is the most so far, ``bytes`` all of them."""
        return sum(buffer.memory.nbytes for buffer in self._held.values())

    def filled(self, place: int, ids: Handles) -> Batch:
        """A batch of sequences with one new token each, in buffers that the next call for ``place`` fills again."""
        rows, batch = self._batches.get(place, (0, None))
        if batch is None or rows < len(ids):
            rows, batch = len(ids), self.host.make_batch(max_sequences=len(ids), max_new_tokens=len(ids))
            self._batches[place] = rows, batch
        self.host.fill(ids, batch)
        return batch

    def micro_batch(self, batch: Batch) -> MicroBatch:
        """What all fetches of a step share. ``SpecError`` if its blocks do not fit a buffer. Cost: linear in them."""
        if not isinstance(batch, Batch) or batch._core is not self.host.core:
            raise SpecError(f"batch: got {brief(batch)}; must be a batch of the ring's allocator")
        if batch.num_indices > self.blocks:
            raise SpecError(
                f"batch: has {batch.num_indices} blocks of {batch.block_size} tokens; a staging buffer holds "
                f"{self.blocks}: make micro-batches of fewer sequences, or buffers of more blocks"
            )
        if batch.num_new_tokens != batch.num_rows or batch.max_seqlen_q > 1:
            raise SpecError(
                f"batch: has {batch.num_new_tokens} new tokens in {batch.num_rows} rows; decode has one each"
            )
        level = _level(batch, self.device)
        slots = (batch.kv_indptr_cpu[1:] - 1).long() * batch.block_size + batch.kv_last_page_len_cpu.long() - 1
        return MicroBatch(batch, level, slots.to(self.device))

    def fetch(self, layer: int, part: MicroBatch) -> StagedKV:
        """The KV of a layer, in a buffer. ``OutOfMemory`` if all are taken, ``StaleHandle`` if the batch is not current
        any more; nothing has changed then. On CUDA it does not wait for the copy.
        """
        staged = self.try_fetch(layer, part)
        if staged is None:
            raise OutOfMemory(f"staging: all {self.num_buffers} buffers are taken; release() one first")
        return staged

    def try_fetch(self, layer: int, part: MicroBatch) -> StagedKV | None:
        """As ``fetch``; None if all buffers are taken."""
        if self._closed:
            raise StaleHandle("staging: the ring is closed; make another")
        part.batch.check_current()
        sources = {name: self.host.tensor(layer, name) for name in self._kinds}
        if not self._free:
            return None
        buffer = self._free[-1]
        buffer.before_fill()
        begin, parts, ids = 0, [], part.batch.kv_indices_cpu
        for name, (shape, dtype) in self._kinds.items():
            end = begin + len(ids) * shape.numel() * dtype.itemsize
            bounce, memory = (m[begin:end].view(dtype).view(-1, *shape) for m in (buffer.bounce, buffer.memory))
            gather_blocks(sources[name], ids, out=bounce)
            self.host.ledger.count_moved(name, end - begin, "staging")
            parts.append(memory)
            begin = end
        buffer.copy(begin)
        staged = StagedKV(self, self._free.pop(), part, tuple(parts))
        self._held[staged] = buffer
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return staged

    def release_all(self) -> None:
        """Release what is staged."""
        for staged in list(self._held):
            staged.release()

    def close(self) -> None:
        """Free the buffers. Staged KV becomes stale, and a fetch raises ``StaleHandle``."""
        self._free, self._held, self._closed = [], {}, True
        self.host.ledger.hold("staging", 0, "staging")

    def _give_back(self, staged: StagedKV, buffer: _Buffer) -> None:
        del self._held[staged]
        self._free.insert(0, buffer)  # the one that has been free for longest is taken first


class _Buffer:
    """``bounce`` is what the host fills: on CUDA pinned memory beside ``memory``, else the same."""

    def __init__(self, size: int, device: torch.device, stream: Any) -> None:
        self.memory = torch.zeros(size, dtype=torch.uint8, device=device)
        self.bounce = self.memory if stream is None else torch.zeros(size, dtype=torch.uint8, pin_memory=True)
        self._stream = stream
        self._copied: Any = None if stream is None else torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._used: Any = None if stream is None else torch.cuda.Event()  # type: ignore[no-untyped-call]
        if stream is not None:
            self.memory.record_stream(stream)  # when it is freed, torch waits for the last copy
            self.after_use()  # the first copy comes after the zeroes, and after what used this memory before

    def before_fill(self) -> None:
        """The host waits until the last copy has read ``bounce``."""
        if self._copied is not None:
            self._copied.synchronize()

    def copy(self, size: int) -> None:
        if self._stream is None:
            return
        self._stream.wait_event(self._used)
        with torch.cuda.stream(self._stream):
            self.memory[:size].copy_(self.bounce[:size], non_blocking=True)
            self._copied.record()

    def before_use(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream(self.memory.device).wait_event(self._copied)

    def after_use(self) -> None:
        if self._used is not None:
            self._used.record(torch.cuda.current_stream(self.memory.device))


def open_device(device: torch.device | str) -> torch.device:
    """The CPU or a CUDA device; ``SpecError`` for other kinds, ``DeviceError`` if it does not exist."""
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        place = torch.device("meta")
    if place.type not in ("cpu", "cuda"):
        raise SpecError(f'device: got {brief(device)}; must be "cpu" or "cuda:N"')
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device: got {brief(device)}; torch sees {torch.cuda.device_count()} CUDA devices")
    return place


def _parts(host: Allocator) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """K and V: the shape of a block, and the dtype."""
    if not isinstance(host, Allocator) or host.device.type != "cpu":
        raise SpecError(f'host: got {brief(host)}; must be an Allocator with device="cpu"')
    (group, *others) = host.spec.groups
    names = [one.name for one in group.components]
    shapes = {(name, group.heads(name, layer), group.widths(name, layer)) for name in names for layer in group.layers}
    plain = names == ["k", "v"] and len(shapes) == 2 and not group.window_tokens and not group.ragged
    if others or not plain or len(group.layers) != host.spec.num_layers:
        raise SpecError(
            f"host: its spec has {len(others) + 1} groups, the first with {', '.join(names)} in {len(shapes)} shapes; "
            "staging takes one group with K and V, equal in all layers, and no sliding window"
        )
    return {name: (one.shape[1:], one.dtype) for name, one in zip(names, host.kv(0), strict=True)}


def _level(batch: Batch, device: torch.device) -> CascadeLevel:
    """One group for each sequence, whose blocks lie one after the other."""
    fields = {
        "qo_indptr": batch.cu_seqlens_q_cpu, "kv_indptr": batch.kv_indptr_cpu,
        "kv_indices": torch.arange(batch.num_indices, dtype=torch.int32),
        "kv_last_page_len": batch.kv_last_page_len_cpu, "kv_lens": batch.seq_lens_cpu,
    }  # fmt: skip
    kept = {name: value.clone() for name, value in fields.items()}  # the batch's own buffers are refilled
    return CascadeLevel(
        **{name: value.to(device) for name, value in kept.items()},
        **{f"{name}_cpu": value for name, value in kept.items()},
    )
