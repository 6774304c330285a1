"""``vllm-adainfer calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_adainfer.artifact.kinds import (
    BoundChoice,
    By,
    ClassifierKind,
    ProbeChoice,
    Risk,
    RiskChoice,
)
from vllm_adainfer.cli.app import app, errors_as_sentences
from vllm_adainfer.cli.arguments import Data, LabelField, Labels, Lora, Model, Template, names_of
from vllm_adainfer.errors import AdaInferError


@app.command()
@errors_as_sentences
def calibrate(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(help="Directory to write the artifact to.")],
    template: Template = None,
    label_field: LabelField = "label",
    labels: Labels = "",
    label_pool: Annotated[
        str,
        typer.Option(
            help="Of requests (lines of vLLM's batch files as --data): the labels that a request "
            "may name two or more of, such as letters,yes-no,digits, or token ids."
        ),
    ] = "",
    choices: Annotated[
        str,
        typer.Option(
            help="Comma-separated texts of structured_outputs.choice, as requests write them. Of "
            "requests as --data: those with these choices alone."
        ),
    ] = "",
    lora: Lora = "",
    probe: Annotated[
        ProbeChoice,
        typer.Option(
            help="How an exit point reads the answer; auto: label-head with --labels or "
            "--choices, else lens."
        ),
    ] = "auto",
    classifier: Annotated[
        ClassifierKind,
        typer.Option(
            help="What decides whether an answer is settled: a linear svm or logreg, a threshold "
            "on the gap alone, an rbf SVM, boosting (shallow trees), or a crf over the exit "
            "points."
        ),
    ] = "svm",
    exit_points: Annotated[
        str, typer.Option(help="Layers such as 12,18,24; auto chooses up to four.")
    ] = "auto",
    epsilon: Annotated[
        float, typer.Option(min=0.0001, max=0.5, help="The bound on the risk.")
    ] = 0.02,
    delta: Annotated[
        float, typer.Option(min=0.0001, max=0.5, help="The chance that the bound does not hold.")
    ] = 0.1,
    risk: Annotated[
        RiskChoice,
        typer.Option(
            help="What epsilon bounds: the share of changed answers, or the accuracy lost (every "
            "row needs a label)."
        ),
    ] = "disagreement",
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=0.5,
            help="Promise the labels' probabilities, too: epsilon then bounds the share of answers "
            "that change or of which a probability moves by more than this.",
        ),
    ] = None,
    bound: Annotated[
        BoundChoice, typer.Option(help="How the bound is certified; naive has no confidence.")
    ] = "auto",
    max_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tokens to generate per prompt. Above 1, the policy is for generated text: each "
            "token may leave early, and the bound is on changed tokens.",
        ),
    ] = 1,
    by: Annotated[
        By | None,
        typer.Option(
            help="Of requests: certify each question on its own instead of all together; those "
            "with too few rows run all layers."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="For the split and the folds.")] = 0,
) -> None:
    """Fit a policy on your prompts, certify its bound, and write an artifact."""
    from vllm_adainfer.artifact.files import load_details
    from vllm_adainfer.offline.calibration.adapter import read_adapter
    from vllm_adainfer.offline.calibration.calibrate import calibrate as run
    from vllm_adainfer.offline.calibration.choices import names_of as choice_names
    from vllm_adainfer.offline.calibration.fitted_policy import PolicyOptions
    from vllm_adainfer.offline.calibration.prompts import CalibrationRequest
    from vllm_adainfer.offline.reports.describe import describe

    bounded: Risk = risk
    if tolerance is not None and risk == "disagreement":
        bounded = "probability"
    config = run(
        CalibrationRequest(
            model=model,
            data=data,
            output=output,
            template=template,
            label_field=label_field,
            labels=names_of(labels),
            label_pool=names_of(label_pool),
            choices=choice_names(choices),
            adapter=read_adapter(lora),
            probe=probe,
            options=PolicyOptions(
                classifier=classifier,
                exit_points=_layers(exit_points),
                epsilon=epsilon,
                delta=delta,
                risk=bounded,
                tolerance=tolerance,
                bound=bound,
                seed=seed,
                max_tokens=max_tokens,
                by_question=by == "question",
            ),
        )
    )
    typer.echo(describe(config, load_details(str(output))))
    typer.echo(f"wrote {output}")


def _layers(text: str) -> tuple[int, ...] | None:
    if text == "auto":
        return None
    try:
        return tuple(int(layer) for layer in text.split(","))
    except ValueError:
        raise AdaInferError(
            f"--exit-points must be auto or layers such as 12,18,24, not {text!r}"
        ) from None
