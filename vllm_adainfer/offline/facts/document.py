"""Facts as a document: sentences, names with their values, and tables. As text and as Markdown.

No colours, and no line is wrapped.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich import box, table
from rich.console import Console, JustifyMethod

UNLIMITED = 10_000  # characters per line; a table is only as wide as its cells
Facts = Mapping[str, str]  # values by their names, each with its unit and its interval


@dataclass(frozen=True)
class Table:
    """Facts about several things, all by the same names.

    Attributes:
        rows: the facts of each; their names are the headings.
        text_columns: how many columns, from the first, are text and no numbers.

    """

    rows: Sequence[Facts]
    text_columns: int = 0


Block = str | Facts | Table  # a paragraph, names with values, or a table


def as_text(blocks: Sequence[Block]) -> str:
    """The document for a terminal."""

    def listed(facts: Facts) -> str:
        names = [{"name": name, "value": value} for name, value in facts.items()]
        return _facts(table.Table.grid(padding=(0, 2)), names, text_columns=2)

    def text_table(rows: Sequence[Facts], text_columns: int) -> str:
        empty = table.Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
        return _facts(empty, rows, text_columns)

    return _joined(blocks, listed, text_table)


def as_markdown(blocks: Sequence[Block]) -> str:
    """The document in Markdown."""

    def listed(facts: Facts) -> str:
        return "\n".join(f"- **{name}**: {value}" for name, value in facts.items())

    def escaped(rows: Sequence[Facts], text_columns: int) -> str:
        bars = [{name: cell.replace("|", r"\|") for name, cell in row.items()} for row in rows]
        return markdown_table(bars, text_columns)

    return _joined(blocks, listed, escaped)


def markdown_table(rows: Sequence[Facts], text_columns: int = 1) -> str:
    """A table in Markdown; the arguments are those of `Table`."""
    return _facts(table.Table(box=box.MARKDOWN), rows, text_columns)


def markdown_grid(
    columns: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1
) -> str:
    """The same of headings that may be equal, and of the cells below them."""
    return _rendered(table.Table(box=box.MARKDOWN), columns, rows, text_columns)


def _facts(empty: table.Table, rows: Sequence[Facts], text_columns: int) -> str:
    cells = ([*row.values()] for row in rows)
    return _rendered(empty, [*rows[0]] if rows else [], cells, text_columns)


def _rendered(
    laid_out: table.Table, columns: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int
) -> str:
    for index, heading in enumerate(columns):
        justify: JustifyMethod = "left" if index < text_columns else "right"
        laid_out.add_column(heading, justify=justify, no_wrap=True)
    for row in rows:
        laid_out.add_row(*row)
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
    console.print(laid_out)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).strip("\n")


def _joined(
    blocks: Sequence[Block],
    list_facts: Callable[[Facts], str],
    lay_out: Callable[[Sequence[Facts], int], str],
) -> str:
    parts = []
    for block in blocks:
        if isinstance(block, Table):
            parts.append(lay_out(block.rows, block.text_columns))
        else:
            parts.append(block if isinstance(block, str) else list_facts(block))
    return "\n\n".join(part for part in parts if part)
