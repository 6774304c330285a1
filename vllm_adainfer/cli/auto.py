"""``kinds`` and ``autopilot``: the directory of a server that calibrates itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_adainfer.cli.app import command


@command
def kinds(
    directory: Annotated[
        Path, typer.Argument(help='The directory named by "auto" in the switch.', metavar="DIR")
    ],
    page: Annotated[bool, typer.Option("--page", help="Also write DIR/index.html.")] = False,
) -> None:
    """Print which kinds of one-answer requests a server gets, and how it serves each."""
    from vllm_adainfer.offline.facts.document import as_text
    from vllm_adainfer.offline.reports.kinds import facts_of_kinds, label_texts, read_directory
    from vllm_adainfer.offline.reports.page import check_installed

    if page:
        check_installed()
    watched = read_directory(directory)
    typer.echo(as_text(facts_of_kinds(watched, label_texts(watched.tokenizer))))
    if page:
        from vllm_adainfer.offline.reports.timeline import write_page

        typer.echo(f"\npage: {write_page(directory)}")


@command
def autopilot(
    directory: Annotated[
        Path, typer.Argument(help='The directory of "auto" in the engine switch of a server.')
    ],
    parent: Annotated[
        int | None, typer.Option(help="Process id: this process ends when that one does.")
    ] = None,
) -> None:
    """Fit policies from what a self-calibrating server records; the server starts this itself."""
    from vllm_adainfer.offline.auto.process import run

    run(directory, parent)
