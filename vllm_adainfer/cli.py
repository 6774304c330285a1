"""Command line ``vllm-adainfer``.

calibrate         fit a policy on your prompts and certify its bound
evaluate          stock vLLM and vllm-adainfer side by side
inspect           human-readable summary of an artifact
demo              all of it on a small real model
fetch-demo-model  that model as a safetensors checkpoint
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_adainfer import __version__
from vllm_adainfer.errors import AdaInferError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Early exit for stock vLLM: calibrate a policy, measure it, serve with one flag.",
)


class ProbeChoice(str, Enum):
    """Probes; auto takes label-head with --labels and lens without."""

    auto = "auto"
    lens = "lens"
    label_head = "label-head"
    logit_lens = "logit-lens"


class ClassifierChoice(str, Enum):
    """Classifiers on top_prob and gap; crf also reads those of the exit points before."""

    svm = "svm"
    logreg = "logreg"
    threshold = "threshold"
    rbf = "rbf"
    boosting = "boosting"
    crf = "crf"


def _errors_as_sentences(command: Callable[..., None]) -> Callable[..., None]:
    """Print an `AdaInferError` as it stands and exit with 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except AdaInferError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None

    return run


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",")) if text else ()


Model = Annotated[str, typer.Option(help="Directory or hub id of the model.")]
Data = Annotated[Path, typer.Option(help="JSON lines, one object a row.")]
Template = Annotated[
    str | None,
    typer.Option(
        help="Python format string over a row's fields, or @file. Without it rows carry "
        "'prompt' or 'messages'."
    ),
]
LabelField = Annotated[str, typer.Option(help="Field of a row that holds its label.")]
Labels = Annotated[str, typer.Option(help="Comma-separated labels the answer is one of.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Progress bars are for terminals: ours, vLLM's and transformers' are off elsewhere."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


@app.command()
@_errors_as_sentences
def calibrate(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(help="Directory of the artifact.")],
    template: Template = None,
    label_field: LabelField = "label",
    labels: Labels = "",
    probe: Annotated[ProbeChoice, typer.Option(help="How a state becomes scores.")] = (
        ProbeChoice.auto
    ),
    classifier: Annotated[
        ClassifierChoice,
        typer.Option(
            help="What reads the features: a linear svm or logreg, the threshold on the gap alone, "
            "an rbf SVM, boosting (shallow trees), or a crf over the exit points."
        ),
    ] = ClassifierChoice.svm,
    exit_points: Annotated[
        str, typer.Option(help="Layers such as 12,18,24, or auto: up to four, chosen.")
    ] = "auto",
    epsilon: Annotated[
        float, typer.Option(min=0.0001, max=0.5, help="Bound on the share of changed answers.")
    ] = 0.02,
    delta: Annotated[
        float, typer.Option(min=0.0001, max=0.5, help="Chance that the bound does not hold.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="For splits and folds.")] = 0,
) -> None:
    """Fit a policy on your prompts, certify its bound, write an artifact."""
    from vllm_adainfer.calibration.calibrate import CalibrationRequest
    from vllm_adainfer.calibration.calibrate import calibrate as run
    from vllm_adainfer.describe import describe

    config = run(
        CalibrationRequest(
            model=model,
            data=data,
            output=output,
            template=template,
            label_field=label_field,
            labels=_names(labels),
            probe=probe.value,
            classifier=classifier.value,
            exit_points=_layers(exit_points),
            epsilon=epsilon,
            delta=delta,
            seed=seed,
        )
    )
    typer.echo(describe(config))
    typer.echo(f"wrote {output}")


@app.command()
@_errors_as_sentences
def evaluate(
    model: Model,
    artifact: Annotated[str, typer.Option(help="Directory or hub id of the artifact.")],
    data: Data,
    template: Template = None,
    label_field: LabelField = "label",
    labels: Labels = "",
    repeat: Annotated[int, typer.Option(min=1, help="Measured rounds of both engines.")] = 3,
    report: Annotated[Path | None, typer.Option(help="Write the report here (JSON).")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the plot here (PNG).")] = None,
) -> None:
    """Run stock vLLM and vllm-adainfer on the same prompts, interleaved, and compare."""
    from vllm_adainfer.calibration.evaluate import EvaluationRequest
    from vllm_adainfer.calibration.evaluate import evaluate as run
    from vllm_adainfer.calibration.report import summary_line
    from vllm_adainfer.describe import table

    result = run(
        EvaluationRequest(
            model=model,
            artifact=artifact,
            data=data,
            template=template,
            label_field=label_field,
            labels=_names(labels),
            repeat=repeat,
            report=report,
            plot=plot,
        )
    )
    typer.echo(table(result))
    typer.echo(summary_line(result))


@app.command()
@_errors_as_sentences
def inspect(
    artifact: Annotated[str, typer.Argument(help="Directory or hub id of the artifact.")],
) -> None:
    """Say what an artifact is for and what it promises."""
    from vllm_adainfer.artifact import load_artifact
    from vllm_adainfer.describe import describe

    typer.echo(describe(load_artifact(artifact).config))


@app.command()
@_errors_as_sentences
def demo(
    output: Annotated[Path, typer.Option(help="Directory for model, artifact and report.")] = Path(
        ".demo"
    ),
) -> None:
    """Fetch a small model, calibrate on the prompts shipped here, compare with stock vLLM."""
    from vllm_adainfer.demo.run import run

    typer.echo(run(output))


@app.command()
@_errors_as_sentences
def fetch_demo_model(
    output: Annotated[Path, typer.Option(help="Directory of the checkpoint.")],
) -> None:
    """Write the demo model, SmolLM2-135M-Instruct, as a safetensors checkpoint."""
    from vllm_adainfer.demo.model import fetch_demo_model as fetch

    typer.echo(f"demo model in {fetch(output)}")


def _layers(text: str) -> tuple[int, ...] | None:
    if text == "auto":
        return None
    try:
        return tuple(int(layer) for layer in text.split(","))
    except ValueError:
        raise AdaInferError(
            f"--exit-points must be auto or layers such as 12,18,24, not {text!r}"
        ) from None


if __name__ == "__main__":
    app()
