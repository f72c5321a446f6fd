"""The pictures of a run as PNG. They are drawn from rows in the JSON form of `kvmem.bench.document`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmem.bench.text import BenchError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
_GIB = 1 << 30


def write_plots(setup: Row, parts: Mapping[str, Sequence[Row]], folder: Path | None) -> list[Path]:
    """Writes the pictures of each part that was run; None writes none. Raises `BenchError` when matplotlib or the
    folder is missing.
    """
    if folder is None:
        return []
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchError(f"--plot needs matplotlib ({error}); install kvmem[bench]") from error
    written = []
    try:
        for name, (draw, part) in _PICTURES.items():
            if rows := parts.get(part):
                figure = Figure(figsize=(9, 6), layout="constrained")
                FigureCanvasAgg(figure)
                draw(figure, setup, rows)
                written.append(folder / f"{name}.png")
                figure.savefig(written[-1], dpi=120)
    except OSError as error:
        raise BenchError(f"{folder}: cannot write plots: {error.strerror}") from error
    return written


def _bytes_over_time(figure: Figure, setup: Row, rows: Sequence[Row]) -> None:
    """One panel a pool: they take different times for the same requests."""
    panels = figure.subplots(len(rows), 1, sharey=True, squeeze=False)[:, 0]
    for axes, run in zip(panels, rows, strict=True):
        at = {name: np.array(column) for name, column in run["samples"].items()}
        minutes, used = at["step"] * run["step_seconds"] / 60, at["used_bytes"] / _GIB
        wasted, mapped = used + at["wasted_bytes"] / _GIB, at["mapped_bytes"] / _GIB
        bands = ((0 * used, used, "C0", "used"), (used, wasted, "C3", "wasted"), (wasted, mapped, "0.85", "parked"))
        for low, high, color, label in bands:
            axes.fill_between(minutes, low, high, color=color, label=label, linewidth=0)
        axes.axhline(setup["kv_bytes"] / _GIB, color="black", linewidth=0.8, linestyle=":", label="memory for KV")
        title = f"{run['pool']}: at most {run['outcome']['peak_running']} sequences"
        axes.set(title=title, ylabel="GiB mapped", ylim=(0, None), xlim=(0, None))
    panels[0].legend(loc="lower right")
    panels[-1].set_xlabel("simulated minutes")
    figure.suptitle(f"{setup['model']}, {setup['trace']}")


def _waste(figure: Figure, setup: Row, rows: Sequence[Row]) -> None:
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lost = 100 * (row["mapped_bytes"] - row["used_bytes"]) / row["mapped_bytes"]
        if lost > 0:  # a log scale has no zero
            lines.setdefault(row["layout"], []).append((row["page_bytes"] / (1 << 20), lost))
    for layout, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=layout)
    title = f"{setup['model']}, {setup['trace']}: rounding at request end"
    axes.set(title=title, xlabel="page size, MiB", ylabel="% of mapped bytes", xscale="log", yscale="log")
    axes.legend()


def _latency(figure: Figure, setup: Row, rows: Sequence[Row]) -> None:
    axes = figure.subplots()
    for run in rows:
        if run["pool"] != "static":  # its bookkeeping is part of this benchmark
            label = f"{run['pool']} ({run['mean_running']:.0f} sequences, mean)"
            axes.plot(run["cdf_us"], range(len(run["cdf_us"])), label=label)
    title = "Allocator's time in a scheduler step, driver not included"
    axes.set(title=title, xlabel="microseconds", ylabel="% of steps", xscale="log", xlim=(0.5, None), ylim=(0, 100))
    axes.legend()


def _reuse(figure: Figure, trace: Row, rows: Sequence[Row]) -> None:
    """Unlimited capacity is drawn at the number of distinct blocks."""
    axes = figure.subplots()
    distinct = trace["distinct_blocks"]
    curves: dict[str, dict[int, float]] = {"Belady, which knows the future": {}}
    for row in rows:
        capacity = distinct if isinstance(row["capacity"], str) else row["capacity"]
        curves.setdefault(row["policy"], {})[capacity] = 100 * row["hit_rate"]
        curves["Belady, which knows the future"][capacity] = 100 * row["belady_hit_rate"]
    for index, (name, points) in enumerate(curves.items()):
        color, line = ("black", ":") if index == 0 else (f"C{index}", "-")
        capacities = sorted(points)
        axes.plot(capacities, [points[x] for x in capacities], marker="o", label=name, color=color, linestyle=line)
    title = f"{trace['name']}, {distinct:,} distinct blocks"
    of = "% of the blocks read that were cached"
    axes.set(title=title, xlabel="capacity, blocks of the trace", ylabel=of, xscale="log", ylim=(0, None))
    axes.legend()


def _layouts(figure: Figure, setup: Row, rows: Sequence[Row]) -> None:
    """A panel a figure, a bar a layout."""
    panels = figure.subplots(1, 3, sharey=True)
    names = [row["name"] for row in rows]
    values = {
        "bytes a token": [row["bytes_per_token"] for row in rows],
        "relative error of attention": [row["error"] for row in rows],
        "time of a decode step, of plain": [row["step_ratio"]["median"] for row in rows],
    }
    for axes, (label, widths), color in zip(panels, values.items(), ("C0", "C3", "C2"), strict=True):
        axes.barh(names, widths, color=color)
        axes.set(xlabel=label, xscale="log" if "error" in label else "linear")
    panels[0].invert_yaxis()
    figure.suptitle("{sequences} sequences of {tokens:,} tokens, {heads} heads of {width}, {backend}".format(**setup))


def _tiers(figure: Figure, setup: Row, rows: Sequence[Row]) -> None:
    """A bar for the longest run of each call, beside its limit."""
    axes = figure.subplots()
    most = max(row["blocks"] for row in rows)
    shown = [row for row in rows if row["blocks"] == most]
    names = [f"{row['tier']}: {row['call']}\nlimit: {row['limit']}" for row in shown]
    places = np.arange(len(shown))
    for offset, name, label in ((-0.2, "bytes_per_second", "the tier"), (0.2, "limit_bytes_per_second", "its limit")):
        axes.barh(places + offset, [row[name] / _GIB for row in shown], 0.4, label=label)
    title = f"{setup['model']}: runs of {most} blocks of {shown[0]['block_bytes'] / (1 << 20):.3g} MiB"
    axes.set(title=title, xlabel="GiB a second")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.legend()


#: Name of the file, and the part that it shows.
_PICTURES: dict[str, tuple[Callable[[Figure, Row, Sequence[Row]], None], str]] = {
    "bytes_over_time": (_bytes_over_time, "replay"),
    "waste_by_page_size": (_waste, "waste_sweep"),
    "latency": (_latency, "replay"),
    "reuse": (_reuse, "reuse"),
    "layouts": (_layouts, "layouts"),
    "tiers": (_tiers, "tiers"),
}
