"""The demo: fetch a model, calibrate, compare with stock vLLM, report."""

from __future__ import annotations

import shlex
from importlib.resources import as_file, files
from pathlib import Path

import typer

from vllm_adainfer.artifact.engine_options import EngineOptions
from vllm_adainfer.artifact.files import load_details
from vllm_adainfer.offline.calibration.calibrate import calibrate
from vllm_adainfer.offline.calibration.options import CalibrationRequest
from vllm_adainfer.offline.demo.model import MODEL_NAME, fetch_demo_model
from vllm_adainfer.offline.evaluation.evaluate import evaluate
from vllm_adainfer.offline.evaluation.report import summary_line
from vllm_adainfer.offline.facts.artifact import artifact_facts
from vllm_adainfer.offline.facts.document import as_text
from vllm_adainfer.offline.reports.evaluation_facts import evaluation_facts
from vllm_adainfer.offline.reports.page import check_installed
from vllm_adainfer.policy.text_encoders import multiplies_bfloat16

LABELS = ("bad", "good")


def dtype_to_serve() -> str | None:
    """None for bfloat16, the model's own; fp32, with a line, on a processor that emulates that."""
    import torch

    if multiplies_bfloat16(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        return None
    typer.echo("demo: with --dtype float32, because this processor only emulates bfloat16")
    return "float32"


def run(output: Path, repeat: int) -> str:
    """Run the demo in the directory `output`, and return the last lines to print.

    Speeds are those of `repeat` rounds.

    An AdaInferError if a library that it needs is missing, or a step fails.
    """
    check_installed()
    typer.echo(f"demo: fetching the model ({MODEL_NAME}, Apache-2.0)")
    model = str(fetch_demo_model(output / MODEL_NAME))
    with as_file(files("vllm_adainfer.offline.demo")) as shipped:
        template = f"@{shipped / 'template.txt'}"
        typer.echo("demo: calibrating on the reviews in the package")
        artifact = output / "artifact"
        config = calibrate(
            CalibrationRequest(
                model=model,
                data=shipped / "calibration.jsonl",
                output=artifact,
                template=template,
                labels=LABELS,
                engine_options=EngineOptions(dtype=dtype_to_serve()),
            )
        )
        typer.echo(as_text(artifact_facts(config, load_details(str(artifact)))))
        typer.echo("demo: measuring stock vLLM and vllm-adainfer on unseen reviews, interleaved")
        report = evaluate(
            model=model,
            artifact=str(artifact),
            data=shipped / "test.jsonl",
            template=template,
            report=output / "report.json",
            html=output / "report.html",
            repeat=repeat,
        )
    typer.echo(as_text(evaluation_facts(report)) + "\n")
    flags = ["--policy", str(artifact), *config.engine_options.flags]
    serve = shlex.join(["vllm-adainfer", "serve", model, *flags])
    return (
        f"demo: open {output / 'report.html'}; the same as data: {output / 'report.json'}\n"
        f"demo: serve this policy with  {serve}\n"
        f"demo: {summary_line(report)}"
    )
