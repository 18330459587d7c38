"""Tables without frames, of which a narrow terminal breaks lines and leaves nothing out."""

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table

__all__ = ["plain_table", "print_whole"]

WIDEST = 1000
"""More than any row needs."""


def plain_table(*headers: str) -> Table:
    """A table of columns under bold headers."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for header in headers:
        table.add_column(header, no_wrap=True)
    return table


def print_whole(console: Console, table: RenderableType) -> None:
    """Print what may hold a table, as wide as it needs."""
    width = console.width
    needed = Measurement.get(console, console.options.update(width=WIDEST), table).maximum
    console.width = max(width, needed)
    console.print(table)
    console.width = width
