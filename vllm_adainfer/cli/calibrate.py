"""``vllm-adainfer calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_adainfer.artifact.kinds import BoundChoice, ClassifierKind, ProbeChoice
from vllm_adainfer.cli.app import command
from vllm_adainfer.cli.arguments import (
    ChatTemplate,
    Data,
    HfOverrides,
    LabelField,
    Labels,
    Lora,
    Model,
    Quantization,
    ServerOption,
    Template,
    names_of,
    overrides_of,
)


@command
def calibrate(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(help="Directory to write the artifact to.")],
    hf_overrides: HfOverrides = "",
    dtype: ServerOption = None,
    quantization: Quantization = None,
    kv_cache_dtype: ServerOption = None,
    template: Template = None,
    chat_template: ChatTemplate = None,
    label_field: LabelField = "label",
    labels: Labels = "",
    label_pool: Annotated[
        str,
        typer.Option(
            help="For data that holds requests (lines of vLLM's batch files): the labels that a "
            "request may name two or more of, such as letters,yes-no,digits, or token ids."
        ),
    ] = "",
    choices: Annotated[
        str,
        typer.Option(
            help="Comma-separated texts of structured_outputs.choice, as requests write them. If "
            "--data holds requests, only those with these choices are used."
        ),
    ] = "",
    lora: Lora = "",
    schema: Annotated[
        Path | None,
        typer.Option(
            help="A file with the JSON schema of the objects that requests ask for. All of its "
            "fields must have few values, and the bound is on objects of which any field changes. "
            'Labels are then such as mood="good" or seen=true. Requests bring their own.'
        ),
    ] = None,
    probe: Annotated[
        ProbeChoice,
        typer.Option(
            help="How answers are read at an exit point. auto takes the one that is expected to be "
            "fastest: a label head (label-head, pooled-label-head or branch) with --labels or "
            "--choices, else lens. See Calibration in the docs."
        ),
    ] = "auto",
    student: Annotated[
        str | None,
        typer.Option(
            help="A small encoder, a directory or hub id, such as MiniLM: trained on the model's "
            "own answers in some minutes, in several sizes, of which the one is taken that makes "
            "prompts fastest, it answers what it is sure of before the first layer, within the "
            "same bound. It is left out where it costs more time than it saves."
        ),
    ] = None,
    classifier: Annotated[
        ClassifierKind,
        typer.Option(
            help="The classifier that decides whether an answer is settled: a linear svm or "
            "logreg, a threshold on the gap alone, or a crf over the exit points."
        ),
    ] = "svm",
    exit_points: Annotated[
        str, typer.Option(help="Layers such as 12,18,24; auto chooses up to eight.")
    ] = "auto",
    epsilon: Annotated[
        float, typer.Option(min=0.0001, max=0.5, help="The bound on the risk.")
    ] = 0.02,
    delta: Annotated[
        float, typer.Option(min=0.0001, max=0.5, help="The probability that the bound fails.")
    ] = 0.1,
    risk: Annotated[
        Literal["disagreement", "accuracy"],
        typer.Option(
            help="The risk that epsilon bounds: the share of changed answers, or the accuracy lost "
            "(every row needs a label)."
        ),
    ] = "disagreement",
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=0.5,
            help="Also promise the labels' probabilities: epsilon then bounds the share of answers "
            "that change or have a probability that moves by more than this.",
        ),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL:P",
            help="For requests that compare LABEL's probability among the labels with P, such as "
            "unsafe:0.8: epsilon then bounds the share of answers on the other side of it. best:P "
            "is about whichever label is best. May be repeated.",
        ),
    ] = None,
    top: Annotated[
        str | None,
        typer.Option(
            metavar="K:MARGIN",
            help="For a reranker: epsilon then bounds the share of queries that lose one of their "
            "first K documents, such as 5:0.05. A document counts as lost only if its score at "
            "full depth lies more than MARGIN above that of the next.",
        ),
    ] = None,
    recall: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL:EPSILON",
            help="Also promise, beside epsilon, that of the requests that full depth answers with "
            "LABEL at most this share get another answer, such as unsafe:0.005. May be repeated.",
        ),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL:EPSILON",
            help="The same about the requests that are answered with LABEL. May be repeated.",
        ),
    ] = None,
    never_early: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            help="A label that is never an early answer: requests run on. May be repeated.",
        ),
    ] = None,
    bound: Annotated[
        BoundChoice,
        typer.Option(
            help="The kind of bound: exact for independent answers that change or do not, wsr for "
            "all others; auto takes the right one."
        ),
    ] = "auto",
    max_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tokens to generate per prompt. Above 1, the policy is for generated text: each "
            "token may exit early, and the bound is on changed tokens.",
        ),
    ] = 1,
    by: Annotated[
        Literal["question"] | None,
        typer.Option(
            help="If --data holds requests: certify each question on its own instead of all "
            "together; those with too few rows run all layers."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="For the split and the folds.")] = 0,
) -> None:
    """Fit a policy on your prompts, certify its bound, and write an artifact."""
    from vllm_adainfer.artifact.engine_options import EngineOptions
    from vllm_adainfer.artifact.files import load_details
    from vllm_adainfer.cli.promises import choice_texts, label_bounds, layers_of, promise_of
    from vllm_adainfer.offline.adapter import read_adapter
    from vllm_adainfer.offline.calibration.calibrate import calibrate as run
    from vllm_adainfer.offline.calibration.options import CalibrationRequest, PolicyOptions
    from vllm_adainfer.offline.facts.artifact import artifact_facts
    from vllm_adainfer.offline.facts.document import as_text

    request = CalibrationRequest(
        model=model,
        data=data,
        output=output,
        hf_overrides=overrides_of(hf_overrides),
        engine_options=EngineOptions(
            dtype=dtype, quantization=quantization, kv_cache_dtype=kv_cache_dtype
        ),
        template=template,
        chat_template=chat_template,
        label_field=label_field,
        labels=names_of(labels),
        label_pool=names_of(label_pool),
        choices=choice_texts(choices),
        schema=schema,
        adapter=read_adapter(lora),
        probe=probe,
        student=student,
        options=PolicyOptions(
            classifier=classifier,
            exit_points=layers_of(exit_points),
            epsilon=epsilon,
            delta=delta,
            promise=promise_of(
                {
                    "--risk accuracy": risk if risk == "accuracy" else None,
                    "--tolerance": tolerance,
                    "--gate": gate or None,
                    "--top": top,
                }
            ),
            label_bounds=(
                *label_bounds("recall", recall or ()),
                *label_bounds("precision", precision or ()),
            ),
            never_early=tuple(never_early or ()),
            bound=bound,
            seed=seed,
            max_tokens=max_tokens,
            by_question=by == "question",
        ),
    )
    typer.echo(as_text(artifact_facts(run(request), load_details(str(output)))))
    typer.echo(f"wrote {output}")
