"""``vllm-adainfer evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_adainfer.cli.app import app, errors_as_sentences
from vllm_adainfer.cli.arguments import LabelField, Labels, Lora, Model, Template, names_of
from vllm_adainfer.errors import AdaInferError


@app.command()
@errors_as_sentences
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
        typer.Option(help="Measure only this bound; by default all bounds of the artifact."),
    ] = None,
    lora: Lora = "",
    report: Annotated[Path | None, typer.Option(help="Write the report here (JSON).")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the plot here (PNG).")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page about it here, in one file (HTML).")
    ] = None,
    prompts: Annotated[
        bool,
        typer.Option(help="Show prompts whose answer changed on the page, with their text."),
    ] = True,
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
    if not prompts and html is None:
        raise AdaInferError("--no-prompts is about the page: give --html, too, or drop it")
    if suite is not None:
        if artifact is not None or data is not None or epsilon is not None or lora or html:
            raise AdaInferError(
                "--suite has its own data, policies and report: drop --artifact, --data, "
                "--epsilon, --lora and --html"
            )
        from vllm_adainfer.offline.suite.report import markdown
        from vllm_adainfer.offline.suite.run import SuiteRequest, run_suite

        request = SuiteRequest(
            model=model,
            suite=suite,
            data_dir=data_dir,
            tasks=names_of(tasks),
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
    from vllm_adainfer.offline.evaluation.evaluate import EvaluationRequest
    from vllm_adainfer.offline.evaluation.evaluate import evaluate as run
    from vllm_adainfer.offline.evaluation.report import summary_line
    from vllm_adainfer.offline.reports.describe_report import describe_report

    result = run(
        EvaluationRequest(
            model=model,
            artifact=artifact,
            data=data,
            template=template,
            label_field=label_field,
            labels=names_of(labels),
            max_tokens=max_tokens,
            repeat=repeat,
            epsilon=epsilon,
            adapter=read_adapter(lora),
            report=report,
            plot=plot,
            html=html,
            prompts=prompts,
        )
    )
    typer.echo(describe_report(result))
    typer.echo(summary_line(result))
