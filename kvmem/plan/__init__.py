"""Planners: pure functions of a spec, a model and a measured hardware profile, and the clock that checks them."""

from kvmem.plan.clock import Clock, Link, Work
from kvmem.plan.hardware import HardwareProfile, MatmulRate, ModelShape
from kvmem.plan.measure import profile
from kvmem.plan.module_batching import Grid, ModulePlan, modules
from kvmem.plan.module_step import ModuleStep, expert_batches
from kvmem.plan.staging import StagingRing
from kvmem.plan.windows import play, prefetch

__all__ = [
    "Clock", "Grid", "HardwareProfile", "Link", "MatmulRate", "ModelShape", "ModulePlan", "ModuleStep", "StagingRing",
    "Work", "expert_batches", "modules", "play", "prefetch", "profile",
]  # fmt: skip
