"""What a step of module batching takes of time and memory: the copies and kernels of every layer, as a graph.

The schedule is MoE-Gen's (arXiv:2503.09716). All KV and all weights are in host memory. In each layer the sequences of
the device's share are attended in micro-batches, whose KV is copied to one of a few staging buffers; the others are
attended by the CPU where their KV lies, at the same time. Then each expert computes its tokens of the whole batch,
while the weights of the next experts are copied to a few buffers. Copies run ahead as buffers permit, also into the
next layer. With buffers for all of a layer, a step takes as long as its busiest engine, and the time to fill and drain.
For the CPU that counts what waits for it: the layer's experts, and the next layer's queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cached_property, lru_cache
from math import ceil
from typing import Any, NamedTuple, TypeVar

from kvmem.arguments import check_size
from kvmem.errors import SpecError
from kvmem.plan.clock import Clock, Work
from kvmem.plan.hardware import HardwareProfile
from kvmem.plan.moe_shape import ModelShape
from kvmem.spec import CacheSpec

__all__ = ["PICOSECONDS", "Choice", "ModuleCosts"]

PICOSECONDS = 10**12  # times are integers of these: the graph's longest path and its lower bound are then exact
_Handle = TypeVar("_Handle")
#: ``run(resource, picoseconds, after)``: what the work returns is what later work names in ``after``; None is nothing.
Run = Callable[[str, int, tuple[_Handle | None, ...]], _Handle]


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
    """Of one layer, in picoseconds; ``fetch`` and ``attend`` by micro-batch: a full one, and the last."""

    full: int  # micro-batches that are full
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
    head: int  # of the step


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
        self.kv_bytes = _kv_bytes(spec, model, self.context)
        self.new = self.context if prefill else 1
        self._matmul = lru_cache(maxsize=4096)(self._matmul_seconds)
        self.times = lru_cache(maxsize=4096)(self._times)
        profile.flops_per_second(model.dtype_name, 1)  # refuses a dtype without rates

    # --- bytes ---

    @cached_property
    def weight_bytes(self) -> int:
        """Of all layers, in host memory."""
        return self.model.num_layers * self.model.layer_bytes

    def host_bytes(self, choice: Choice) -> int:
        """Weights, KV in blocks, and what goes to and from the CPU's attention."""
        row = self.model.element_bytes * (self.model.qkv_width + self.model.query_width)
        kv = choice.batch * self.model.num_layers * self.kv_bytes
        return self.weight_bytes + kv + choice.cpu_rows * row

    def device_bytes(self, choice: Choice) -> int:
        """Embedding and output matrix, resident weights, buffers and activations."""
        return self.model.vocabulary_bytes + self.resident_bytes(choice.resident) + self._buffer_bytes(choice)

    def staging_bytes(self, choice: Choice) -> int:
        """Of all staging buffers; a prefill needs none, nor does a step that the CPU attends alone."""
        rows = 0 if self.prefill else min(choice.micro_batch, choice.batch - choice.cpu_rows)
        return self.staging_buffers * rows * self.kv_bytes

    def staging_blocks(self, choice: Choice) -> int:
        """Of one buffer."""
        block = self.spec.groups[0].block_size
        return min(choice.micro_batch, choice.batch - choice.cpu_rows) * -(-self.context // block)

    def resident_bytes(self, resident: int) -> int:
        model = self.model
        return min(resident, 1) * model.num_layers * model.dense_bytes + max(resident - 1, 0) * model.expert_bytes

    @property
    def most_resident(self) -> int:
        return 1 + self.model.num_layers * self.model.num_experts

    def _buffer_bytes(self, choice: Choice) -> int:
        model, size = self.model, self.model.element_bytes
        weights = choice.expert_buffers * model.expert_bytes + (0 if choice.resident else 2 * model.dense_bytes)
        attended = (choice.micro_batch if self.prefill else choice.batch) * self.new
        attention = attended * (model.qkv_width + model.query_width) * size
        stream = choice.batch * self.new * (3 * model.hidden * size + 8 * model.experts_per_token)  # with routing
        expert = choice.expert_batch * (2 * model.hidden + 2 * model.expert_hidden) * size
        logits = min(choice.expert_batch, choice.batch) * model.vocab * 4
        return weights + self.staging_bytes(choice) + attention + stream + max(expert, logits)

    # --- times ---

    def _times(self, choice: Choice) -> _Times:
        profile, model = self.profile, self.model
        rows = choice.batch - choice.cpu_rows
        full, last = divmod(rows, choice.micro_batch)
        sizes = (choice.micro_batch, last)
        new_kv = self.new * model.element_bytes * (model.qkv_width - model.query_width)
        down = choice.cpu_rows * model.qkv_width * model.element_bytes
        project = (0, 0) if self.prefill else (self._project(rows), self._project(choice.cpu_rows))
        back = sizes if self.prefill else (rows, 0)
        return _Times(
            full,
            _pair(0 if self.prefill else _link(profile.to_device, n * self.kv_bytes, 1) for n in sizes),
            _pair(self._attend(n) for n in sizes),
            _pair(_link(profile.to_host, n * new_kv, 1) for n in back),
            _ps(_link(profile.to_device, model.dense_bytes, 1)),
            _ps(_link(profile.to_device, model.expert_bytes, 1)),
            *_pair(project),
            _ps(_link(profile.to_host, down, 1)),
            _ps(_link(profile.cpu_attention, choice.cpu_rows * self.kv_bytes, choice.cpu_rows)),
            _ps(self._mix(choice)),
            _ps(self._expert(choice)),
            _ps(self._head(choice)),
        )

    def _project(self, tokens: int) -> float:
        return self._matmul(tokens, self.model.qkv_width) + self._passes(
            2 * tokens * self.model.hidden, 2 * (tokens > 0)
        )

    def _attend(self, sequences: int) -> float:
        if not self.prefill:
            return _link(self.profile.device_attention, sequences * self.kv_bytes, sequences)
        if not sequences:
            return 0.0
        flops = 2.0 * sequences * self.context**2 * self.model.query_width  # causal: half of the square
        computed = flops / self.profile.flops_per_second(self.model.dtype_name, self.context)
        return (
            self._project(sequences * self.context)
            + computed
            + sequences * float(self.profile.device_attention.latency_seconds)
        )

    def _mix(self, choice: Choice) -> float:
        """After attention: the CPU's results are read by the device where they lie; output matrix and router."""
        tokens, model = choice.batch * self.new, self.model
        up = _link(self.profile.to_device, choice.cpu_rows * model.query_width * model.element_bytes, 1)
        width = model.query_width + model.num_experts
        return up + self._matmul(tokens, width) + self._passes(5 * tokens * model.hidden, 5)

    def _expert(self, choice: Choice) -> float:
        """One expert, if the tokens are spread evenly."""
        model = self.model
        tokens = -(-choice.batch * self.new * model.experts_per_token // model.num_experts)
        full, last = divmod(tokens, choice.expert_batch)
        return full * self._expert_chunk(choice.expert_batch) + self._expert_chunk(last)

    def _expert_chunk(self, tokens: int) -> float:
        moved = tokens * (5 * self.model.hidden + 3 * self.model.expert_hidden)
        return 3 * self._matmul(tokens, self.model.expert_hidden) + self._passes(moved, 4 * (tokens > 0))

    def _head(self, choice: Choice) -> float:
        full, last = divmod(choice.batch, choice.expert_batch)
        return full * self._matmul(choice.expert_batch, self.model.vocab) + self._matmul(last, self.model.vocab)

    def _matmul_seconds(self, tokens: int, width: int) -> float:
        """Of a matrix between the residual stream and ``width``."""
        if not tokens:
            return 0.0
        rate = self.profile.flops_per_second(self.model.dtype_name, tokens)
        return float(self.profile.matmul_seconds) + 2.0 * tokens * self.model.hidden * width / rate

    def _passes(self, elements: int, kernels: int) -> float:
        return _link(self.profile.device_memory, elements * self.model.element_bytes, kernels)

    # --- the graph ---

    def schedule(self, choice: Choice, run: Run[_Handle]) -> None:
        """Call ``run`` for every copy and kernel of a step, in the order in which each engine and link does them."""
        t, layers = self.times(choice), self.model.num_layers
        ring: list[_Handle | None] = [None] * self.staging_buffers
        experts: list[_Handle | None] = [None] * max(1, choice.expert_buffers)
        dense_free: list[_Handle | None] = [None, None]
        done: _Handle | None = None
        fetched = copied = 0
        for layer in range(layers):
            dense = None if choice.resident else run("to_device", t.dense_copy, (dense_free[layer % 2],))
            by_cpu = begun = None
            if choice.cpu_rows:
                asked = run("device", t.project_cpu, (done, dense))
                by_cpu = run("cpu", t.attend_cpu, (run("to_host", t.send_cpu, (asked,)),))
            if t.project:
                begun = run("device", t.project, (done, dense))
                run("to_host", t.write_back[0], (begun,))
            for part in self._parts(t):
                slot = fetched % len(ring)
                copy = None if self.prefill else run("to_device", t.fetch[part], (ring[slot],))
                ring[slot] = run("device", t.attend[part], (copy, begun, done, dense))
                fetched += 1
                if self.prefill:
                    run("to_host", t.write_back[part], (ring[slot],))
            # The device works in order, so the last micro-batch needs no mention.
            mixed = dense_free[layer % 2] = run("device", t.mix, (by_cpu,))
            for expert in range(self.model.num_experts):
                weights, slot = None, copied % len(experts)
                if expert >= self.resident_experts(choice, layer):
                    weights = run("to_device", t.expert_copy, (experts[slot],))
                    copied += 1
                done = run("device", t.expert, (weights, mixed))
                if weights is not None:
                    experts[slot] = done
        run("device", t.head, (done,))

    def resident_experts(self, choice: Choice, layer: int) -> int:
        """How many experts of a layer stay on the device."""
        kept, layers = max(0, choice.resident - 1), self.model.num_layers
        return (layer + 1) * kept // layers - layer * kept // layers

    def busy(self, choice: Choice) -> dict[str, int]:
        """Picoseconds of a step that each engine and link works: the largest is a lower bound of the step."""
        t, layers = self.times(choice), self.model.num_layers
        streamed = self.most_resident - max(1, choice.resident)
        fetch, attend, back = (
            t.full * pair[0] + pair[1] for pair in (t.fetch, t.attend, t.write_back if self.prefill else (0, 0))
        )
        layer = t.project + t.project_cpu + attend + t.mix + self.model.num_experts * t.expert
        found = {
            "device": layers * layer + t.head,
            "to_device": layers * (fetch + (0 if choice.resident else t.dense_copy)) + streamed * t.expert_copy,
            "to_host": layers * (back if self.prefill else t.write_back[0] + t.send_cpu),
            "cpu": layers * t.attend_cpu,
        }
        return found if self.profile.concurrent else {"thread": sum(found.values())}

    def least_picoseconds(self, choice: Choice) -> int:
        """A lower bound of ``picoseconds``, without the graph: the busiest engine, and the chain through the CPU."""
        t = self.times(choice)
        chain = t.project_cpu + t.send_cpu + t.attend_cpu + t.mix + self.model.num_experts * t.expert
        return max(*self.busy(choice).values(), self.model.num_layers * chain + t.head)

    def picoseconds(self, choice: Choice) -> int:
        """Of a step: the end of the longest path through the graph, which ``clock()`` shows exactly."""
        free: dict[str, int] = {}
        one = None if self.profile.concurrent else "thread"

        def run(resource: str, spent: int, after: tuple[int | None, ...]) -> int:
            resource = one or resource
            start = free.get(resource, 0)
            for end in after:
                if end is not None and end > start:
                    start = end
            free[resource] = start + spent
            return start + spent

        self.schedule(choice, run)
        return max(free.values())

    def clock(self, choice: Choice) -> Clock:
        """A step on the virtual clock, to be looked at."""
        clock = Clock()

        def run(resource: str, spent: int, after: tuple[Work | None, ...]) -> Work:
            resource = resource if self.profile.concurrent else "thread"
            return clock.run(resource, Fraction(spent, PICOSECONDS), after=[work for work in after if work is not None])

        self.schedule(choice, run)
        return clock

    @staticmethod
    def _parts(t: _Times) -> Iterator[int]:
        yield from [0] * t.full
        if t.attend[1]:
            yield 1


def _kv_bytes(spec: Any, model: Any, context: int) -> int:
    """Of one sequence and layer, in whole blocks."""
    if not isinstance(spec, CacheSpec) or not isinstance(model, ModelShape):
        raise SpecError(
            f"spec, model: got {type(spec).__name__}, {type(model).__name__}; give a CacheSpec, a ModelShape"
        )
    (group, *others) = spec.groups
    rows = {sum(group.row_bytes(part.name, layer) for part in group.components) for layer in group.layers}
    plain = group.growth == "token" and group.window_tokens is None
    if others or not plain or len(rows) > 1 or len(group.layers) != model.num_layers:
        raise SpecError(
            f"spec: has {len(spec.groups)} groups and {len(group.layers)} layers with {sorted(rows)} bytes a token; "
            f"module batching takes one group of full attention, with {model.num_layers} equal layers"
        )
    blocks = -(-context // group.block_size)
    return int(blocks * group.block_size * rows.pop())


def _link(link: Any, amount: int, times: int) -> float:
    """Seconds; as ``Link.seconds``, in floats."""
    return amount / float(link.bytes_per_second) + times * float(link.latency_seconds) if amount else 0.0


def _ps(seconds: float) -> int:
    if seconds > 1e15:
        raise SpecError(f"profile: a step would take {seconds:.1e} seconds in one part; check the rates' units")
    return ceil(seconds * PICOSECONDS)


def _pair(seconds: Any) -> tuple[int, int]:
    first, second = (_ps(one) for one in seconds)
    return first, second
