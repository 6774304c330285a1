"""Arguments of several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="Directory or hub id of the model.")]
Data = Annotated[
    Path, typer.Option(help="JSON lines, one object per row; or a directory of *.jsonl.")
]
Template = Annotated[
    str | None,
    typer.Option(
        help="Python format string over a row's fields, or @FILE. Without it, each row needs "
        "'prompt' or 'messages'."
    ),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        help="For a reranker, and rows with 'query' and 'documents': the template of the server's "
        "--chat-template, a file or the template itself."
    ),
]
LabelField = Annotated[str, typer.Option(help="The field of a row that holds its label.")]
Lora = Annotated[
    str,
    typer.Option(help="NAME=DIR: the LoRA adapter that requests use, and the name they give it."),
]
Labels = Annotated[str, typer.Option(help="Comma-separated labels: the possible answers.")]


def names_of(text: str) -> tuple[str, ...]:
    """The names in a comma-separated list."""
    return tuple(name.strip() for name in text.split(",")) if text else ()
