"""Reports as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table

from vring_serial.bench.results import Report, Result

#: Relative difference of two medians below which they count as the same.
NOTEWORTHY = 0.05


def size_name(size: int) -> str:
    """Return a number of bytes with a unit: 64 B, 16 KiB, 1 MiB."""
    for shift, unit in ((20, "MiB"), (10, "KiB")):
        if size >= 1 << shift and size % (1 << shift) == 0:
            return f"{size >> shift} {unit}"
    return f"{size} B"


def tables(report: Report) -> Iterator[Table]:
    """Yield one table for each group with results."""
    groups: dict[str, list[Result]] = {}
    for result in report.results:
        groups.setdefault(result.group, []).append(result)
    for group, results in groups.items():
        if group == "latency":
            yield _latency_table(results)
        else:
            yield _median_table(group, results)


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
    )
    for column in words:
        table.add_column(column, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _median_table(group: str, results: Sequence[Result]) -> Table:
    notes = list(dict.fromkeys(name for result in results for name in result.notes))
    numbers = ["ports", "message", results[0].unit, "range", *notes]
    table = _table(group, ["", "ring"], numbers)
    for result in results:
        table.add_row(
            result.what,
            result.ring,
            str(result.ports),
            size_name(result.size),
            f"{result.median:.3g}",
            f"{min(result.samples):.3g}-{max(result.samples):.3g}",
            *(f"{result.notes[name]:.2f}" if name in result.notes else "" for name in notes),
        )
    return table


def _latency_table(results: Sequence[Result]) -> Table:
    percentiles = (50, 90, 99, 99.9)
    numbers = ["least", *(f"{percent}%" for percent in percentiles), "of eventfd"]
    table = _table("latency of 64 bytes, round trip in us", ["", "ring"], numbers)
    for result in results:
        beside = result.notes.get("of eventfd")
        table.add_row(
            result.what,
            result.ring,
            f"{min(result.samples):.1f}",
            *(f"{result.percentile(percent):.1f}" for percent in percentiles),
            f"{beside:.2f}" if beside is not None else "",
        )
    return table


def comparison(before: Report, after: Report) -> tuple[Table, int]:
    """Return a table of the results that both reports have, and their number."""
    numbers = ["ports", "message", "A", "B", "unit", "B is"]
    table = _table("medians", ["", "", "ring"], numbers)
    old = {result.key: result for result in before.results}
    count = 0
    for result in after.results:
        if (earlier := old.get(result.key)) is None or earlier.unit != result.unit:
            continue
        count += 1
        table.add_row(
            result.group,
            result.what,
            result.ring,
            str(result.ports),
            size_name(result.size),
            f"{earlier.median:.3g}",
            f"{result.median:.3g}",
            result.unit,
            _verdict(earlier, result),
        )
    return table, count


def _verdict(before: Result, after: Result) -> str:
    """Return the comparison in words, so that readers need not know which direction is better."""
    if not before.median or not after.median:
        return "?"
    gain = after.median / before.median
    if not after.more_is_better:
        gain = 1 / gain
    if abs(gain - 1) < NOTEWORTHY:
        return "the same"
    if gain > 1:
        return f"[green]{(gain - 1) * 100:.0f}% faster[/]"
    return f"[red]{(1 / gain - 1) * 100:.0f}% slower[/]"
