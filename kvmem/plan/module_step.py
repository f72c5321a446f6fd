"""Decode steps of a batch whose KV is in host memory: attention in micro-batches and by the CPU, experts in batches of
tokens. What ``kvmem.plan.modules`` plans, done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from types import TracebackType
from weakref import ref

import numpy as np
import torch

from kvmem.allocator import Allocator, Batch, Sequence
from kvmem.allocator.ids import several
from kvmem.allocator.prefix import Tokens
from kvmem.arguments import brief, check_number, check_size
from kvmem.errors import SpecError
from kvmem.kernels import cpu
from kvmem.kernels.checks import check_queries
from kvmem.kernels.reference import level_attention, oracle
from kvmem.kernels.write import write_kv
from kvmem.plan.staging import MicroBatch, StagedKV, StagingRing

__all__ = ["ModuleStep", "attend_in_place", "attend_staged", "expert_batches"]

#: ``(q [n, Hq, D], staged KV, scale) -> out [n, Hq, D]``, on the ring's device.
AttendStaged = Callable[[torch.Tensor, StagedKV, float | None], torch.Tensor]


class ModuleStep:
    """One token for each of ``sequences``, layer by layer; a context manager.

    The first ``omega`` of the sequences are attended by the CPU, where their KV lies. The others are attended on the
    ring's device, ``micro_batch`` at a time, each in a staging buffer that is filled ahead, also for the next layer.
    The new K and V are written to host memory too. Sequences are exchanged between steps: after one was freed within,
    ``attend`` raises ``StaleHandle``. Unless ``commit()`` was called, the end of the ``with`` block takes the new
    tokens back. A ring has one step at a time.

    ``OutOfMemory`` if host memory has no room for the new tokens, ``SpecError`` if a micro-batch does not fit a buffer;
    nothing has changed then.
    """

    def __init__(
        self, ring: StagingRing, sequences: Iterable[Sequence | int], *, micro_batch: int, omega: float = 0.0,
        attend: AttendStaged | None = None,
    ) -> None:  # fmt: skip
        """attend: runs the device's attention in place of torch, such as a paged kernel over ``staged.kv()``."""
        self.ring, self.host, self._attend = ring, ring.host, attend or attend_staged
        check_size("micro_batch", micro_batch)
        if not check_number("omega", omega, most=1) >= 0:
            raise SpecError(f"omega: got {omega}; the CPU's share is from 0 to 1")
        before = ring.step() if ring.step is not None else None
        if ring.used_bytes or (before is not None and before._open):
            raise SpecError("ring: is in use; the step before this one has not ended: commit() or abort() it")
        self._ids = np.array(several(sequences, self.host.core), np.int32)
        self._lengths = self._committed()
        self.cpu_rows = int(omega * len(self._ids) + 0.5)
        self.host.extend_batch(self._ids, np.ones_like(self._ids))
        self._open, self._layer, ring.step = True, 0, ref(self)
        try:
            self._begin(micro_batch)
        except BaseException:
            self.abort()
            raise

    def _committed(self) -> list[int]:
        count = len(self._ids)
        if not count or len(np.unique(self._ids)) < count:
            raise SpecError(
                f"sequences: got {count}, {len(np.unique(self._ids))} different; a step has one or more, each once"
            )
        reserved, committed = np.empty(count, np.int64), np.empty(count, np.int64)
        self.host.core.lengths(self._ids, 0, reserved, committed)
        if (reserved != committed).any():
            raise SpecError("sequences: some have tokens that are not committed; commit() or truncate() them first")
        return [int(length) for length in committed]

    def _begin(self, micro_batch: int) -> None:
        count, host = len(self._ids), self.host
        self._all = self.ring.filled(-1, self._ids)
        self._rows = [slice(n, min(n + micro_batch, count)) for n in range(self.cpu_rows, count, micro_batch)]
        self._by_cpu = self.ring.filled(-2, self._ids[: self.cpu_rows]) if self.cpu_rows else None
        self._parts = [self.ring.micro_batch(self.ring.filled(n, self._ids[r])) for n, r in enumerate(self._rows)]
        self._todo: Iterator[tuple[int, MicroBatch]] = iter(product(range(host.spec.num_layers), self._parts))
        self._ahead: deque[StagedKV] = deque()
        while self._fetch():
            pass

    @property
    def positions(self) -> torch.Tensor:
        """Of the new tokens, int32 ``[B]``, on the CPU."""
        return self._all.positions

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None
    ) -> torch.Tensor:
        """Attention of the new tokens over all of their sequences: ``[B, Hq, D]`` in q's dtype, on its device.

        q: ``[B, Hq, D]``; k, v: ``[B, H, D]``, after rotation, on the ring's device. Call it for each layer in turn.
        A call that is refused (``SpecError``, ``StaleHandle``) changes nothing; an error of the attention itself ends
        the step.
        """
        if not self._open or layer != self._layer:
            due = f"the next is {self._layer}" if self._open else "the step has ended"
            raise SpecError(f"layer: got {brief(layer)}; {due}")
        self._check(q, k, v)
        write_kv(self.host.kv(layer), self._all, k.to("cpu"), v.to("cpu"))
        try:
            out = self._attend_all(layer, q, k, v, scale)
        except BaseException:
            self.abort()
            raise
        self._layer += 1
        return out

    def _check(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        check_queries(q)
        for name, one in (("q", q), ("k", k), ("v", v)):
            if not isinstance(one, torch.Tensor) or one.device.type != self.ring.device.type:
                got = one.device if isinstance(one, torch.Tensor) else type(one).__name__
                raise SpecError(f"{name}: got {got}; must be a tensor on {self.ring.device}, where the ring is")
        group = self.host.spec.groups[0]
        heads, (width,) = group.heads("k", 0), group.widths("k", 0)
        if len(q) != len(self._ids) or q.shape[1] % heads or q.shape[2] != width:
            raise SpecError(
                f"q: got {tuple(q.shape)}; must be [{len(self._ids)} sequences, a multiple of {heads} heads, {width}]"
            )

    def _attend_all(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        parts = []
        for rows in self._rows:
            staged = self._ahead[0]
            staged.write(k[rows], v[rows])
            parts.append(self._attend(q[rows], staged, scale))
            staged.release()
            self._ahead.popleft()
            self._fetch()
        if self._by_cpu is not None:  # last, because what was put on a CUDA stream runs meanwhile
            asked = q[: self.cpu_rows].to("cpu")
            parts.insert(0, attend_in_place(asked, self.host, layer, self._by_cpu, scale).to(q.device))
        return torch.cat(parts)

    def commit(self, tokens: Tokens | None = None) -> None:
        """End the step: the new tokens are valid. tokens: their ids, one for each sequence, so that prefixes are found.

        ``SpecError`` before the last layer.
        """
        if not self._open or self._layer != self.host.spec.num_layers:
            raise SpecError(
                f"commit: {self._layer} of {self.host.spec.num_layers} layers were attended; attend all first"
            )
        self.host.commit_batch(self._ids, np.ones_like(self._ids), tokens)
        self._open = False

    def abort(self) -> None:
        """End the step and take the new tokens back, where sequences still live. Nothing if it has ended."""
        if not self._open:
            return
        self._open = False
        self.ring.release_all()
        for handle, length in zip(self._ids.tolist(), self._lengths, strict=True):
            if self.host.core.is_live(handle):
                self.host.core.truncate(handle, length)

    def _fetch(self) -> bool:
        """Fill one more buffer ahead, if one is free and something is left to fetch."""
        if len(self._ahead) == self.ring.num_buffers:
            return False
        layer, part = next(self._todo, (0, None))
        if part is not None:
            self._ahead.append(self.ring.fetch(layer, part))
        return part is not None

    def __enter__(self) -> ModuleStep:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.abort()


def attend_staged(q: torch.Tensor, staged: StagedKV, scale: float | None) -> torch.Tensor:
    """In torch, on any device; in float64 for such queries, else in float32."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return level_attention(q, staged.kv(), staged.micro_batch.level, scale=scale, dtype=dtype)[0].to(q.dtype)


def attend_in_place(q: torch.Tensor, host: Allocator, layer: int, batch: Batch, scale: float | None) -> torch.Tensor:
    """The CPU's share, over host memory: ``[n, Hq, D]`` in q's dtype. By kvmem's own kernel, or where it has not the
    dtype of cache or queries, in float64 by torch.
    """
    cache = host.kv(layer)
    if cache[0].dtype in cpu.DTYPES and q.dtype in cpu.DTYPES[:3]:
        return cpu.attention(q, cache, batch, scale=scale)[0]
    return oracle(q, cache, batch, scale=scale)[0].to(q.dtype)


def expert_batches(chosen: torch.Tensor, most: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """``(expert, rows, places)``, expert by expert, at most ``most`` tokens at a time: ``chosen[rows, places]`` are all
    that expert. Each expert is met once, so its weights are needed once.

    chosen: int ``[tokens, experts of each]``. rows, places: int64. An expert without tokens is left out.
    """
    check_size("most", most)
    if chosen.ndim != 2 or chosen.is_floating_point():
        raise SpecError(f"chosen: got {chosen.dtype} {tuple(chosen.shape)}; must be experts, [tokens, experts of each]")
    flat = chosen.flatten()
    order = torch.argsort(flat, stable=True)
    experts, counts = torch.unique_consecutive(flat[order], return_counts=True)
    for expert, own in zip(experts.tolist(), torch.split(order, counts.tolist()), strict=True):
        for part in torch.split(own, most):
            yield expert, part // chosen.shape[1], part % chosen.shape[1]
