"""The pictures of a run as PNG: bytes over time, waste against page size, distribution of the allocator's time in a
step, hit rate against capacity.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kvmem.bench.errors import BenchError
from kvmem.bench.results import Results
from kvmem.bench.reuse import ReuseReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_plots", "write_reuse_plot"]

_GIB = 1 << 30


def write_plots(results: Results, folder: Path) -> list[Path]:
    """Writes a picture for each part that was run. Raises `BenchError` when matplotlib or the folder is missing."""
    pictures = {
        "bytes_over_time": (_bytes_over_time, results.replay),
        "waste_by_page_size": (_waste, results.waste_sweep),
        "latency": (_latency, results.replay),
    }
    return _write({name: partial(draw, results=results) for name, (draw, part) in pictures.items() if part}, folder)


def write_reuse_plot(report: ReuseReport, folder: Path) -> list[Path]:
    """Writes hit rate against capacity. Raises as `write_plots`."""
    return _write({"reuse": partial(_reuse, report=report)}, folder)


def _write(pictures: dict[str, Callable[[Figure], None]], folder: Path) -> list[Path]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchError(f"--plot needs matplotlib ({error}); install kvmem[bench]") from error
    written = []
    try:
        for name, draw in pictures.items():
            figure = Figure(figsize=(9, 6), layout="constrained")
            FigureCanvasAgg(figure)
            draw(figure)
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=120)
    except OSError as error:
        raise BenchError(f"{folder}: cannot write plots: {error.strerror}") from error
    return written


def _bytes_over_time(figure: Figure, results: Results) -> None:
    """One panel a pool: they take different times for the same requests."""
    panels = figure.subplots(len(results.replay), 1, sharey=True, squeeze=False)[:, 0]
    for axes, run in zip(panels, results.replay, strict=True):
        minutes = [sample.step * run.step_seconds / 60 for sample in run.samples]
        used = [sample.usage.used_bytes / _GIB for sample in run.samples]
        wasted = [(sample.usage.used_bytes + sample.usage.wasted_bytes) / _GIB for sample in run.samples]
        mapped = [sample.usage.mapped_bytes / _GIB for sample in run.samples]
        axes.fill_between(minutes, 0, used, color="C0", label="used", linewidth=0)
        axes.fill_between(minutes, used, wasted, color="C3", label="wasted", linewidth=0)
        axes.fill_between(minutes, wasted, mapped, color="0.85", label="parked", linewidth=0)
        axes.axhline(results.setup.kv_bytes / _GIB, color="black", linewidth=0.8, linestyle=":", label="memory for KV")
        axes.set(
            title=f"{run.pool}: at most {run.outcome.peak_running} sequences",
            ylabel="GiB mapped",
            ylim=(0, None),
            xlim=(0, None),
        )
    panels[0].legend(loc="lower right")
    panels[-1].set_xlabel("simulated minutes")
    figure.suptitle(f"{results.setup.model}, {results.setup.trace}")


def _waste(figure: Figure, results: Results) -> None:
    axes = figure.subplots()
    for layout in dict.fromkeys(row.layout for row in results.waste_sweep):
        rows = [
            row for row in results.waste_sweep if row.layout == layout and row.share_of_mapped > 0
        ]  # a log scale has no zero
        axes.plot(
            [row.page_bytes / (1 << 20) for row in rows],
            [100 * row.share_of_mapped for row in rows],
            marker="o",
            label=layout,
        )
    axes.set(
        title=f"{results.setup.model}, {results.setup.trace}: rounding at request end",
        xlabel="page size, MiB",
        ylabel="% of mapped bytes",
        xscale="log",
        yscale="log",
    )
    axes.legend()


def _latency(figure: Figure, results: Results) -> None:
    axes = figure.subplots()
    for run in results.replay:
        if run.pool != "static":  # its bookkeeping is this benchmark's own
            axes.plot(run.cdf_us, range(len(run.cdf_us)), label=f"{run.pool} ({run.mean_running:.0f} sequences, mean)")
    axes.set(
        title="Allocator's time in a scheduler step, driver not included",
        xlabel="microseconds",
        ylabel="% of steps",
        xscale="log",
        xlim=(0.5, None),
        ylim=(0, 100),
    )
    axes.legend()


def _reuse(figure: Figure, report: ReuseReport) -> None:
    """Unlimited capacity stands where every block has room."""
    axes = figure.subplots()
    distinct = report.workload.distinct
    curves: dict[str, dict[int, float]] = {"Belady, who knows the future": {}}
    for row in report.rows:
        capacity = distinct if isinstance(row.capacity, str) else row.capacity
        curves.setdefault(row.policy, {})[capacity] = 100 * row.hit_rate
        curves["Belady, who knows the future"][capacity] = 100 * row.belady_hit_rate
    for index, (name, points) in enumerate(curves.items()):
        color, line = ("black", ":") if index == 0 else (f"C{index}", "-")
        capacities = sorted(points)
        axes.plot(capacities, [points[x] for x in capacities], marker="o", label=name, color=color, linestyle=line)
    axes.set(
        title=f"{report.workload.trace.name}, {distinct:,} distinct blocks",
        xlabel="capacity, blocks of the trace",
        ylabel="% of the blocks read that were cached",
        xscale="log",
        ylim=(0, None),
    )
    axes.legend()
