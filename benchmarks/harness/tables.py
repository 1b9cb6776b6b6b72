"""Tables for terminals of any width, and for files."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

#: More columns than any table needs: output that is no terminal is never wrapped.
FULL_WIDTH = 1000


def make_console() -> Console:
    """A console as wide as the terminal, or as the tables where the output is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=FULL_WIDTH)


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def print_table(console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table without cutting a cell.

    Args:
        headings: of the columns, in order of importance. The first column names the rows.
        rows: cells; rows that end early have empty cells.

    Where the table is too wide, columns at the right are left out and named below it. Where not even the
    first two columns fit, each row is a block of lines.
    """
    console.print()
    console.print(Text(title, "bold"), soft_wrap=True)
    rows = [[*row, *[""] * (len(headings) - len(row))] for row in rows]
    for shown in range(len(headings), 1, -1):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for place, heading in enumerate(headings[:shown]):
            table.add_column(heading, justify="right" if place else "left", no_wrap=True)
        for row in rows:
            table.add_row(*map(Text, row[:shown]))
        if console.measure(table, options=console.options.update(width=FULL_WIDTH)).maximum <= console.width:
            console.print(table)
            if left_out := headings[shown:]:
                text = f"Columns left out in this width: {', '.join(left_out)}"
                console.print(text, style="dim", soft_wrap=True, highlight=False)
            return
    for row in rows:
        console.print(Text(row[0]), soft_wrap=True)
        for heading, cell in zip(headings[1:], row[1:], strict=True):
            if cell:
                console.print(Text(f"  {heading} {cell}"), soft_wrap=True)
