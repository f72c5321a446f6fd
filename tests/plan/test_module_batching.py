"""Plans of module batching: they fit, they are the best of their grid, and they agree with the closed forms."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
import torch

from kvmem import CacheSpec, SpecError
from kvmem.plan.clock import Link, Work
from kvmem.plan.hardware import HardwareProfile, MatmulRate, ModelShape
from kvmem.plan.module_batching import Grid, ModulePlan, modules
from kvmem.plan.module_costs import PICOSECONDS, Choice, ModuleCosts

MIXTRAL = ModelShape(
    num_layers=32, hidden=4096, num_query_heads=32, num_kv_heads=8, head_dim=128, num_experts=8, experts_per_token=2,
    expert_hidden=14336, vocab=32000,
)  # fmt: skip
NO_TIME = 1e30  # a rate at which nothing takes time


def spec_of(model: ModelShape, block_size: int = 16) -> CacheSpec:
    return CacheSpec.kv(
        num_layers=model.num_layers, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim, dtype=model.dtype,
        block_size=block_size,
    )  # fmt: skip


def machine(**changes: Any) -> HardwareProfile:
    """24 GB of device memory, 256 GB of host memory of which 95 % are free, and 25 GB/s between them."""
    values = {
        "name": "test", "device_bytes": 24 * 10**9, "host_bytes": 95 * 256 * 10**7, "to_device": Link("to_device", 25e9),
        "to_host": Link("to_host", 25e9), "device_memory": Link("device_memory", 600e9, 5e-6),
        "device_attention": Link("device_attention", 500e9, 1e-6), "cpu_attention": Link("cpu_attention", 30e9, 1e-6),
        "matmul": (MatmulRate("bfloat16", 1, 1e12), MatmulRate("bfloat16", 128, 6e13)), "matmul_seconds": 5e-6,
    }  # fmt: skip
    return HardwareProfile(**(values | changes))


def costless(**changes: Any) -> HardwareProfile:
    """Only the links and the CPU take time."""
    free = {name: Link(name, NO_TIME) for name in ("device_memory", "device_attention", "to_host")}
    return machine(**({"matmul": (MatmulRate("bfloat16", 1, NO_TIME),), "matmul_seconds": 0} | free | changes))


def drawn(draw: random.Random) -> tuple[ModelShape, HardwareProfile, int]:
    """A small model, a machine that may or may not have room for it, and a context."""
    heads, experts = 2 ** draw.randrange(3), draw.randrange(1, 9)
    model = ModelShape(
        num_layers=draw.randrange(1, 4), hidden=64 * draw.randrange(1, 9), num_query_heads=heads * draw.randrange(1, 5),
        num_kv_heads=heads, head_dim=16, num_experts=experts, experts_per_token=draw.randrange(1, experts + 1),
        expert_hidden=64 * draw.randrange(1, 9), vocab=1000, dtype=torch.bfloat16, tied=draw.random() < 0.5,
    )  # fmt: skip

    def rate(least: float = 6) -> float:
        return float(10 ** draw.uniform(least, least + 4))

    links = {
        name: Link(name, rate(), draw.choice([0, 1e-6]))
        for name in ("to_device", "to_host", "device_memory", "device_attention", "cpu_attention")
    }
    profile = machine(
        device_bytes=int(10 ** draw.uniform(5, 7.5)), host_bytes=int(10 ** draw.uniform(5.5, 8)), matmul_seconds=0,
        matmul=(MatmulRate("bfloat16", 1, rate(8)), MatmulRate("bfloat16", 64, rate(9))),
        concurrent=draw.random() < 0.8, **links,
    )  # fmt: skip
    return model, profile, draw.randrange(1, 200)


SMALL = Grid(
    B=(1, 3, 16, 50), ba=(1, 4, 16), be=(2, 16), omega=(0.0, 0.3, 0.6, 1.0), expert_buffers=(1, 2), resident=(0, 1, 3)
)


def every(grid: Grid, costs: ModuleCosts, queries: int | None) -> list[Choice]:
    """All of the grid that fits, by the definition."""
    found = []
    for values in product(*(getattr(grid, field.name) for field in fields(grid))):
        batch, ba, be, omega, buffers, resident = values
        choice = Choice(batch, ba, be, int(omega * batch + 0.5), buffers, resident)
        fits = costs.host_bytes(choice) <= costs.profile.host_bytes
        fits &= costs.device_bytes(choice) <= costs.profile.device_bytes
        fits &= resident <= costs.most_resident and batch <= (queries or batch)
        found += [choice] if fits else []
    return found


def test_the_plan_is_the_best_of_its_grid(seed: int) -> None:
    draw, planned = random.Random(seed), 0
    for _ in range(80):
        model, profile, context = drawn(draw)
        prefill, queries = draw.random() < 0.3, draw.choice([None, 2, 20])
        if draw.random() < 0.5:  # whose times are often equal, so that the order of ties decides
            free = {name: Link(name, NO_TIME) for name in ("device_memory", "device_attention", "to_host")}
            profile = replace(profile, matmul=(MatmulRate("bfloat16", 1, NO_TIME),), **free)
        grid = replace(SMALL, omega=(0.0,)) if prefill else SMALL
        costs = ModuleCosts(spec_of(model), model, profile, context=context, prefill=prefill)
        choices = every(grid, costs, queries)
        try:
            plan = modules(spec_of(model), model, profile, context=context, queries=queries, prefill=prefill, grid=grid)
        except SpecError:
            assert not choices
            continue
        planned += 1
        best = min(
            (Fraction(costs.picoseconds(one), one.batch), costs.device_bytes(one), costs.host_bytes(one), one)
            for one in choices
        )
        assert plan.choice == best[-1]
        assert plan.step_seconds == costs.picoseconds(plan.choice) / PICOSECONDS
    assert planned > 5


def test_times_are_those_of_the_virtual_clock(seed: int) -> None:
    """The search evaluates its graph by itself; and its lower bounds are sums that the clock has too."""
    draw = random.Random(seed)
    for _ in range(60):
        model, profile, context = drawn(draw)
        prefill = draw.random() < 0.3
        costs = ModuleCosts(
            spec_of(model), model, profile, context=context, prefill=prefill, staging_buffers=draw.randrange(1, 4)
        )
        batch = draw.randrange(1, 40)
        choice = Choice(
            batch, draw.randrange(1, 50), draw.randrange(1, 30), 0 if prefill else draw.randrange(batch + 1),
            draw.randrange(1, 5), draw.randrange(costs.most_resident + 1),
        )  # fmt: skip
        clock = costs.clock(choice)
        assert clock.now * PICOSECONDS == costs.picoseconds(choice) >= costs.least_picoseconds(choice)
        assert {name: clock.busy(name) * PICOSECONDS for name in costs.busy(choice)} == costs.busy(choice)
        assert sum(costs.busy(choice).values()) == sum(work.seconds for work in clock.work) * PICOSECONDS


@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_what_waits_for_what(buffers: int, seed: int) -> None:
    """Each kernel for its copy, each copy for the kernel that used its buffer last, the experts for all attention."""
    draw = random.Random(seed)
    for _ in range(20):
        model, profile, context = drawn(draw)
        costs = ModuleCosts(spec_of(model), model, profile, context=context, staging_buffers=buffers)
        batch = draw.randrange(2, 40)
        choice = Choice(batch, draw.randrange(1, 9), 16, draw.randrange(1, batch), buffers, 0)
        by_name: dict[str, list[Work]] = {}
        for work in costs.clock(choice).work:
            by_name.setdefault(work.name, []).append(work)
        for copies, kernels in (("fetch", "attend"), ("copy expert", "expert")):
            for copy, kernel in zip(by_name[copies], by_name[kernels], strict=True):
                assert kernel.start >= copy.end
            for used, copy in zip(by_name[kernels], by_name[copies][buffers:], strict=False):
                assert copy.start >= used.end
        each = {name: len(found) // model.num_layers for name, found in by_name.items()}
        for layer, mixed in enumerate(by_name["mix"]):
            own = {name: by_name[name][layer * n : (layer + 1) * n] for name, n in each.items() if n}
            sent, queries = own["send"][0], own["project"][0]
            assert own["attend in place"][0].start >= sent.end and sent.start >= queries.end
            assert queries.start >= max(
                own["copy dense"][0].end, by_name["expert"][layer * each["expert"] - 1].end * bool(layer)
            )
            assert mixed.start >= max(work.end for name in ("attend", "attend in place") for work in own[name])
            assert min(work.start for work in own["expert"]) >= mixed.end
        assert [len(by_name[name]) for name in ("attend", "expert")] == [
            model.num_layers * -(-(batch - choice.cpu_rows) // choice.micro_batch), model.num_layers * model.num_experts,
        ]  # fmt: skip


def test_plans_fit_and_what_does_not_fit_names_the_memory(seed: int) -> None:
    draw, outcomes = random.Random(seed), set[str]()
    for _ in range(200):
        model, profile, context = drawn(draw)
        spec = spec_of(model, block_size=draw.choice([1, 16]))
        queries = draw.choice([None, 1, 30])
        try:
            plan = modules(
                spec, model, profile, context=context, queries=queries, prefill=draw.random() < 0.2,
                grid=Grid(omega=(0.0, 0.5, 1.0)) if draw.random() < 0.5 else replace(SMALL, omega=(0.0,)),
            )  # fmt: skip
        except SpecError as error:
            outcomes.add(str(error).partition(":")[0])
            continue
        outcomes.add("plan")
        assert 0 < plan.device_bytes <= profile.device_bytes
        assert 0 < plan.host_bytes <= profile.host_bytes
        assert queries is None or plan.choice.batch <= queries
        assert plan.s_expert + plan.s_params + plan.staging_bytes <= plan.device_bytes
        weights = model.num_layers * (model.dense_bytes + model.num_experts * model.expert_bytes)
        assert weights + plan.B * context * spec.bytes_per_token <= plan.host_bytes
        rows = [row for part in plan.micro_batches() for row in part]
        assert rows == list(range(plan.cpu_rows, plan.B)) and all(len(p) <= plan.ba for p in plan.micro_batches())
    assert outcomes == {"plan", "host memory", "device memory"}


@pytest.mark.parametrize("seed_of_case", range(8))
def test_the_share_of_the_cpu_is_that_of_the_closed_form(seed_of_case: int) -> None:
    """Link and CPU in balance: ``C (K + W) / (K (C + P))`` for K bytes of KV and W of weights in each layer."""
    draw = random.Random(seed_of_case)
    rates = 25e9, 25e9 * draw.uniform(0.2, 4)
    profile = costless(cpu_attention=Link("cpu_attention", rates[1]))
    context, batch = draw.choice([64, 256, 768]), draw.choice([200, 600, 1000])
    grid = Grid(B=(batch,), ba=(8,), be=(4096,), expert_buffers=(8,), resident=(0,))
    plan = modules(spec_of(MIXTRAL), MIXTRAL, profile, context=context, grid=grid)
    kv, weights = (
        batch * context * spec_of(MIXTRAL).bytes_per_token / 32,
        MIXTRAL.dense_bytes + 8 * MIXTRAL.expert_bytes,
    )
    balance = min(1.0, rates[1] * (kv + weights) / (kv * sum(rates)))
    assert abs(plan.omega - balance) <= 0.05


def test_the_break_even_that_the_paper_reports() -> None:
    """KV far larger than weights, and a CPU that reads half again as fast as the link: 60 %."""
    profile = costless(host_bytes=10**16, cpu_attention=Link("cpu_attention", 37.5e9))
    grid = Grid(B=(20_000,), ba=(32,), be=(4096,), expert_buffers=(8,), resident=(0,))
    assert abs(modules(spec_of(MIXTRAL), MIXTRAL, profile, context=4096, grid=grid).omega - 0.6) <= 0.05


def working(seconds: dict[str, float], choice: Choice) -> HardwareProfile:
    """A machine whose engines work for so long in a step of this choice."""
    names = ("to_device", "device_memory", "device_attention", "cpu_attention")
    base = costless(matmul=(MatmulRate("bfloat16", 1, 1e12),), **{name: Link(name, 1e9) for name in names})
    busy = ModuleCosts(spec_of(MIXTRAL), MIXTRAL, base, context=768).busy(choice)
    faster = {name: busy[name] / PICOSECONDS / spent for name, spent in seconds.items()}
    rates = {name: Link(name, 1e9 * faster[name.replace("_attention", "").replace("_memory", "")]) for name in names}
    return costless(matmul=(MatmulRate("bfloat16", 1, 1e12 * faster["device"]),), **rates)


@pytest.mark.parametrize("slow", ["to_device", "device", "cpu"])
def test_a_step_takes_its_busiest_engine_and_the_fill(slow: str, seed: int) -> None:
    """Not the sum of the engines: with buffers for a layer, copies, device and CPU work at the same time. The CPU's work
    is part of a chain: its queries, and the experts that wait for it, are computed before and after."""
    draw, shares = random.Random(seed), []
    for _ in range(12):
        choice = Choice(draw.randrange(500, 1500), draw.choice([1, 4, 8]), 4096, draw.randrange(1, 400), 16, 0)
        spent = {name: 10.0 if name == slow else draw.uniform(0.5, 9.9) for name in ("to_device", "device", "cpu")}
        buffers = 1 + choice.batch // choice.micro_batch
        costs = ModuleCosts(spec_of(MIXTRAL), MIXTRAL, working(spent, choice), context=768, staging_buffers=buffers)
        busy, t = costs.busy(choice), costs.times(choice)
        chain = t.project_cpu + t.send_cpu + t.attend_cpu + t.mix + 8 * t.expert
        engines = max(*busy.values(), 32 * chain + t.head)
        fill = t.dense_copy + t.project + t.fetch[0] + t.attend[0] + t.expert
        assert max(busy, key=lambda name: busy[name]) == slow
        assert costs.picoseconds(choice) == pytest.approx(engines + fill, rel=0.01)
        shares.append(costs.picoseconds(choice) / sum(busy.values()))
    assert min(shares) < 0.7


def test_mixtral_on_a_small_gpu() -> None:
    costs = ModuleCosts(spec_of(MIXTRAL), MIXTRAL, machine(), context=768)
    assert costs.weight_bytes == pytest.approx(92.9e9, rel=1e-3)
    assert costs.kv_bytes * 32 == pytest.approx(100.7e6, rel=1e-3)
    grid = Grid(be=(16, 256), expert_buffers=(2, 8), omega=(0.0, 0.5, 0.6, 0.7, 1.0))
    plans = [
        modules(spec_of(MIXTRAL), MIXTRAL, machine(), context=768, queries=queries, grid=grid)
        for queries in (1, 32, 512, None)
    ]
    assert [plan.B for plan in plans] == [1, 32, 512, 1493]
    speeds = [plan.tokens_per_second for plan in plans]
    assert speeds == sorted(speeds) and speeds[-1] > 100 * speeds[0]
    prefill = modules(spec_of(MIXTRAL), MIXTRAL, machine(), context=512, prefill=True, grid=replace(grid, omega=None))
    assert prefill.omega == 0 and prefill.tokens_per_second > 5 * speeds[-1]


def test_no_link_traffic_is_left_where_all_weights_fit() -> None:
    model = replace(MIXTRAL, num_layers=2)
    profile = machine(device_bytes=40 * 10**9, to_device=Link("to_device", 1e9))
    plan = modules(spec_of(model), model, profile, context=64, queries=64, grid=Grid(omega=(1.0,)))
    assert (plan.expert_buffers, plan.s_params) == (0, 2 * (model.dense_bytes + 8 * model.expert_bytes))
    assert ModuleCosts(spec_of(model), model, profile, context=64).busy(plan.choice)["to_device"] == 0


def plan_of(**changes: Any) -> ModulePlan:
    values: dict[str, Any] = {"spec": spec_of(MIXTRAL), "model": MIXTRAL, "profile": machine(), "context": 768}
    grid = Grid(ba=(8,), be=(512,), omega=(0.5,), expert_buffers=(2,))
    return modules(**({"grid": grid, "queries": 20} | values | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context": 0}, "context"),
        ({"queries": 0}, "queries"),
        ({"staging_buffers": 0}, "staging_buffers"),
        ({"profile": None}, "HardwareProfile"),
        ({"model": None}, "give a CacheSpec and a ModelShape"),
        ({"spec": spec_of(replace(MIXTRAL, num_layers=2))}, "32 equal layers"),
        ({"model": replace(MIXTRAL, dtype="float32")}, "matmul rates of bfloat16"),
        ({"profile": machine(host_bytes=92 * 10**9)}, "host memory: 92,000,000,000"),
        ({"profile": machine(device_bytes=10**9)}, "device memory: 1,000,000,000"),
        ({"queries": 5, "grid": Grid(B=(6,))}, "queries: got 5; the smallest batch of the grid is 6"),
    ],
)
def test_what_fits_no_plan_says_why(changes: dict[str, Any], words: str) -> None:
    assert plan_of().B == 20
    with pytest.raises(SpecError, match=words):
        plan_of(**changes)


@pytest.mark.parametrize(
    "values", [{"omega": (1.5,)}, {"omega": (-0.1,)}, {"omega": (float("nan"),)}, {"B": (0,)}, {"ba": ()}, {"be": [4]}]
)
def test_a_grid_is_checked(values: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"Grid\."):
        Grid(**values)


def test_models_are_checked() -> None:
    with pytest.raises(SpecError, match="there are 8 experts"):
        replace(MIXTRAL, experts_per_token=9)
    with pytest.raises(SpecError, match="KV heads"):
        replace(MIXTRAL, num_kv_heads=5)
    with pytest.raises(SpecError, match="vocab"):
        replace(MIXTRAL, vocab=0)
