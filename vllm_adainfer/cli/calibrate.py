"""``vllm-adainfer calibrate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_adainfer.artifact.fields import Gate, LabelBound, TopK
from vllm_adainfer.artifact.kinds import ClassifierKind, LabelBoundKind, Risk
from vllm_adainfer.cli.app import app, errors_as_sentences
from vllm_adainfer.cli.arguments import (
    ChatTemplate,
    Data,
    HfOverrides,
    LabelField,
    Labels,
    Lora,
    Model,
    Template,
    names_of,
    overrides_of,
)
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.options import (
    BoundChoice,
    CalibrationRequest,
    PolicyOptions,
    ProbeChoice,
)


@app.command()
@errors_as_sentences
def calibrate(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(help="Directory to write the artifact to.")],
    hf_overrides: HfOverrides = "",
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
    probe: Annotated[
        ProbeChoice,
        typer.Option(
            help="How an exit point reads the answer: label-head (a softmax regression on the "
            "state of the last token), pooled-label-head (on the mean over the prompt, too), "
            "branch (pooled heads, and where that saves time a small transformer layer over all "
            "tokens of the prompt: the model runs the prompts once more, and a branch trains for "
            "about a minute), lens (a tuned lens) or logit-lens (the model's own head); auto takes "
            "the faster label head with --labels or --choices, with branches where one takes "
            "little time beside a layer of the model, else lens."
        ),
    ] = "auto",
    student: Annotated[
        str | None,
        typer.Option(
            help="A small encoder, a directory or hub id, such as MiniLM: trained on the model's "
            "own answers in some minutes, it answers what it is sure of before the first layer, "
            "within the same bound. It is left out where it costs more time than it saves."
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
    from vllm_adainfer.artifact.files import load_details
    from vllm_adainfer.offline.adapter import read_adapter
    from vllm_adainfer.offline.calibration.calibrate import calibrate as run
    from vllm_adainfer.offline.reports.describe import describe

    request = CalibrationRequest(
        model=model,
        data=data,
        output=output,
        hf_overrides=overrides_of(hf_overrides),
        template=template,
        chat_template=chat_template,
        label_field=label_field,
        labels=names_of(labels),
        label_pool=names_of(label_pool),
        choices=choice_texts(choices),
        adapter=read_adapter(lora),
        probe=probe,
        student=student,
        options=PolicyOptions(
            classifier=classifier,
            exit_points=_layers(exit_points),
            epsilon=epsilon,
            delta=delta,
            risk=_risk(risk, tolerance, gate or (), top),
            tolerance=tolerance,
            gates=gates_of(gate or ()),
            top_k=top_k_of(top),
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
    typer.echo(describe(run(request), load_details(str(output))))
    typer.echo(f"wrote {output}")


def _risk(
    risk: Literal["disagreement", "accuracy"],
    tolerance: float | None,
    gates: Sequence[str],
    top: str | None,
) -> Risk:
    """The risk that epsilon bounds.

    Raises:
        AdaInferError: two are asked for.

    """
    others = {
        "--gate bounds how often probabilities are on the wrong side": bool(gates),
        "--tolerance bounds how far probabilities move": tolerance is not None,
        "--top bounds how often queries lose a document": top is not None,
    }
    asked = [said for said, given in others.items() if given]
    if asked and risk == "accuracy":
        raise AdaInferError(
            f"{asked[0]}, --risk accuracy the accuracy lost, and a policy has one bound: drop one "
            "of them"
        )
    return "probability" if asked else risk


def top_k_of(text: str | None) -> TopK | None:
    """The promise of ``--top``.

    Raises:
        AdaInferError: it is not of the form K:MARGIN.

    """
    if text is None:
        return None
    k, _, margin = text.partition(":")
    try:
        return TopK(k=int(k), margin=float(margin))
    except ValueError:
        raise AdaInferError(
            f"--top {text!r:.80} must be a number of documents and a margin between 0 and 1, such "
            "as 5:0.05"
        ) from None


def gates_of(asked: Sequence[str]) -> tuple[Gate, ...]:
    """The gates of ``--gate``.

    Raises:
        AdaInferError: one is not of the form LABEL:P.

    """
    found = []
    for text in asked:
        label, _, probability = text.rpartition(":")
        try:
            name = None if label == "best" else label
            found.append(Gate(label=name, probability=float(probability)))
        except ValueError:
            raise AdaInferError(
                f"--gate {text!r:.80} must be a label, or best, and a probability between 0 and 1, "
                "such as unsafe:0.8"
            ) from None
    return tuple(found)


def label_bounds(kind: LabelBoundKind, asked: Sequence[str]) -> tuple[LabelBound, ...]:
    """The promises of ``--recall`` or ``--precision``.

    Raises:
        AdaInferError: one is not of the form LABEL:EPSILON.

    """
    found = []
    for text in asked:
        label, _, epsilon = text.rpartition(":")
        try:
            found.append(LabelBound(kind=kind, label=label, epsilon=float(epsilon)))
        except ValueError:
            raise AdaInferError(
                f"--{kind} {text!r:.80} must be a label and a share between 0 and 1, such as "
                "unsafe:0.005"
            ) from None
    return tuple(found)


def choice_texts(text: str) -> tuple[str, ...]:
    """The texts of ``--choices``, as they are written between the commas.

    Raises:
        AdaInferError: some begin with a blank and others do not, which is hardly meant.

    """
    texts = tuple(text.split(",")) if text else ()
    if len({one.startswith(" ") for one in texts}) > 1:
        raise AdaInferError(
            f"--choices {text!r}: some begin with a blank, which belongs to the choice, and others "
            "do not: write them as requests do, without a blank after the comma unless all have one"
        )
    return texts


def _layers(text: str) -> tuple[int, ...] | None:
    if text == "auto":
        return None
    try:
        return tuple(int(layer) for layer in text.split(","))
    except ValueError:
        raise AdaInferError(
            f"--exit-points must be auto or layers such as 12,18,24, not {text!r}"
        ) from None
