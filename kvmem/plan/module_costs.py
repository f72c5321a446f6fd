"""What a step of module batching takes of time and memory: the copies and kernels of every layer, as a graph.

The schedule is MoE-Gen's (arXiv:2503.09716). All KV and all weights are in host memory. In each layer the sequences of
the device's share are attended in micro-batches, whose KV is copied to one of a few staging buffers; the others are
attended by the CPU where their KV lies, at the same time. Then each expert computes its tokens of the whole batch,
while the weights of the next experts are copied to a few buffers. Copies run ahead as buffers permit, also into the
next layer. With buffers for all of a layer, a step takes as long as its busiest engine, and the time to fill and drain.
For the CPU that counts what waits for it: the layer's experts, and the next layer's queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import cached_property, lru_cache
from math import ceil, sqrt
from typing import NamedTuple, TypeVar

from kvmem.arguments import check_size
from kvmem.errors import SpecError
from kvmem.plan.clock import Clock, Link, Work
from kvmem.plan.hardware import HardwareProfile, ModelShape
from kvmem.spec import CacheSpec

__all__ = ["PICOSECONDS", "Choice", "ModuleCosts"]

PICOSECONDS = 10**12  # times are integers of these: the graph's longest path and its lower bound are then exact
_Handle = TypeVar("_Handle")
#: ``run(name, resource, picoseconds, after)`` returns what later work has in its ``after``, where None is nothing.
Run = Callable[[str, str, int, tuple[_Handle | None, ...]], _Handle]


class Choice(NamedTuple):
    """What is decided. batch: sequences, of which the CPU attends ``cpu_rows``. micro_batch: sequences attended at
    once. expert_batch: tokens that an expert computes at once. expert_buffers: of one expert's weights each.
    resident: weights that stay on the device: 0 nothing, 1 the dense part of all layers, 1 + n also n experts, evenly
    over the layers.
    """

    batch: int
    micro_batch: int
    expert_batch: int
    cpu_rows: int
    expert_buffers: int
    resident: int


class _Times(NamedTuple):
    """Picoseconds of each part of a layer. ``fetch``, ``attend`` and ``write_back``: of a full micro-batch and of the
    last, which is smaller; there are ``full`` full ones. ``head``: once in a step.
    """

    full: int
    fetch: tuple[int, int]
    attend: tuple[int, int]
    write_back: tuple[int, int]
    dense_copy: int
    expert_copy: int
    project: int
    project_cpu: int
    send_cpu: int
    attend_cpu: int
    mix: int
    expert: int
    head: int


class ModuleCosts:
    """Times and bytes of every ``Choice`` for a step of sequences with ``context`` tokens.

    prefill: the step computes all ``context`` tokens of each sequence; else its last one (decode). staging_buffers: of
    the KV of one micro-batch and layer each. ``SpecError`` for a spec that is not the model's: one group of full
    attention, with the same bytes in every layer.
    """

    def __init__(
        self, spec: CacheSpec, model: ModelShape, profile: HardwareProfile, *, context: int, prefill: bool = False,
        staging_buffers: int = 3,
    ) -> None:  # fmt: skip
        self.spec, self.model, self.profile, self.prefill = spec, model, profile, prefill
        self.context = check_size("context", context)
        self.staging_buffers = check_size("staging_buffers", staging_buffers)
        self._blocks, self.kv_bytes = _blocks_and_bytes(spec, model, context)  # of a sequence and layer
        self.new = context if prefill else 1
        self._matmul = lru_cache(maxsize=4096)(self._matmul_seconds)
        self.times = lru_cache(maxsize=4096)(self._times)
        profile.flops_per_second(model.dtype_name, 1)  # refuses a dtype without rates

    # --- bytes ---

    @cached_property
    def weight_bytes(self) -> int:
        """Of all layers, in host memory."""
        return self.model.num_layers * (self.model.dense_bytes + self.model.num_experts * self.model.expert_bytes)

    @property
    def most_resident(self) -> int:
        return 1 + self.model.num_layers * self.model.num_experts

    def host_bytes(self, choice: Choice) -> int:
        """Weights, KV in blocks, and what goes to and from the CPU's attention."""
        row = self.model.element_bytes * (self.model.qkv_width + self.model.query_width)
        return self.weight_bytes + choice.batch * self.model.num_layers * self.kv_bytes + choice.cpu_rows * row

    def resident_bytes(self, choice: Choice) -> int:
        dense = self.model.num_layers * self.model.dense_bytes if choice.resident else 0
        return dense + max(choice.resident - 1, 0) * self.model.expert_bytes

    def staging_blocks(self, choice: Choice) -> int:
        """Of one buffer; 0 in a prefill, and where the CPU attends all."""
        return 0 if self.prefill else min(choice.micro_batch, choice.batch - choice.cpu_rows) * self._blocks

    def staging_bytes(self, choice: Choice) -> int:
        return self.staging_buffers * self.staging_blocks(choice) * self.kv_bytes // self._blocks

    def device_bytes(self, choice: Choice) -> int:
        """Embedding and output matrix, resident weights, buffers and activations."""
        model, size = self.model, self.model.element_bytes
        dense = 0 if choice.resident else min(2, model.num_layers) * model.dense_bytes
        weights = choice.expert_buffers * model.expert_bytes + dense
        attended = (choice.micro_batch if self.prefill else choice.batch) * self.new
        attention = attended * (model.qkv_width + model.query_width) * size
        stream = choice.batch * self.new * (3 * model.hidden * size + 8 * model.experts_per_token)  # with routing
        expert = choice.expert_batch * 2 * (model.hidden + model.expert_hidden) * size
        logits = min(choice.expert_batch, choice.batch) * model.vocab * 4
        kept = model.vocabulary_bytes + self.resident_bytes(choice) + self.staging_bytes(choice)
        return kept + weights + attention + stream + max(expert, logits)

    # --- times ---

    def _times(self, choice: Choice) -> _Times:
        profile, model, cpu_rows = self.profile, self.model, choice.cpu_rows
        rows = choice.batch - cpu_rows
        full, last = divmod(rows, choice.micro_batch)
        sizes = (choice.micro_batch, last)
        token, heads = self.new * model.element_bytes, -(-choice.batch // choice.expert_batch)
        back = [n * token * (model.qkv_width - model.query_width) for n in (sizes if self.prefill else (rows, 0))]
        return _Times(
            full,
            _pair(0 if self.prefill else _time(profile.to_device, n * self.kv_bytes) for n in sizes),
            _pair(self._attend(n) for n in sizes),
            _pair(_time(profile.to_host, size) for size in back),
            _ps(_time(profile.to_device, model.dense_bytes)),
            _ps(_time(profile.to_device, model.expert_bytes)),
            _ps(0 if self.prefill else self._project(rows)),
            _ps(self._project(cpu_rows)),
            _ps(_time(profile.to_host, cpu_rows * token * model.qkv_width)),
            _ps(_time(profile.cpu_attention, cpu_rows * self.kv_bytes, cpu_rows)),
            _ps(self._mix(choice.batch * self.new, cpu_rows)),
            _ps(self._expert(*self.expert_tokens(choice.batch), choice.expert_batch)),
            _ps(heads * self._matmul(-(-choice.batch // heads), model.vocab)),
        )

    def _project(self, tokens: int) -> float:
        return self._matmul(tokens, self.model.qkv_width) + self._passes(2 * tokens * self.model.hidden, 2)

    def _attend(self, sequences: int) -> float:
        device = self.profile.device_attention
        if not self.prefill or not sequences:
            return _time(device, sequences * self.kv_bytes, sequences)
        flops = 2.0 * sequences * self.context**2 * self.model.query_width  # causal: half of the square
        computed = flops / self.profile.flops_per_second(self.model.dtype_name, self.context)
        return self._project(sequences * self.context) + computed + sequences * float(device.latency_seconds)

    def _mix(self, tokens: int, cpu_rows: int) -> float:
        """After attention: the device reads the CPU's results where they lie; output matrix and router."""
        model = self.model
        up = _time(self.profile.to_device, cpu_rows * model.query_width * model.element_bytes)
        widths = model.query_width + model.num_experts
        return up + self._matmul(tokens, widths) + self._passes(5 * tokens * model.hidden, 5)

    def expert_tokens(self, batch: int) -> tuple[float, int]:
        """Tokens of an expert, if each token chose at random: the mean, and two standard deviations more."""
        share = self.model.experts_per_token / self.model.num_experts
        mean = batch * self.new * share
        return mean, ceil(mean + 2 * sqrt(mean * (1 - share)))

    def _expert(self, mean: float, many: int, most: int) -> float:
        """In as many parts as ``many`` tokens make, the mean is computed."""
        parts = -(-many // most)
        tokens = ceil(mean / parts)
        moved = tokens * (5 * self.model.hidden + 3 * self.model.expert_hidden)
        return parts * (3 * self._matmul(tokens, self.model.expert_hidden) + self._passes(moved, 4))

    def _matmul_seconds(self, tokens: int, width: int) -> float:
        """Of a matrix between the residual stream and ``width``."""
        if not tokens:
            return 0.0
        rate = self.profile.flops_per_second(self.model.dtype_name, tokens)
        return float(self.profile.matmul_seconds) + 2.0 * tokens * self.model.hidden * width / rate

    def _passes(self, elements: int, kernels: int) -> float:
        return _time(self.profile.device_memory, elements * self.model.element_bytes, kernels)

    # --- the graph ---

    def schedule(self, choice: Choice, run: Run[_Handle]) -> None:
        """Call ``run`` for every copy and kernel of a step, in the order in which each engine and link does them."""
        t, layers, kept = self.times(choice), self.model.num_layers, max(0, choice.resident - 1)
        staged: list[_Handle | None] = [None] * self.staging_buffers
        experts: list[_Handle | None] = [None] * max(1, choice.expert_buffers)
        dense_free: list[_Handle | None] = [None, None]
        done: _Handle | None = None
        fetched = copied = 0
        for layer in range(layers):
            dense = None if choice.resident else run("copy dense", "to_device", t.dense_copy, (dense_free[layer % 2],))
            by_cpu = begun = None
            if choice.cpu_rows:
                asked = run("project", "device", t.project_cpu, (done, dense))
                sent = run("send", "to_host", t.send_cpu, (asked,))
                by_cpu = run("attend in place", "cpu", t.attend_cpu, (sent,))
            if t.project:
                begun = run("project", "device", t.project, (done, dense))
                run("write back", "to_host", t.write_back[0], (begun,))
            for part in [0] * t.full + [1] * (t.attend[1] > 0):
                slot = fetched % len(staged)
                copy = None if self.prefill else run("fetch", "to_device", t.fetch[part], (staged[slot],))
                staged[slot] = run("attend", "device", t.attend[part], (copy, begun, done, dense))
                fetched += 1
                if self.prefill:
                    run("write back", "to_host", t.write_back[part], (staged[slot],))
            # The device works in order, so the last micro-batch needs no mention.
            mixed = dense_free[layer % 2] = run("mix", "device", t.mix, (by_cpu,))
            resident = (layer + 1) * kept // layers - layer * kept // layers
            for expert in range(self.model.num_experts):
                if expert < resident:
                    done = run("resident expert", "device", t.expert, (mixed,))
                    continue
                slot = copied % len(experts)
                weights = run("copy expert", "to_device", t.expert_copy, (experts[slot],))
                experts[slot] = done = run("expert", "device", t.expert, (weights, mixed))
                copied += 1
        run("head", "device", t.head, (done,))

    def busy(self, choice: Choice) -> dict[str, int]:
        """Picoseconds of a step that each engine and link works."""
        t, layers = self.times(choice), self.model.num_layers
        fetch, attend, back = (t.full * full + last for full, last in (t.fetch, t.attend, t.write_back))
        back = back if self.prefill else t.write_back[0] + t.send_cpu
        streamed = (self.most_resident - max(1, choice.resident)) * t.expert_copy
        layer = t.project + t.project_cpu + attend + t.mix + self.model.num_experts * t.expert
        found = {
            "device": layers * layer + t.head, "cpu": layers * t.attend_cpu, "to_host": layers * back,
            "to_device": layers * (fetch + (0 if choice.resident else t.dense_copy)) + streamed,
        }  # fmt: skip
        return found if self.profile.concurrent else {"thread": sum(found.values())}

    def least_picoseconds(self, choice: Choice) -> int:
        """A lower bound of ``picoseconds``, without the graph: the busiest engine, and the chain through the CPU."""
        t = self.times(choice)
        chain = t.project_cpu + t.send_cpu + t.attend_cpu + t.mix + self.model.num_experts * t.expert
        return max(*self.busy(choice).values(), self.model.num_layers * chain + t.head)

    def picoseconds(self, choice: Choice) -> int:
        """Of a step: the longest path through the graph. It is the end of ``clock(choice)``, found faster."""
        free: dict[str, int] = {}
        one = None if self.profile.concurrent else "thread"

        def run(name: str, resource: str, spent: int, after: tuple[int | None, ...]) -> int:
            start = free.get(one or resource, 0)
            for end in after:
                if end is not None and end > start:
                    start = end
            free[one or resource] = start + spent
            return start + spent

        self.schedule(choice, run)
        return max(free.values())

    def clock(self, choice: Choice) -> Clock:
        """A step on the virtual clock, by name, to be looked at."""
        clock = Clock()

        def run(name: str, resource: str, spent: int, after: tuple[Work | None, ...]) -> Work:
            resource = resource if self.profile.concurrent else "thread"
            needed = [work for work in after if work is not None]
            return clock.run(resource, Fraction(spent, PICOSECONDS), after=needed, name=name)

        self.schedule(choice, run)
        return clock


def _blocks_and_bytes(spec: CacheSpec, model: ModelShape, context: int) -> tuple[int, int]:
    """Of one sequence and layer, in whole blocks."""
    if not isinstance(spec, CacheSpec) or not isinstance(model, ModelShape):
        raise SpecError(f"got {type(spec).__name__} and {type(model).__name__}; give a CacheSpec and a ModelShape")
    (group, *others) = spec.groups
    rows = {sum(group.row_bytes(part.name, layer) for part in group.components) for layer in group.layers}
    plain = group.growth == "token" and group.window_tokens is None
    if others or not plain or len(rows) > 1 or len(group.layers) != model.num_layers:
        raise SpecError(
            f"spec: has {len(spec.groups)} groups and {len(group.layers)} layers with {sorted(rows)} bytes a token; "
            f"module batching takes one group of full attention, with {model.num_layers} equal layers"
        )
    blocks = -(-context // group.block_size)
    return blocks, blocks * group.block_size * rows.pop()


def _time(link: Link, bytes: int, times: int = 1) -> float:
    """``Link.seconds`` in floats; nothing takes no time."""
    return bytes / float(link.bytes_per_second) + times * float(link.latency_seconds) if bytes else 0.0


def _ps(seconds: float) -> int:
    if seconds > 1e15:
        raise SpecError(f"profile: a part of a step would take {seconds:.1e} seconds; check the rates' units")
    return ceil(seconds * PICOSECONDS)


def _pair(seconds: Iterable[float]) -> tuple[int, int]:
    first, second = (_ps(one) for one in seconds)
    return first, second
