"""Facts as a document: sentences, names with their values, and tables. As text and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vllm_adainfer.offline.tables import aligned, markdown_table, text_table

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

    @property
    def columns(self) -> list[str]:
        """The headings; none without rows."""
        return list(self.rows[0]) if self.rows else []

    @property
    def cells(self) -> list[list[str]]:
        """The values, by row."""
        return [list(row.values()) for row in self.rows]


Block = str | Facts | Table  # a paragraph, names with values, or a table


def as_text(blocks: Sequence[Block]) -> str:
    """The document for a terminal."""
    return _joined(blocks, lambda facts: aligned(list(facts.items())), text_table)


def as_markdown(blocks: Sequence[Block]) -> str:
    """The document in Markdown."""

    def table(columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> str:
        escaped = [[cell.replace("|", r"\|") for cell in row] for row in rows]
        return markdown_table(columns, escaped, text_columns)

    def listed(facts: Facts) -> str:
        return "\n".join(f"- **{name}**: {value}" for name, value in facts.items())

    return _joined(blocks, listed, table)


def _joined(
    blocks: Sequence[Block],
    list_facts: Callable[[Facts], str],
    lay_out: Callable[[Sequence[str], Sequence[Sequence[str]], int], str],
) -> str:
    parts = []
    for block in blocks:
        if isinstance(block, Table):
            parts.append(lay_out(block.columns, block.cells, block.text_columns))
        else:
            parts.append(block if isinstance(block, str) else list_facts(block))
    return "\n\n".join(part for part in parts if part)
