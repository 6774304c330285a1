"""``vllm-adainfer demo`` and ``fetch-demo-model``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_adainfer.cli.app import command
from vllm_adainfer.cli.arguments import Repeat
from vllm_adainfer.offline.evaluation.rounds import ROUNDS


@command
def demo(
    output: Annotated[
        Path, typer.Option(help="Directory for the model, the artifact and the report.")
    ] = Path(".demo"),
    repeat: Repeat = ROUNDS,
) -> None:
    """Fetch a small model, calibrate it on the included prompts, compare with stock vLLM."""
    from vllm_adainfer.offline.demo.run import run

    typer.echo(run(output, repeat))


@command
def fetch_demo_model(
    output: Annotated[Path, typer.Option(help="Directory to write the checkpoint to.")],
) -> None:
    """Write the demo model, SmolLM2-135M-Instruct, as a safetensors checkpoint."""
    from vllm_adainfer.offline.demo.model import fetch_demo_model as fetch

    typer.echo(f"demo model in {fetch(output)}")
