"""How an allocator is made: its arguments are checked, its layout is chosen, its core is opened."""

from __future__ import annotations

import os
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

from kvmem import _core
from kvmem.allocator.tiers.engine import MOVE_TOKENS, open_tiers
from kvmem.allocator.tiers.events import TierEvents
from kvmem.arguments import INT32_MAX, check_bool, check_choice, check_size, is_auto, is_fraction, parse_bytes
from kvmem.errors import SpecError, StaleHandle
from kvmem.events import EventBatch, EventStream
from kvmem.events.digests import decode_key
from kvmem.geometry.backends import BACKENDS, lay_out
from kvmem.geometry.base import Sizes, require_supported
from kvmem.geometry.group_layout import GroupLayout, resolve_interleave
from kvmem.geometry.page_size import choose_page_bytes
from kvmem.memory.device import Device, in_debug_mode
from kvmem.memory.pool import PagePool, pool_for
from kvmem.spec import CacheSpec
from kvmem.tiers.config import Tiers

if TYPE_CHECKING:
    import torch

__all__ = ["Closed", "OpenedCore", "default"]

#: The core allocates some hundred bytes of host memory for each at the start.
MAX_SEQUENCES = 2**20

_T = TypeVar("_T")


def default(value: _T | None, otherwise: _T) -> _T:
    """Return ``value``, or ``otherwise`` if it is None."""
    return otherwise if value is None else value


class OpenedCore:
    """The base of ``Allocator`` and of its groups of calls: settled arguments, the pool, the layouts and the core."""

    core: _core.Allocator
    pool: PagePool

    def __init__(
        self,
        spec: CacheSpec,
        *,
        backend: Literal["virtual", "paged"] = "virtual",
        device: str | torch.device | None = None,
        memory: int | float | str | None = None,
        max_sequences: int,
        max_tokens: int,
        page_bytes: int | None = None,
        interleave: int | Literal["all", "none"] | None = None,
        map_ahead_tokens: int | None = None,
        tail_guard_tokens: int | None = None,
        zero: Literal["never", "fresh", "always"] = "fresh",
        prefix_cache: bool = True,
        partial_reuse: bool = True,
        append_only: bool = False,
        policy: str = "density",
        cached_rows: int | None = None,
        events: int = 0,
        event_key: bytes = b"",
        tiers: Tiers | None = None,
        pool: PagePool | None = None,
        record_ops: bool = False,
        debug: bool | None = None,
        driver: _core.Driver | None = None,
    ) -> None:
        self._check_names(spec, backend, zero, policy, append_only)
        self._check_sizes(max_sequences, max_tokens, record_ops, debug)
        self._shares_pool, choose = pool is not None, partial(self._choose_page, interleave)
        self.pool = pool_for(pool, device, memory, page_bytes, driver, record_ops, choose)
        self._settle(interleave, tail_guard_tokens, map_ahead_tokens)
        self._lay_out(cached_rows, limit := self._limit_bytes(memory))
        partial_reuse = check_bool("partial_reuse", partial_reuse) and not self._whole_blocks
        self._open(zero, limit, _prefix((prefix_cache, partial_reuse, append_only), policy, events, self._moves(tiers)))
        self._pending: dict[int, Any] = {}  # by handle: sequences that wait for a load
        self._tiering = None if tiers is None else open_tiers(self.core, spec, self._layouts, self.device.type, tiers)
        self._events = EventStream(spec, self._drain_events, key=event_key) if events else None
        if self._tiering is not None and self._events is not None:
            self._tiering.events = TierEvents(spec, self._events.digest)

    def _check_names(
        self, spec: CacheSpec, backend: Literal["virtual", "paged"], zero: str, policy: str, append_only: bool
    ) -> None:
        if not isinstance(spec, CacheSpec):
            raise SpecError(f"spec: got {type(spec).__name__}; must be a CacheSpec, see CacheSpec.from_config()")
        for group in spec.groups:
            require_supported(group)
        check_choice("backend", backend, tuple(BACKENDS))
        check_choice("zero", zero, ("never", "fresh", "always"))
        check_choice("policy", policy, tuple(_core.eviction_policy_names()))
        self.append_only = check_bool("append_only", append_only)
        self.spec, self.backend = spec, backend
        #: Whether some group's blocks are copied, and match prefixes, as a whole.
        self._whole_blocks = any(group.block_order != "tokens" for group in spec.groups)
        self._main = next((i for i, g in enumerate(spec.groups) if g.growth == "token"), 0)

    def _check_sizes(self, max_sequences: int, max_tokens: int, record_ops: bool, debug: bool | None) -> None:
        self.max_sequences = check_size("max_sequences", max_sequences, most=MAX_SEQUENCES)
        self.max_tokens = check_size("max_tokens", max_tokens, most=INT32_MAX)
        self._recording = check_bool("record_ops", record_ops)
        self._debug = in_debug_mode() if debug is None else check_bool("debug", debug)

    def _choose_page(self, interleave: int | str | None, home: Device, memory_bytes: int) -> int:
        least = home.default_page_bytes(memory_bytes)
        if self.backend != "virtual" or home.info.maps_cheaply:  # then small pages cost little
            return least
        together = resolve_interleave("all" if interleave is None else interleave, self.spec.num_layers)
        layouts = [GroupLayout(group, together) for group in self.spec.groups]
        return choose_page_bytes(layouts, max_tokens=self.max_tokens, memory_bytes=memory_bytes, least=least)

    def _settle(self, interleave: int | str | None, guard: int | None, ahead: int | None) -> None:
        """Set the attributes that depend on the device."""
        home = self.pool.device
        self.device, info = home.torch_device, home.info
        self.interleave = resolve_interleave("all" if interleave is None else interleave, self.spec.num_layers)
        usual = 0 if self._whole_blocks else info.default_guard_tokens
        self.tail_guard_tokens = check_size("tail_guard_tokens", default(guard, usual), 0, INT32_MAX)
        if self._whole_blocks and self.tail_guard_tokens:
            raise SpecError(
                f"tail_guard_tokens: got {guard}; a guard is zeroed token by token, and blocks of this spec are moved "
                'as a whole (block_order): use 0, with zero="always" for kernels that load the rest of a block'
            )
        self.map_ahead_tokens = check_size("map_ahead_tokens", default(ahead, info.default_ahead_tokens), 0, INT32_MAX)

    def _limit_bytes(self, memory: int | float | str | None) -> int:
        budget = self.pool.budget_bytes
        if memory is None or is_auto(memory):
            return budget
        if is_fraction("memory", memory):  # the budget of a pool of its own is that fraction already
            return int(float(memory) * budget) if self._shares_pool else budget
        return parse_bytes("memory", memory)  # type: ignore[arg-type]  # no float

    def _lay_out(self, cached_rows: int | None, limit: int) -> None:
        self._layouts = [GroupLayout(group, self.interleave) for group in self.spec.groups]
        rows = None if cached_rows is None else check_size("cached_rows", cached_rows, 0, 4 * MAX_SEQUENCES)
        if self.backend != "virtual":
            rows = 0
        sizes = Sizes(
            page_bytes=self.pool.page_bytes,
            max_sequences=self.max_sequences,
            cached_rows=max(16, 3 * self.max_sequences) if rows is None else rows,
            max_tokens=self.max_tokens,
            tail_guard_tokens=self.tail_guard_tokens,
            memory_bytes=limit,
            capacity_bytes=max(limit, self.pool.device.total_bytes or 4 * limit),
        )
        backend = BACKENDS[self.backend]
        self.cached_rows, self._geometry = lay_out(backend, self._layouts, sizes, fewer_rows=rows is None)
        self._num_rows = 1 + self.max_sequences + self.cached_rows

    def _open(self, zero: str, limit: int, prefix: _core.PrefixOptions) -> None:
        self._arenas: dict[tuple[int, int], torch.Tensor] = {}
        self._labels: dict[int, str] = {}  # by handle; some may have been freed since the last listing
        self._holders: weakref.WeakSet[Any] = weakref.WeakSet()  # their `_core` is replaced by close()
        self.core = _core.Allocator(
            geometry=_core.Geometry(
                page_bytes=self.pool.page_bytes,
                max_sequences=self.max_sequences,
                rows=self._num_rows,
                tail_guard_tokens=self.tail_guard_tokens,
                map_ahead_tokens=self.map_ahead_tokens,
                zero=getattr(_core.Zero, zero),
                debug=self._debug,
                groups=self._geometry,
            ),
            pool=self.pool.core,
            paged=BACKENDS[self.backend].paged,
            limit_pages=PagePool.pages("memory", limit, self.pool.page_bytes),
            owns_pool=not self._shares_pool,
            prefix=prefix,
        )
        if self._recording:
            self.core.record()
            self.pool.is_recorded = True

    def _moves(self, tiers: Tiers | None) -> int:
        if tiers is None:
            return 0
        if not isinstance(tiers, Tiers):
            raise SpecError(f"tiers: got {type(tiers).__name__}; must be Tiers(host=...)")
        if tiers.lower and self._recording:
            raise SpecError(
                "tiers: lower tiers fill this allocator's host memory and not that of one that follows its ops; with "
                "record_ops=True give host memory only"
            )
        return max(1 << 12, MOVE_TOKENS // max(g.block_size for g in self.spec.groups))

    def _drain_events(self, taken: int, most: int, restart: bool) -> EventBatch:
        number, records, roots = self.core.drain_events(taken, most, restart)
        return EventBatch(number, records, {root: (decode_key(s), decode_key(e)) for root, (s, e) in roots.items()})


def _prefix(reuse: tuple[bool, bool, bool], policy: str, events: int, moves: int) -> _core.PrefixOptions:
    prefix_cache, partial_reuse, append_only = reuse
    return _core.PrefixOptions(
        on=check_bool("prefix_cache", prefix_cache),
        partial=partial_reuse and not append_only,
        append_only=append_only,
        policy=policy,
        hash_bits=int(os.environ.get("KVMEM_HASH_BITS", "64")),  # fewer bits in tests of hash collisions
        event_capacity=check_size("events", events, 0, INT32_MAX),
        move_capacity=moves,
    )


class Closed:
    """Takes the place of a closed core or pool: every access raises ``StaleHandle``."""

    def __getattr__(self, name: str) -> NoReturn:
        raise StaleHandle("this allocator is closed: close(), or the end of its with-statement, freed its sequences")

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        self.__getattr__(name)
