"""The pictures of a run as PNG: bytes over time, waste against page size, distribution of the allocator's time in a step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvmem.bench.errors import BenchError
from kvmem.bench.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["write_plots"]

_GIB = 1 << 30


def write_plots(results: Results, folder: Path) -> list[Path]:
    """Writes a picture for each part that was run. Raises `BenchError` when matplotlib or the folder is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchError(f"--plot needs matplotlib ({error}); install kvmem[bench]") from error
    pictures = {"bytes_over_time": (_bytes_over_time, results.replay), "waste_by_page_size": (_waste, results.waste_sweep),
                "latency": (_latency, results.replay)}  # fmt: skip
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (draw, part) in pictures.items():
            if not part:
                continue
            figure = Figure(figsize=(9, 5), layout="constrained")
            FigureCanvasAgg(figure)
            draw(figure.add_subplot(), results)
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=120)
    except OSError as error:
        raise BenchError(f"{folder}: cannot write plots: {error.strerror}") from error
    return written


def _bytes_over_time(axes: Axes, results: Results) -> None:
    for index, run in enumerate(results.replay):
        minutes = [sample.step * run.step_seconds / 60 for sample in run.samples]
        axes.plot(minutes, [sample.usage.mapped_bytes / _GIB for sample in run.samples], color=f"C{index}", label=f"{run.pool}: mapped")
        axes.plot(minutes, [sample.usage.used_bytes / _GIB for sample in run.samples], color=f"C{index}", linestyle=":",
                  label=f"{run.pool}: used")  # fmt: skip
    axes.axhline(results.setup.kv_bytes / _GIB, color="grey", linewidth=0.8, label="memory for KV")
    axes.set(title=f"{results.setup.model}, {results.setup.trace}: bytes over time", xlabel="simulated minutes", ylabel="GiB", ylim=(0, None))
    axes.legend()


def _waste(axes: Axes, results: Results) -> None:
    for layout in dict.fromkeys(row.layout for row in results.waste_sweep):
        rows = [row for row in results.waste_sweep if row.layout == layout]
        axes.plot([row.page_bytes / (1 << 20) for row in rows], [100 * row.share_of_mapped for row in rows], marker="o", label=layout)
    axes.set(title=f"{results.setup.model}, {results.setup.trace}: rounding at request end", xlabel="page size, MiB",
             ylabel="% of mapped bytes", xscale="log", yscale="log")  # fmt: skip
    axes.legend()


def _latency(axes: Axes, results: Results) -> None:
    for run in results.replay:
        if run.cdf_us:
            axes.plot([max(value, 1e-3) for value in run.cdf_us], range(len(run.cdf_us)), label=f"{run.pool} ({run.mean_running:.0f} sequences)")
    axes.set(title="Allocator's time in a scheduler step", xlabel="microseconds", ylabel="% of steps", xscale="log")
    axes.legend()
