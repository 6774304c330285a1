"""Tables as plain text, for a terminal and as Markdown; no colours, no wrapping."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table

UNLIMITED = 10_000  # characters per line; a table is only as wide as its cells


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 0) -> str:
    """A table for a terminal.

    Args:
        columns: headings.
        rows: the cells of each row.
        text_columns: how many columns, from the first, are left-aligned; others are right-aligned.

    """
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    return _rendered(table, columns, rows, text_columns)


def markdown_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1
) -> str:
    """A table in Markdown; the arguments are those of `text_table`."""
    return _rendered(Table(box=box.MARKDOWN), columns, rows, text_columns)


def aligned(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values in two columns without headings."""
    return _rendered(Table.grid(padding=(0, 2)), ("", ""), rows, text_columns=2)


def _rendered(
    table: Table, columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int
) -> str:
    for index, heading in enumerate(columns):
        justify: JustifyMethod = "left" if index < text_columns else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    file = io.StringIO()
    console = Console(
        file=file,
        width=UNLIMITED,
        force_terminal=False,
        color_system=None,
        markup=False,
        emoji=False,
        highlight=False,
    )
    console.print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).strip("\n")
