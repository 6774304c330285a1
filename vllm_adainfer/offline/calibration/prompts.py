"""What `calibrate` is asked for, and the prompts it runs: rows for a template, or requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vllm_adainfer.artifact.config import Label
from vllm_adainfer.artifact.files import check_writable
from vllm_adainfer.artifact.kinds import ProbeChoice, ProbeKind
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.adapter import NamedAdapter
from vllm_adainfer.offline.calibration.batch_files import are_requests, read_requests
from vllm_adainfer.offline.calibration.choices import (
    Choices,
    common_choices,
    find_choices,
    requests_for_labels,
    with_labels,
)
from vllm_adainfer.offline.calibration.collect import Ints
from vllm_adainfer.offline.calibration.data import (
    Example,
    Row,
    check_labels_known,
    find_labels,
    first_token,
    make_examples,
    read_rows,
    read_template,
)
from vllm_adainfer.offline.calibration.fitted_policy import PolicyOptions
from vllm_adainfer.offline.calibration.label_pool import common_labels, pool_of
from vllm_adainfer.offline.calibration.loss import RightTokens
from vllm_adainfer.offline.calibration.questions import SEEN, ends_of
from vllm_adainfer.offline.calibration.split import Split, numbered, random_order
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer


@dataclass(frozen=True)
class CalibrationRequest:
    """The command line's arguments; see `vllm-adainfer calibrate --help`."""

    model: str
    data: Path
    output: Path
    template: str | None = None
    label_field: str = "label"
    labels: tuple[str, ...] = ()
    label_pool: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    adapter: NamedAdapter | None = None
    probe: ProbeChoice = "auto"
    options: PolicyOptions = field(default_factory=PolicyOptions)


@dataclass(frozen=True)
class Prompts:
    """What is recorded, in random order.

    Attributes:
        examples: the prompts.
        labels: the answers, if there is a fixed set of them.
        split: which of them fit, and which certify.
        hf_config: of the model.
        probe: the kind that reads them.
        right: the right tokens by prompt, if the risk is of accuracy.
        choices: if the answers are texts to choose from; `labels` are what first tokens decide.

    """

    examples: list[Example]
    labels: tuple[Label, ...]
    split: Split
    hf_config: Any
    probe: ProbeKind
    right: RightTokens | None
    choices: Choices | None = None


def load_prompts(request: CalibrationRequest) -> Prompts:
    """Check the request, and read its data.

    Raises:
        AdaInferError: the input, the model or the number of rows does not allow it.

    """
    check_writable(request.output)
    options = request.options
    if options.tolerance is not None:
        check_tolerance(request)
    if request.choices:
        check_choices(request)
    if request.labels and options.max_tokens > 1:
        raise AdaInferError("--labels are one-token answers: drop --max-tokens or --labels")
    rows = read_rows(request.data)
    if not are_requests(rows):
        check_rows(Split.halves(len(rows)), options, str(request.data))
    hf_config, tokenizer = load_config_and_tokenizer(request.model)
    most = hf_config.max_position_embeddings - options.max_tokens
    if are_requests(rows):
        examples, answers = _requests(request, rows, tokenizer, hf_config.vocab_size, most)
    else:
        examples, answers = _rows(request, rows, tokenizer, hf_config.vocab_size, most)
    choices = answers if isinstance(answers, Choices) else None
    labels = answers.labels if isinstance(answers, Choices) else answers
    groups = groups_of(examples)
    order = random_order(groups, options.seed)
    examples, split = (
        [examples[index] for index in order],
        Split.of_groups(numbered(groups[order].tolist())),
    )
    check_rows(split, options, str(request.data))
    probe = choose_probe(request.probe, labels)
    right = right_tokens(examples, labels, tokenizer) if options.risk == "accuracy" else None
    return Prompts(examples, labels, split, hf_config, probe, right, choices)


def _rows(
    request: CalibrationRequest, rows: Sequence[Row], tokenizer: Any, vocabulary: int, most: int
) -> tuple[list[Example], tuple[Label, ...] | Choices]:
    """Prompts from rows for a template, and their labels or choices."""
    if request.options.by_question:
        raise AdaInferError(
            "--by question is for requests, each of which asks one: give --data in the form of "
            "vLLM's batch files, or drop --by"
        )
    if request.label_pool:
        raise AdaInferError(
            "--label-pool is for requests that name their own labels: give --data in the form of "
            "vLLM's batch files, or --labels"
        )
    if request.options.tolerance is not None and not request.labels:
        raise AdaInferError(
            "--tolerance is for the probabilities of labels: give --labels, such as "
            "negative,positive, or drop --tolerance"
        )
    choose_probe(request.probe, request.labels or request.choices)
    template = read_template(request.template)
    examples = make_examples(rows, tokenizer, template, request.label_field, most)
    if request.choices:
        choices = find_choices(request.choices, tokenizer, vocabulary)
        return with_labels(examples, request.choices), choices
    labels = find_labels(request.labels, examples[0], tokenizer) if request.labels else ()
    if labels:
        check_labels_known(examples, labels)
    return examples, labels


def _requests(
    request: CalibrationRequest, rows: Sequence[Row], tokenizer: Any, vocabulary: int, most: int
) -> tuple[list[Example], tuple[Label, ...] | Choices]:
    """Prompts from requests, and the labels or choices of all of them."""
    if request.template is not None or request.labels or request.options.max_tokens > 1:
        raise AdaInferError(
            f"{request.data} holds requests, which bring their prompts, labels and one token each: "
            "drop --template, --labels and --max-tokens"
        )
    examples = read_requests(rows, tokenizer, vocabulary, most)
    texts: tuple[str, ...] = ()
    if request.label_pool:
        examples = requests_for_labels(examples)
    else:
        examples, texts = common_choices(examples, request.choices)
    if texts and request.options.tolerance is not None:
        check_choices(replace(request, choices=texts))
    if request.options.by_question:
        check_questions(examples, request.options, str(request.data))
    if request.label_pool:
        return examples, pool_of(request.label_pool, examples, tokenizer)
    if texts:
        return with_labels(examples, texts), find_choices(texts, tokenizer, vocabulary)
    return examples, common_labels(examples, tokenizer)


def check_choices(request: CalibrationRequest) -> None:
    """Check that nothing else is asked for than a policy for choices can promise.

    Raises:
        AdaInferError: something is.

    """
    options = request.options
    refusals = [
        (bool(request.labels), "--choices and --labels are two kinds of answers: drop one"),
        (bool(request.label_pool), "--choices and --label-pool are two kinds of answers: drop one"),
        (
            options.max_tokens > 1,
            "--choices are decided by their first token: drop --max-tokens",
        ),
        (
            options.tolerance is not None,
            "requests with a choice that read probabilities run at full depth: drop --tolerance",
        ),
        (
            request.probe not in ("auto", "label-head"),
            f"--choices need a label-head, which scores whole choices: drop --probe "
            f"{request.probe}",
        ),
    ]
    for refused, sentence in refusals:
        if refused:
            raise AdaInferError(sentence)


def check_tolerance(request: CalibrationRequest) -> None:
    """Check that a policy can promise the probabilities that `request` asks for.

    Raises:
        AdaInferError: it cannot.

    """
    options = request.options
    refusals = [
        (
            options.max_tokens > 1,
            "--tolerance is for the probabilities of one token: drop --max-tokens or --tolerance",
        ),
        (
            request.probe not in ("auto", "label-head"),
            f"--tolerance needs the scores of a label-head, and --probe {request.probe} has none: "
            "drop --probe or --tolerance",
        ),
        (
            options.risk == "accuracy",
            "--tolerance bounds how far probabilities move, --risk accuracy the accuracy lost, and "
            "a policy has one bound: drop one of them",
        ),
        (
            options.classifier in ("rbf", "boosting"),
            f"--classifier {options.classifier} is a table over probabilities, and --tolerance "
            "reads log-odds: use svm, logreg, threshold or crf",
        ),
    ]
    for refused, sentence in refusals:
        if refused:
            raise AdaInferError(sentence)


def groups_of(examples: Sequence[Example]) -> Ints:
    """[prompts], numbers of the groups that came together; most prompts come alone."""
    return numbered(
        [index if one.group is None else one.group for index, one in enumerate(examples)]
    )


def choose_probe(asked: ProbeChoice, labels: Sequence[object]) -> ProbeKind:
    """The probe asked for, or the default for these labels.

    Raises:
        AdaInferError: a label head without labels.

    """
    if asked == "auto":
        return "label-head" if labels else "lens"
    if asked == "label-head" and not labels:
        raise AdaInferError("--probe label-head needs --labels, such as --labels negative,positive")
    return asked


def check_rows(split: Split, options: PolicyOptions, data: str) -> None:
    """Check that the held-out half could certify the bound if not one answer differed.

    Raises:
        AdaInferError: it has too few rows; the message says how many are needed.

    """
    together, rows = split.most_together(split.groups), len(split.certify)
    groups = split.groups[split.certify] if together > 1 else None
    bound = options.bounds(groups, together)
    if bound.holds(np.zeros(rows), options.epsilon):
        return
    needed, what = bound.groups_needed(rows, options.epsilon), "rows"
    if together > 1:
        what = f"groups of requests that came together (of up to {together})"
    raise AdaInferError(
        f"too few rows for the bound: epsilon {options.epsilon:g} at delta {options.delta:g} needs "
        f"at least {2 * needed - 1} {what} (half of them held out), but {data} has "
        f"{split.groups.max(initial=-1) + 1}: give more rows or raise --epsilon"
    )


def check_questions(examples: Sequence[Example], options: PolicyOptions, data: str) -> None:
    """Check that a question could be certified on its own if not one answer differed.

    Raises:
        AdaInferError: none can be recognised, or none has prompts enough.

    """
    known = ends_of(examples)
    if not known:
        raise AdaInferError(
            f"no question of {data} can be recognised by the end of its prompts: one needs {SEEN} "
            "prompts that end with it, and that no prompt of another ends with it; or drop --by"
        )
    together = Counter(
        (example.question, group)
        for example, group in zip(examples, groups_of(examples).tolist(), strict=True)
        if example.question in known
    )
    bound = options.bounds(together=max(together.values()))
    needed = 2 * bound.groups_needed(1, options.epsilon)
    [(_, most)] = Counter(question for question, _ in together).most_common(1)
    if most < needed:
        what = "prompts" if bound.longest == 1 else "groups of requests that came together"
        raise AdaInferError(
            f"too few rows for a bound by question: epsilon {options.epsilon:g} at delta "
            f"{options.delta:g} needs about {needed} {what} of each (half of them held out), but "
            f"the commonest in {data} has {most}: give more rows, raise --epsilon or drop --by"
        )


def right_tokens(examples: list[Example], labels: tuple[Label, ...], tokenizer: Any) -> RightTokens:
    """For each prompt, the first token of its label.

    Raises:
        AdaInferError: a row has no label.

    """
    ids = {label.name: label.token_id for label in labels}
    # Of choices: the label of one that no first token decides is never the answer.
    right: list[set[int]] = []
    for example in examples:
        if example.label is None:
            raise AdaInferError(
                f"{example.place} has no label, but --risk accuracy needs one in every row: label "
                "the rows (see --label-field) or bound the disagreement"
            )
        if example.labels is not None:
            right.append({int(example.label)})
        elif labels:
            right.append({ids[example.label]} if example.label in ids else set())
        else:
            right.append({first_token(example.text, example.label, tokenizer)})
    return right
