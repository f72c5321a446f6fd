"""``Allocator.prefetch``: blocks from lower tiers to host memory, from there to the device, and what a kernel will read
to the cache in front of the device's memory. Hints: they change no result, whatever becomes of them.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch

from kvmem import _core
from kvmem.allocator.prefetch.block_sets import BlockSet
from kvmem.allocator.prefetch.ranges import Ranges
from kvmem.allocator.prefetch.read_sets import ReadCalls, ReadSet
from kvmem.allocator.prefix import Salt, Tokens, token_ids
from kvmem.allocator.tiers.calls import TierCalls
from kvmem.allocator.tiers.loads import Load, wait_until
from kvmem.arguments import brief, check_choice
from kvmem.errors import SpecError
from kvmem.events.digests import ExtraKey

if TYPE_CHECKING:
    from kvmem.allocator.prefetch.l2_triton import L2Prefetcher
    from kvmem.allocator.prefetch.ranges import Int64s

__all__ = ["PrefetchCalls", "Prefetching", "Window"]


@dataclass(frozen=True)
class Window:
    """What is prefetched in one window of a plan (``kvmem.plan.prefetch``), in the order in which it will be read.

    parts: ``Ranges``, read sets and ``BlockSet``. seconds: of the window. capacity_bytes: the most that fits in it.
    wanted_bytes: what is read after it. num_bytes: what of that is prefetched.
    """

    parts: tuple[Ranges | BlockSet, ...]
    seconds: Fraction
    capacity_bytes: int
    wanted_bytes: int

    @property
    def num_bytes(self) -> int:
        """How many bytes are prefetched."""
        return sum(part.num_bytes for part in self.parts)


class Prefetching:
    """A prefetch under way. Nothing needs to wait for it; but a load ends when nobody has its handle any more.

    num_bytes: of the window. skipped_bytes: what of them is left out, because it was freed, moved or cut off since the
        plan was made, or on a GPU because the ranges are too many. loads: of blocks from lower tiers.
    """

    def __init__(
        self, num_bytes: int, skipped_bytes: int, touch: _CpuTouch | _CudaTouch | None, loads: list[Load]
    ) -> None:
        self.num_bytes, self.skipped_bytes, self.loads, self._touch = num_bytes, skipped_bytes, loads, touch

    @property
    def issued_bytes(self) -> int:
        """How many bytes the cache was asked for so far; on a GPU all of them at once."""
        return 0 if self._touch is None else self._touch.issued_bytes

    def done(self) -> bool:
        """Return whether it has ended. Moves what has arrived, as ``Load.done()``; never waits."""
        ended = [load.done() for load in self.loads]
        return all(ended) and (self._touch is None or self._touch.done())

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended, ``timeout`` seconds at most; return whether it has."""
        return wait_until(self.done, timeout)

    def cancel(self) -> None:
        """Stop it where it is. What a GPU was given, it does."""
        for load in self.loads:
            load.cancel()
        if self._touch is not None:
            self._touch.cancel()


class _CpuTouch:
    """A helper thread asks for one cache line after the other."""

    def __init__(self, table: Int64s, threads: ThreadPoolExecutor) -> None:
        self._state = np.array([0, np.iinfo(np.int64).max], np.int64)  # bytes asked for, and the most
        self._future: Future[None] = threads.submit(_core.prefetch_lines, table, self._state)

    @property
    def issued_bytes(self) -> int:
        return int(self._state[0])

    def done(self) -> bool:
        return self._future.done()

    def cancel(self) -> None:
        self._state[1] = 0
        self._future.cancel()


class _CudaTouch:
    """A kernel on a stream beside the one in use."""

    def __init__(self, table: Int64s, prefetcher: L2Prefetcher, stream: Any) -> None:
        with torch.cuda.stream(stream):
            self.issued_bytes = prefetcher.fill(table)
            prefetcher.launch()
            self._event = stream.record_event()

    def done(self) -> bool:
        return bool(self._event.query())

    def cancel(self) -> None:
        """The kernel is short."""


class PrefetchCalls(ReadCalls, TierCalls):
    """The calls of an allocator that bring data closer before it is used."""

    _helper: ThreadPoolExecutor | None = None

    @overload
    def prefetch(self, tokens: Window, stream: Any = None) -> Prefetching: ...

    @overload
    def prefetch(
        self,
        tokens: Tokens,
        stream: None = None,
        *,
        to: Literal["device", "host"] = "device",
        salt: Salt = None,
        extra_key: ExtraKey = None,
        adapter: str | None = None,
    ) -> Load: ...

    def prefetch(
        self,
        tokens: Tokens | Window,
        stream: Any = None,
        *,
        to: Literal["device", "host"] = "device",
        salt: Salt = None,
        extra_key: ExtraKey = None,
        adapter: str | None = None,
    ) -> Load | Prefetching:
        """Start to bring closer what a window of a plan names (``Prefetching``), or the blocks of a prompt (``Load``).

        tokens: a ``Window`` of ``kvmem.plan.prefetch``. Its ranges go to the cache in front of the device's memory: on
            a CPU a helper thread asks for each line, on CUDA a kernel of few programs runs on ``stream``. Its blocks go
            from lower tiers to host memory in the background, and from there to the device in this call. What was
            freed, moved, cut off or got out of window since the plan was made is skipped and not touched.
        tokens: or token ids, whose blocks are brought from lower tiers: poll ``done()`` between steps, which moves what
            has arrived; or ``wait()``; or ``cancel()``.
        stream: of torch, beside the one that computes; default one of the allocator's own.
        to: for token ids; ``"device"``, as cached content that ``sequence(tokens)`` then finds; or ``"host"``, where a
            later call finds it faster. salt, extra_key, adapter: as for ``sequence()``.

        A hint: it never waits, results are the same with and without, and a fault of a tier is a block that is not
        found. Not found: memory that another thread frees between the check and the launch on a GPU.
        """
        if isinstance(tokens, Window):
            return self._prefetch_window(tokens, stream)
        check_choice("to", to, ("device", "host"))
        if stream is not None:
            raise SpecError("stream: blocks are loaded on the stream in use; a stream is for a window of a plan")
        prompt = self._prompt(token_ids(tokens), salt, extra_key, adapter, leave=0)
        return self.tiering.load(prompt, to_device=to == "device")

    def block_set(
        self,
        tokens: Tokens,
        *,
        to: Literal["device", "host"],
        salt: Salt = None,
        extra_key: ExtraKey = None,
        adapter: str | None = None,
    ) -> BlockSet:
        """Return what a plan can bring closer of a prompt: ``to="device"``, the blocks that host memory has and the
        device has not; ``to="host"``, those that neither has, all of which the lower tiers are taken to have.

        tokens, salt, extra_key, adapter: as for ``sequence()``. ``SpecError`` without tiers. Never asks a lower tier.
        """
        check_choice("to", to, ("device", "host"))
        prompt, tiering = self._prompt(token_ids(tokens), salt, extra_key, adapter, leave=0), self.tiering
        located, forms, places = tiering.locate(prompt), tiering.forms, []
        for k, g in tiering.needed(prompt.num_blocks) if prompt.num_blocks else ():
            if to == "device" and (k, g) in located.names:
                places.append((k, g, forms[g].slot_bytes))
            elif to == "host" and tiering.tiers and not located.has(k, g):
                places.append((k, g, forms[g].canonical_bytes))
        return BlockSet.of(prompt, to, places)

    def _prefetch_window(self, window: Window, stream: Any) -> Prefetching:
        table = self.current_ranges(window)
        planned = sum(part.num_bytes for part in window.parts if isinstance(part, Ranges))
        loads = [self._load_blocks(part) for part in window.parts if isinstance(part, BlockSet)]
        touch = self._touch(table, stream) if len(table) else None
        given = touch.issued_bytes if isinstance(touch, _CudaTouch) else Ranges(table).num_bytes
        return Prefetching(window.num_bytes, planned - given, touch, [load for load in loads if load is not None])

    def current_ranges(self, window: Window) -> Int64s:
        """Return the ranges of a window, as of ``Ranges.table``, without what was freed, moved, cut off or got out of
        window since the plan was made: for ``L2Prefetcher.fill``.
        """
        self.core.check_usable()
        tables = [np.empty((0, 4), np.int64)]
        for part in window.parts:
            if isinstance(part, Ranges):
                memory = part.memory
                if isinstance(memory, torch.Tensor) and memory.device != self.device:
                    raise SpecError(f"prefetch: got a tensor on {memory.device}; the allocator's is {self.device}")
                tables.append((self._still_there(part) if isinstance(part, ReadSet) else part).table)
        return np.concatenate(tables)

    def _load_blocks(self, blocks: BlockSet) -> Load | None:
        """Start to load what is missing up to the end of the blocks, or promote it to the device."""
        end, prompt = blocks.num_blocks, blocks.prompt
        ids = prompt.ids[: end * self.tiering.block_size]
        prompt = prompt._replace(ids=ids, digests=prompt.digests[:end])
        if blocks.to == "host":
            return self.tiering.load(prompt, to_device=False)
        self.tiering.promote(prompt)
        return None

    def _touch(self, table: Int64s, stream: Any) -> _CpuTouch | _CudaTouch:
        if self.device.type == "cuda":
            return self._touch_cuda(table, stream)
        if stream is not None:
            raise SpecError(f"stream: got {brief(stream)}; device {str(self.device)!r} has no streams")
        if self._helper is None:  # of two threads that get here, one finds the other's
            self.__dict__.setdefault("_helper", ThreadPoolExecutor(1, thread_name_prefix="kvmem-prefetch"))
        return _CpuTouch(table, self.__dict__["_helper"])

    def _touch_cuda(self, table: Int64s, stream: Any) -> _CpuTouch | _CudaTouch:
        try:  # Triton is imported where it is needed
            from kvmem.allocator.prefetch.l2_triton import L2Prefetcher
        except ImportError as error:
            raise SpecError(
                "prefetch: a GPU's L2 is reached by a Triton kernel: pip install 'kvmem[triton]'"
            ) from error
        # By the stream that was asked for: the one used, and its buffer.
        held: dict[Any, tuple[Any, L2Prefetcher]] = self.__dict__.setdefault("_l2", {})
        if stream not in held:
            beside = torch.cuda.Stream(self.device) if stream is None else stream  # type: ignore[no-untyped-call]
            self.pool.streams.include(beside)
            with torch.cuda.stream(beside):
                held[stream] = beside, L2Prefetcher(self.device)
        beside, prefetcher = held[stream]
        return _CudaTouch(table, prefetcher, beside)

    def _end_prefetches(self) -> None:
        if self._helper is not None:
            self._helper.shutdown(wait=True, cancel_futures=True)
        self.__dict__.pop("_l2", None)
