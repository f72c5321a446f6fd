"""Module batching (MoE-Gen, arXiv:2503.09716): the sizes at which each module of a mixture-of-experts decoder works, so
that a machine whose memory holds neither the weights nor the KV on the device generates the most tokens a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import partial
from itertools import product

from kvmem.arguments import brief, check_number, check_size, format_bytes
from kvmem.errors import SpecError
from kvmem.plan.hardware import HardwareProfile, ModelShape
from kvmem.plan.module_costs import PICOSECONDS, Choice, ModuleCosts
from kvmem.spec import CacheSpec

__all__ = ["Grid", "ModulePlan", "modules"]


@dataclass(frozen=True)
class ModulePlan:
    """How one step is done, and what it takes if the profile is right. Names as in the paper.

    B: sequences that are accumulated. ba: sequences of a micro-batch of attention. be: tokens that an expert computes
    at once. omega: the share of the sequences that the CPU attends, ``cpu_rows / B``. s_expert: bytes of the buffers
    for experts' weights, ``expert_buffers`` of them. s_params: bytes of weights that stay on the device.
    staging_buffers, staging_blocks: for the KV of micro-batches, as ``StagingRing`` takes them; staging_bytes: of all.
    layer_seconds: the mean of all layers of a step of ``step_seconds``. tokens_per_second: computed tokens; in decode,
    generated ones. bound_by: ``"device"``, ``"cpu"``, ``"to_device"`` or ``"to_host"``, which works longest
    (``"thread"`` where the profile is not concurrent). device_bytes, host_bytes: the most that the step uses.
    choice: what the search settled, as its costs take it.
    """

    B: int
    ba: int
    be: int
    omega: float
    cpu_rows: int
    expert_buffers: int
    s_expert: int
    s_params: int
    staging_buffers: int
    staging_blocks: int
    staging_bytes: int
    layer_seconds: float
    step_seconds: float
    tokens_per_second: float
    bound_by: str
    device_bytes: int
    host_bytes: int
    choice: Choice

    def micro_batches(self) -> list[range]:
        """The rows of the batch that are attended at once on the device. The CPU attends those before the first."""
        return [range(first, min(first + self.ba, self.B)) for first in range(self.cpu_rows, self.B, self.ba)]


@dataclass(frozen=True)
class Grid:
    """The values that are tried; None: chosen by the model and the profile.

    B: None tries the largest batch that fits the other values, and three quarters, a half and a quarter of it.
    ba, be: None: powers of two. omega: None: steps of 0.05; a prefill has no CPU share. expert_buffers: None: 1, 2,
    half of the experts and all of them. resident: as ``Choice.resident``; None: as many weights as fit.
    """

    B: tuple[int, ...] | None = None
    ba: tuple[int, ...] | None = None
    be: tuple[int, ...] | None = None
    omega: tuple[float, ...] | None = None
    expert_buffers: tuple[int, ...] | None = None
    resident: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, values in ((field.name, getattr(self, field.name)) for field in fields(self)):
            if values is not None and (not isinstance(values, tuple) or not values):
                raise SpecError(f"Grid.{name}: got {brief(values)}; must be a tuple of at least one value, or None")
            for value in values or ():
                if name != "omega":
                    check_size(f"Grid.{name}", value, 1 if name in ("B", "ba", "be") else 0)
                elif check_number("Grid.omega", value, most=1) < 0:
                    raise SpecError(f"Grid.omega: got {value}; a share is from 0 to 1")


def modules(
    spec: CacheSpec, model: ModelShape, profile: HardwareProfile, *, context: int, queries: int | None = None,
    prefill: bool = False, staging_buffers: int = 3, grid: Grid | None = None,
) -> ModulePlan:  # fmt: skip
    """The plan with the most tokens a second of all in ``grid``: decode, or with ``prefill`` the prompts.

    spec: of the KV in host memory, from which its bytes are taken. context: tokens of each sequence, this step's
    included; where they differ, the longest. queries: sequences that there are in all; None: any number.

    The search is exact: choices are evaluated on the graph of ``ModuleCosts`` in the order of a lower bound of their
    time, until no bound is better than the best. Of equal ones, that with the fewest bytes on the device, then in the
    host. ``SpecError`` if nothing fits, which names the memory that is short. Cost: some seconds for 32 layers.
    """
    if not isinstance(profile, HardwareProfile):
        raise SpecError(
            f"profile: got {brief(profile)}; must be a HardwareProfile, as kvmem.plan.profile() measures it"
        )
    if queries is not None:
        check_size("queries", queries)
    costs = ModuleCosts(spec, model, profile, context=context, prefill=prefill, staging_buffers=staging_buffers)
    search = _Search(costs, grid or Grid(), queries)
    best = _best(costs, set(search.choices()))
    if best is None:
        raise SpecError(search.shortage())
    seconds, busy = costs.picoseconds(best) / PICOSECONDS, costs.busy(best)
    return ModulePlan(
        B=best.batch, ba=best.micro_batch, be=best.expert_batch, omega=best.cpu_rows / best.batch,
        cpu_rows=best.cpu_rows, expert_buffers=best.expert_buffers,
        s_expert=best.expert_buffers * model.expert_bytes, s_params=costs.resident_bytes(best),
        staging_buffers=staging_buffers, staging_blocks=costs.staging_blocks(best),
        staging_bytes=costs.staging_bytes(best), layer_seconds=seconds / model.num_layers, step_seconds=seconds,
        tokens_per_second=best.batch * costs.new / seconds, bound_by=max(busy, key=lambda name: busy[name]),
        device_bytes=costs.device_bytes(best), host_bytes=costs.host_bytes(best), choice=best,
    )  # fmt: skip


class _Search:
    """The choices of a grid that fit."""

    def __init__(self, costs: ModuleCosts, grid: Grid, queries: int | None) -> None:
        self.costs, self.grid, self.queries = costs, grid, queries
        model, sequence = costs.model, costs.kv_bytes * costs.model.num_layers
        fit = max(1, (costs.profile.host_bytes - costs.weight_bytes) // sequence)
        self.most = most = min(fit, queries or fit, max(grid.B or (fit,)))
        self.ba = grid.ba or _powers(max(1, most // 64), most)
        tokens = costs.expert_tokens(most)[1]
        self.be = grid.be or _powers(max(1, min(256, tokens // 64)), min(tokens, 65_536))
        self.omega = (0.0,) if costs.prefill else grid.omega or tuple(step / 20 for step in range(21))
        self.buffers = grid.expert_buffers or (0, 1, 2, max(1, model.num_experts // 2), model.num_experts)

    def choices(self) -> Iterator[Choice]:
        for ba, be, omega, buffers in product(self.ba, self.be, self.omega, self.buffers):
            least = 0 if buffers else self.costs.most_resident  # without a buffer, all weights must stay
            of = partial(self._choice, ba, be, omega, buffers, least)
            for choice in map(of, self._batches(of)):
                yield from (choice._replace(resident=resident) for resident in self._residents(choice, least))

    def _choice(self, ba: int, be: int, omega: float, buffers: int, resident: int, batch: int) -> Choice:
        return Choice(batch, ba, be, int(omega * batch + 0.5), buffers, resident)

    def _fits(self, choice: Choice) -> bool:
        costs, profile = self.costs, self.costs.profile
        return costs.host_bytes(choice) <= profile.host_bytes and costs.device_bytes(choice) <= profile.device_bytes

    def _batches(self, of: Callable[[int], Choice]) -> list[int]:
        if self.grid.B is not None:
            return [batch for batch in self.grid.B if batch <= (self.queries or batch) and self._fits(of(batch))]
        most = _largest(lambda batch: self._fits(of(batch)), self.most)
        return sorted({most * quarters // 4 for quarters in (1, 2, 3, 4)} - {0})

    def _residents(self, choice: Choice, least: int) -> list[int]:
        most = self.costs.most_resident
        if self.grid.resident is not None:
            return [n for n in self.grid.resident if least <= n <= most and self._fits(choice._replace(resident=n))]
        return [_largest(lambda n: self._fits(choice._replace(resident=n)), most, least)]

    def shortage(self) -> str:
        """Which memory is short, for the least that the grid allows."""
        costs, grid, profile = self.costs, self.grid, self.costs.profile
        batch, buffers = min(grid.B or (1,)), min((count for count in self.buffers if count), default=0)
        resident = min(grid.resident or (0,))
        least = self._choice(min(self.ba), min(self.be), min(self.omega), buffers, resident, batch)
        host, device = costs.host_bytes(least), costs.device_bytes(least)
        if host > profile.host_bytes:
            return (
                f"host memory: {profile.host_bytes:,} bytes; weights take {costs.weight_bytes:,} and a sequence of "
                f"{costs.context} tokens {costs.kv_bytes * costs.model.num_layers:,}: needs {host:,} "
                f"({format_bytes(host)}) at least; lower context, or give more host_bytes"
            )
        if self.queries is not None and batch > self.queries:
            return f"queries: got {self.queries}; the smallest batch of the grid is {batch}"
        return (
            f"device memory: {profile.device_bytes:,} bytes; weights that are needed at once, embedding and output "
            f"matrix, and the buffers for {batch} sequences take {device:,} ({format_bytes(device)}) at least; lower "
            "context or staging_buffers, or give more device_bytes"
        )


def _best(costs: ModuleCosts, choices: set[Choice]) -> Choice | None:
    """In the order of the bounds, of equal ones in that of ties: so the first that attains its bound is the best."""
    Rank = tuple[int, int, Choice]
    bounds: list[tuple[Fraction, Rank]] = sorted(
        (Fraction(costs.least_picoseconds(one), one.batch), (costs.device_bytes(one), costs.host_bytes(one), one))
        for one in choices
    )
    best: tuple[Fraction, Rank] | None = None
    for bound, rank in bounds:
        if best is not None and bound > best[0]:
            break
        if best is None or (bound, rank) < best:
            found = Fraction(costs.picoseconds(rank[2]), rank[2].batch), rank
            best = found if best is None else min(best, found)
    return best[1][2] if best is not None else None


def _largest(fits: Callable[[int], bool], most: int, least: int = 0) -> int:
    """The largest number up to ``most`` that fits, by bisection; ``least``, which is not asked about, if none does."""
    low, high = least, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _powers(least: int, most: int) -> tuple[int, ...]:
    """Powers of two from ``least`` on, to the first that is not below ``most``."""
    first, last = (least - 1).bit_length(), max(least - 1, most - 1).bit_length()
    return tuple(1 << power for power in range(first, last + 1))
