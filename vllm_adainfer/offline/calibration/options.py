"""The options of `vllm-adainfer calibrate`, and which of them go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_adainfer.artifact.engine_options import EngineOptions
from vllm_adainfer.artifact.fields import LabelBound
from vllm_adainfer.artifact.kinds import LABEL_HEADS, BoundChoice, ClassifierKind, ProbeChoice
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.promise.changed import Changed
from vllm_adainfer.promise.promise import Promise, Unit

if TYPE_CHECKING:
    from vllm_adainfer.offline.adapter import NamedAdapter

CHANGED = Changed()


@dataclass(frozen=True)
class PolicyOptions:
    """The make-up of a policy and its promise; see `vllm-adainfer calibrate --help`."""

    classifier: ClassifierKind = "svm"
    exit_points: tuple[int, ...] | None = None
    epsilon: float = 0.02
    delta: float = 0.1
    promise: Promise = CHANGED
    label_bounds: tuple[LabelBound, ...] = ()
    never_early: tuple[str, ...] = ()
    bound: BoundChoice = "auto"
    seed: int = 0
    max_tokens: int = 1
    by_question: bool = False


@dataclass(frozen=True)
class CalibrationRequest:
    """The arguments of the command; see `vllm-adainfer calibrate --help`."""

    model: str
    data: Path
    output: Path
    hf_overrides: Mapping[str, Any] | None = None
    engine_options: EngineOptions = field(default_factory=EngineOptions)
    template: str | None = None
    chat_template: str | None = None
    label_field: str = "label"
    labels: tuple[str, ...] = ()
    label_pool: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    schema: Path | None = None
    adapter: NamedAdapter | None = None
    probe: ProbeChoice = "auto"
    student: str | None = None
    options: PolicyOptions = field(default_factory=PolicyOptions)


def check_objects(request: CalibrationRequest) -> None:
    """Check that the options go with objects of a schema.

    An AdaInferError if they do not; the message says which to drop.
    """
    options, promise = request.options, request.options.promise
    others = {
        "--labels": request.labels,
        "--label-pool": request.label_pool,
        "--choices": request.choices,
    }
    refusals = {
        **{
            f"a schema brings its values: drop {name}": bool(given)
            for name, given in others.items()
        },
        "an object is decided before its first token: drop --max-tokens": options.max_tokens > 1,
        f"{promise.option} is not for objects: drop it": (
            promise.reads_right or promise.unit is Unit.QUERY
        ),
        "an object has a best value in each field: give a gate a value, such as "
        "--gate urgent=true:0.8, instead of best": (
            promise.best_may_change and not promise.about_each
        ),
        f"objects need a label-head for each field: drop --probe {request.probe}": (
            request.probe not in ("auto", *LABEL_HEADS)
        ),
        "--by question is for single answers: drop it": options.by_question,
    }
    _refuse(refusals)


def check_classifier(request: CalibrationRequest, columns: int, several_hold: bool) -> None:
    """Check that the options go with a classifier, whose labels are the columns of its scores.

    It gives `columns` scores; `several_hold`: any number of its labels may hold at once.
    An AdaInferError if they do not; the message says which to drop.
    """
    answers = {
        "--labels": request.labels,
        "--label-pool": request.label_pool,
        "--choices": request.choices,
    }
    options, promise = request.options, request.options.promise
    about_best = options.label_bounds or options.never_early or not promise.about_each
    refusals = {
        "any number of this classifier's labels may hold at once, so none of them is the "
        "answer: promise their probabilities, with --tolerance or --gate LABEL:P, and drop "
        "other promises": (several_hold and bool(about_best)),
        "students and branches learn which label holds, and any number of this classifier's "
        "may: drop --student and --probe branch": (
            several_hold and (request.student is not None or request.probe == "branch")
        ),
        **{
            f"a classifier brings its labels, the columns of its scores: drop {name}": bool(given)
            for name, given in answers.items()
        },
        "an adapter replaces a classifier's head: drop --lora, and give merged weights": (
            request.adapter is not None
        ),
        "a classifier answers with scores, not with tokens: drop --max-tokens": (
            request.options.max_tokens > 1
        ),
        f"{promise.option} ranks documents by the one score of a reranker, and this classifier "
        f"gives {columns}: drop it": (promise.unit is Unit.QUERY and columns != 1),
        f"exit points of a classifier have label-heads: drop --probe {request.probe}": (
            request.probe not in ("auto", "branch", *LABEL_HEADS)
        ),
    }
    _refuse(refusals)


def check_options(
    request: CalibrationRequest, holds_requests: bool, is_classifier: bool = False
) -> None:
    """Check that the options go together, and with data that holds requests or rows.

    An AdaInferError if they do not; the message says which to drop.
    """
    options, choices, labels = request.options, bool(request.choices), bool(request.labels)
    generated, exact = options.max_tokens > 1, options.bound == "exact"
    promise, named_by = options.promise, options.promise.option
    probabilities, queries = promise.reads_probabilities, promise.unit is Unit.QUERY
    bounds = bool(options.label_bounds)
    about_labels = bounds or bool(options.never_early)
    named_by_requests = holds_requests or request.schema is not None
    named = {(one.kind, one.label) for one in options.label_bounds}
    another_probe = request.probe not in ("auto", "branch", *LABEL_HEADS)
    refusals = {
        "--chat-template joins the queries and documents of a reranker, and this model "
        "generates: drop it": (request.chat_template is not None and not is_classifier),
        "--choices and --labels are two kinds of answers: drop one": (choices and labels),
        "--choices and --label-pool are two kinds of answers: drop one": (
            choices and bool(request.label_pool)
        ),
        "--choices are decided by their first token: drop --max-tokens": (choices and generated),
        f"requests with a choice that read probabilities run at full depth: drop {named_by}": (
            choices and probabilities
        ),
        f"--choices need a label-head, which scores whole choices: drop --probe {request.probe}": (
            choices and another_probe
        ),
        f"{named_by} is for the probabilities of one token: drop --max-tokens or {named_by}": (
            probabilities and generated
        ),
        f"{named_by} needs the scores of a label-head, and --probe {request.probe} has none: "
        f"drop --probe or {named_by}": (probabilities and another_probe),
        f"{named_by} ranks the documents of a reranker, and this model generates: drop it": (
            queries and not is_classifier
        ),
        f"{named_by} counts queries, and --recall and --precision documents: drop one of them": (
            queries and bounds
        ),
        "a --student scores labels, for one-token answers: drop --student, or --max-tokens and "
        "--probe": (request.student is not None and (generated or another_probe)),
        "a crf needs every exit point to be asked, and a student is not asked about prompts "
        "without text: drop --student, or take another --classifier": (
            request.student is not None and options.classifier == "crf"
        ),
        "a --student needs --labels, such as --labels negative,positive, or --choices": (
            request.student is not None and not (named_by_requests or labels or choices)
        ),
        f"{request.data} holds requests, which bring their prompts, labels and one token each: "
        "drop --template, --labels and --max-tokens": (
            holds_requests and (request.template is not None or labels or generated)
        ),
        "--labels are one-token answers: drop --max-tokens or --labels": (labels and generated),
        "--bound exact counts independent answers, and the tokens of a text are not: use wsr "
        "or auto with --max-tokens": (exact and generated),
        f"{named_by} works for one-token answers only: drop --max-tokens or bound the "
        "disagreement": (promise.reads_right and generated),
        "--bound exact counts changed answers and cannot bound the accuracy lost: use wsr or "
        "auto": (exact and promise.reads_right),
        "--by question is for requests, each of which asks one: give --data in the form of "
        "vLLM's batch files, or drop --by": (not holds_requests and options.by_question),
        "--label-pool is for requests that name their own labels: give --data in the form of "
        "vLLM's batch files, or --labels": (not holds_requests and bool(request.label_pool)),
        f"{named_by} is for the probabilities of labels: give --labels, such as "
        f"negative,positive, or drop {named_by}": (
            not named_by_requests and probabilities and not labels
        ),
        "--recall, --precision and --never-early are about the labels of one-token answers: "
        "give --labels, such as negative,positive, or --choices, and no --max-tokens": (
            about_labels and (generated or not (named_by_requests or labels or choices))
        ),
        "--recall or --precision names a label twice: keep the smaller epsilon": (
            len(named) < len(options.label_bounds)
        ),
        f"--recall and --precision compare with full depth, {named_by} with the right answers: "
        "drop one of them": (bounds and promise.reads_right),
        "--recall and --precision are about all requests together, --by question about those "
        "of one question: drop one of them": (bounds and options.by_question),
        f"--probe {request.probe} needs --labels, such as --labels negative,positive": (
            not (named_by_requests or another_probe or request.probe == "auto" or labels or choices)
        ),
    }
    _refuse(refusals)


def _refuse(refusals: Mapping[str, bool]) -> None:
    for sentence, refused in refusals.items():
        if refused:
            raise AdaInferError(sentence)
