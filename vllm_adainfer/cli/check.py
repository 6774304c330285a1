"""``vllm-adainfer inspect`` and ``doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from vllm_adainfer.cli.app import app, errors_as_sentences
from vllm_adainfer.cli.arguments import Lora


@app.command()
@errors_as_sentences
def inspect(
    artifact: Annotated[str, typer.Argument(help="Directory or hub id of the artifact.")],
) -> None:
    """Print what an artifact is for and what it promises."""
    from vllm_adainfer.offline.describe import describe
    from vllm_adainfer.policy.artifact_files import load_artifact_config, load_details

    typer.echo(describe(load_artifact_config(artifact), load_details(artifact)))


@app.command()
@errors_as_sentences
def doctor(
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id of the model to serve.")
    ] = None,
    artifact: Annotated[
        str | None,
        typer.Option(
            help="Directory or hub id of its artifact. Given both, doctor starts an engine."
        ),
    ] = None,
    lora: Lora = "",
) -> None:
    """Check installation, artifact and model, one line each; exit with 1 if a check failed."""
    from vllm_adainfer.offline.calibration.adapter import read_adapter
    from vllm_adainfer.offline.doctor.checks import examine

    failed = False
    for finding in examine(model, artifact, read_adapter(lora)):
        typer.echo(finding)
        failed = failed or finding.failed
    if failed:
        raise typer.Exit(1)
