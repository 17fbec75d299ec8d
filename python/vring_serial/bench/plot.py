"""Plots of a report: throughput over message size, and the distribution of round trips."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vring_serial.bench.measure import PLAIN, TOGETHER
from vring_serial.bench.results import Report, Result
from vring_serial.errors import ConfigError, DependencyError, ResourceError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")
_COLOURS = ("#1b6ca8", "#c1502e", "#5b8c5a", "#7d5ba6", "#b8860b", "#555555")


def check_plot(path: str) -> None:
    """Check that a plot can be written to ``path``. Raises ConfigError, DependencyError."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path!r} ends neither in .png nor in .svg", "--plot")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise DependencyError(
            "--plot needs matplotlib, which is not installed: pip install 'vring[plot]'"
        ) from None


def save_plot(report: Report, path: str) -> None:
    """Draw the transfers and latencies of a report.

    Raises as :func:`check_plot`, and ResourceError if the file cannot be written or there is
    nothing to draw.
    """
    check_plot(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    transfers = [r for r in report.results if r.group == "transfer" and r.ports == 1]
    latencies = [r for r in report.results if r.group == "latency" and TOGETHER not in r.what]
    rings = {result.ring for result in latencies} - {""}
    if len(rings) > 1:  # they hardly differ
        latencies = [result for result in latencies if result.ring != "packed"]
    draw = [(_draw_transfers, transfers), (_draw_latencies, latencies)]
    draw = [(function, results) for function, results in draw if results]
    if not draw:
        raise ResourceError(f"{path}: there is neither transfer nor latency to draw")
    mpl.rcParams["svg.hashsalt"] = "vring"  # the same picture is the same file
    figure = Figure(figsize=(5.6 * len(draw), 4.0), layout="constrained")
    for (function, results), axes in zip(
        draw, figure.subplots(1, len(draw), squeeze=False)[0], strict=True
    ):
        function(axes, results)
        axes.grid(alpha=0.25, which="both", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    machine = report.machine
    figure.supxlabel(
        f"vring bench: device, guest and peer in processes of their own, {machine.get('processor')}"
        f", {machine.get('processors')} processors, load {machine.get('load')}",
        fontsize=7,
        color="#666666",
    )
    try:
        figure.savefig(path, dpi=150, metadata=None)
    except OSError as error:
        raise ResourceError(f"{path}: {error.strerror}") from None


def _draw_transfers(axes: Axes, results: list[Result]) -> None:
    series: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        series.setdefault((result.what, result.ring), []).append(result)
    for colour, ((what, ring), points) in zip(_COLOURS, series.items(), strict=False):
        plain = what == PLAIN
        points.sort(key=lambda result: result.size)
        axes.plot(
            [result.size for result in points],
            [result.median for result in points],
            color=colour,
            linestyle="--" if plain else "-",
            marker="." if plain else "o",
            markersize=4,
            label=what if plain else f"{what}, {ring} ring",
        )
        axes.fill_between(
            [result.size for result in points],
            [min(result.samples) for result in points],
            [max(result.samples) for result in points],
            color=colour,
            alpha=0.12,
            linewidth=0,
        )
    axes.set_xscale("log", base=2)
    sizes = sorted({result.size for result in results})
    axes.set_xticks(sizes, [_size(size) for size in sizes], fontsize=8)
    axes.set_yscale("log")
    axes.set_yticks(ticks := [0.01, 0.03, 0.1, 0.3, 1, 3, 10], [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(min(min(r.samples) for r in results) * 0.8)
    axes.set_xlabel("bytes of a message")
    axes.set_ylabel("GB/s")
    axes.set_title("one port, throughput (median and range)", fontsize=10)


def _draw_latencies(axes: Axes, results: list[Result]) -> None:
    for colour, result in zip(_COLOURS, results, strict=False):
        ordered = sorted(result.samples)
        share = [(i + 1) / len(ordered) for i in range(len(ordered))]
        label = f"{result.what}: median {result.median:.1f} µs"
        axes.plot(ordered, share, color=colour, linewidth=1.5, label=label)
    axes.set_xscale("log")
    low = min(result.percentile(0.5) for result in results)
    high = max(result.percentile(99) for result in results)
    ticks = [step * 10**power for power in range(-1, 7) for step in (1, 2, 5)]
    axes.minorticks_off()
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlim(low * 0.8, high * 1.3)
    axes.set_xlabel("µs")
    axes.set_ylabel("share of round trips that took no longer")
    axes.set_title("round trip of 64 bytes, on two processors", fontsize=10)


def _size(size: int) -> str:
    if size >= 1 << 20:
        return f"{size >> 20}M"
    return f"{size >> 10}K" if size >= 1 << 10 else str(size)
