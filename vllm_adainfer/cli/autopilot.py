"""``vllm-adainfer autopilot``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_adainfer.cli.app import app, errors_as_sentences


@app.command()
@errors_as_sentences
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
