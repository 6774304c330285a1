"""The command line ``vllm-adainfer``.

calibrate         fit a policy on your prompts and certify its bound
evaluate          measure stock vLLM and vllm-adainfer side by side
inspect           summarise an artifact
doctor            check the installation, an artifact and a model
demo              calibrate and evaluate on a small real model
fetch-demo-model  write that model as a safetensors checkpoint
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_adainfer import __version__
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.policy.kinds import (
    BoundChoice,
    By,
    ClassifierKind,
    ProbeChoice,
    Risk,
    RiskChoice,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Early exit for stock vLLM: calibrate a policy, measure it, serve with one flag.",
)


def _errors_as_sentences(command: Callable[..., None]) -> Callable[..., None]:
    """Print an `AdaInferError` as one sentence and exit with 1."""

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
LabelField = Annotated[str, typer.Option(help="The field of a row that holds its label.")]
Lora = Annotated[
    str, typer.Option(help="NAME=DIR: the LoRA adapter of the requests, by the name they use.")
]
Labels = Annotated[str, typer.Option(help="Comma-separated labels: the possible answers.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Early exit for stock vLLM: calibrate a policy, measure it, serve with one flag."""
    # Progress bars, ours and those of vLLM and transformers, are for terminals only.
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


@app.command()
@_errors_as_sentences
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
    from vllm_adainfer.offline.calibration.adapter import read_adapter
    from vllm_adainfer.offline.calibration.calibrate import calibrate as run
    from vllm_adainfer.offline.calibration.choices import names_of as choice_names
    from vllm_adainfer.offline.calibration.fitted_policy import PolicyOptions
    from vllm_adainfer.offline.calibration.prompts import CalibrationRequest
    from vllm_adainfer.offline.describe import describe
    from vllm_adainfer.policy.artifact_files import load_details

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
            labels=_names(labels),
            label_pool=_names(label_pool),
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


@app.command()
@_errors_as_sentences
def evaluate(
    model: Model,
    artifact: Annotated[
        str | None, typer.Option(help="Directory or hub id of the artifact.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="JSON lines, one object per row.")] = None,
    template: Template = None,
    label_field: LabelField = "label",
    labels: Labels = "",
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens to generate; by default as many as at calibration."),
    ] = None,
    repeat: Annotated[
        int, typer.Option(min=1, help="Rounds to measure, each of both engines.")
    ] = 3,
    epsilon: Annotated[
        float | None,
        typer.Option(help="Measure this bound alone; by default all that the artifact has."),
    ] = None,
    lora: Lora = "",
    report: Annotated[Path | None, typer.Option(help="Write the report here (JSON).")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the plot here (PNG).")] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Instead of an artifact and data: calibrate and evaluate on the tasks of this "
            "suite (adainfer), beside other methods. Writes a Markdown table beside the report."
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Directory of TASK/train.jsonl and TASK/test.jsonl; by default from the hub."
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="Comma-separated tasks of the suite; by default all.")
    ] = "",
    shots: Annotated[
        int | None,
        typer.Option(
            min=0, help="Answered rows before each prompt of the suite; by default as it says."
        ),
    ] = None,
) -> None:
    """Run stock vLLM and vllm-adainfer on the same prompts, interleaved, and compare them."""
    if suite is not None:
        if artifact is not None or data is not None or epsilon is not None or lora:
            raise AdaInferError(
                "--suite has its own data and policies: drop --artifact, --data, --epsilon and "
                "--lora"
            )
        from vllm_adainfer.offline.suite.report import markdown
        from vllm_adainfer.offline.suite.run import SuiteRequest, run_suite

        request = SuiteRequest(
            model=model,
            suite=suite,
            data_dir=data_dir,
            tasks=_names(tasks),
            shots=shots,
            repeat=repeat,
            report=report,
            plot=plot,
        )
        typer.echo(markdown(run_suite(request)))
        return
    if artifact is None or data is None:
        raise AdaInferError("evaluate needs --artifact and --data, or --suite")
    from vllm_adainfer.offline.calibration.adapter import read_adapter
    from vllm_adainfer.offline.describe import describe_report
    from vllm_adainfer.offline.evaluation.evaluate import EvaluationRequest
    from vllm_adainfer.offline.evaluation.evaluate import evaluate as run
    from vllm_adainfer.offline.evaluation.report import summary_line

    result = run(
        EvaluationRequest(
            model=model,
            artifact=artifact,
            data=data,
            template=template,
            label_field=label_field,
            labels=_names(labels),
            max_tokens=max_tokens,
            repeat=repeat,
            epsilon=epsilon,
            adapter=read_adapter(lora),
            report=report,
            plot=plot,
        )
    )
    typer.echo(describe_report(result))
    typer.echo(summary_line(result))


@app.command()
@_errors_as_sentences
def inspect(
    artifact: Annotated[str, typer.Argument(help="Directory or hub id of the artifact.")],
) -> None:
    """Print what an artifact is for and what it promises."""
    from vllm_adainfer.offline.describe import describe
    from vllm_adainfer.policy.artifact_files import load_artifact_config, load_details

    typer.echo(describe(load_artifact_config(artifact), load_details(artifact)))


@app.command()
@_errors_as_sentences
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


@app.command()
@_errors_as_sentences
def demo(
    output: Annotated[
        Path, typer.Option(help="Directory for the model, the artifact and the report.")
    ] = Path(".demo"),
) -> None:
    """Fetch a small model, calibrate it on the included prompts, compare with stock vLLM."""
    from vllm_adainfer.offline.demo.run import run

    typer.echo(run(output))


@app.command()
@_errors_as_sentences
def fetch_demo_model(
    output: Annotated[Path, typer.Option(help="Directory to write the checkpoint to.")],
) -> None:
    """Write the demo model, SmolLM2-135M-Instruct, as a safetensors checkpoint."""
    from vllm_adainfer.offline.demo.model import fetch_demo_model as fetch

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
