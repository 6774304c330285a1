"""``vllm-adainfer evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_adainfer.cli.app import command
from vllm_adainfer.cli.arguments import (
    ChatTemplate,
    HfOverrides,
    LabelField,
    Labels,
    Lora,
    Model,
    Repeat,
    Template,
    names_of,
    overrides_of,
)
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.evaluation.rounds import ROUNDS


@command
def evaluate(
    model: Model,
    artifact: Annotated[str, typer.Option(help="Directory or hub id of the artifact.")],
    data: Annotated[Path, typer.Option(help="JSON lines, one object per row.")],
    hf_overrides: HfOverrides = "",
    template: Template = None,
    chat_template: ChatTemplate = None,
    label_field: LabelField = "label",
    labels: Labels = "",
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens to generate; by default as many as at calibration."),
    ] = None,
    repeat: Repeat = ROUNDS,
    epsilon: Annotated[
        float | None,
        typer.Option(help="Measure only this bound; by default all bounds of the artifact."),
    ] = None,
    lora: Lora = "",
    schema: Annotated[
        Path | None,
        typer.Option(
            help="For objects: a file with their JSON schema, which must be that of the artifact; "
            "by default the one that calibration has kept there."
        ),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write the report here (JSON).")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the report here as a single HTML page.")
    ] = None,
    prompts: Annotated[
        bool,
        typer.Option(help="Show prompts whose answer changed on the page, with their text."),
    ] = True,
) -> None:
    """Run stock vLLM and vllm-adainfer on the same prompts, interleaved, and compare them."""
    if not prompts and html is None:
        raise AdaInferError("--no-prompts is about the page: give --html, too, or drop it")
    from vllm_adainfer.offline.adapter import read_adapter
    from vllm_adainfer.offline.evaluation.evaluate import evaluate as run
    from vllm_adainfer.offline.evaluation.report import summary_line
    from vllm_adainfer.offline.facts.document import as_text
    from vllm_adainfer.offline.reports.evaluation_facts import evaluation_facts

    result = run(
        model,
        artifact,
        data,
        hf_overrides=overrides_of(hf_overrides),
        template=template,
        chat_template=chat_template,
        label_field=label_field,
        labels=names_of(labels),
        max_tokens=max_tokens,
        repeat=repeat,
        epsilon=epsilon,
        adapter=read_adapter(lora),
        report=report,
        html=html,
        prompts=prompts,
        schema=schema,
    )
    typer.echo(as_text(evaluation_facts(result)) + "\n")
    typer.echo(summary_line(result))
