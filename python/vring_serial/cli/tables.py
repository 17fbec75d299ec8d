"""Tables on terminals of any width."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def show(console: Console, table: Table, *, wraps: bool = False) -> None:
    """Print a table, or one paragraph per row if it does not fit, so that nothing is cut off.

    Args:
        wraps: whether cells may be wrapped, because they are prose.
    """
    for column in table.columns:
        column.overflow = "fold"
    needed = Measurement.get(console, console.options.update(width=1000), table)
    if (needed.minimum if wraps else needed.maximum) <= console.width:
        console.print(table, soft_wrap=False)
        return
    if table.title:
        console.print(table.title, style="italic", highlight=False, soft_wrap=False)
    cells = [list(column.cells) for column in table.columns]
    for row in zip(*cells, strict=True):
        named = zip(table.columns, row, strict=True)
        pairs = (f"{column.header} {cell}".strip() for column, cell in named if str(cell))
        console.print("  " + ", ".join(pairs), highlight=False, soft_wrap=False)
