"""The prompts to record: read from rows for a template or from requests, and split in halves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact.fields import Label, SharedTokens
from vllm_adainfer.artifact.files import check_writable
from vllm_adainfer.artifact.kinds import ProbeKind
from vllm_adainfer.artifact.outputs import AnyOutput, LabelPool, Labels, Scores, Tokens
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.batch_files import are_requests
from vllm_adainfer.offline.calibration.data.choices import (
    common_choices,
    find_choices,
    with_labels,
)
from vllm_adainfer.offline.calibration.data.examples import (
    Example,
    check_labels_known,
    find_labels,
    first_token,
    read_rows,
    read_template,
    shared_start,
)
from vllm_adainfer.offline.calibration.data.label_pool import common_labels, pool_of
from vllm_adainfer.offline.calibration.data.objects import Schema, common_schema, read_schema
from vllm_adainfer.offline.calibration.data.read_examples import read_examples
from vllm_adainfer.offline.calibration.data.score_labels import (
    score_columns,
    score_head_of,
    score_labels,
)
from vllm_adainfer.offline.calibration.data.shared import pooled_from, shared_tokens
from vllm_adainfer.offline.calibration.data.split import Split
from vllm_adainfer.offline.calibration.data.student_base import (
    StudentBase,
    load_student_base,
)
from vllm_adainfer.offline.calibration.enough_rows import (
    check_fields,
    check_labels,
    check_questions,
    check_rows,
    split_examples,
)
from vllm_adainfer.offline.calibration.options import (
    CalibrationRequest,
    check_classifier,
    check_objects,
    check_options,
)
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.offline.progress import say
from vllm_adainfer.policy.guesser import Guesser
from vllm_adainfer.promise.accuracy import RightTokens
from vllm_adainfer.promise.promise import Unit

PREFIX_BLOCK = 16  # tokens of a block in the prefix cache; vLLM's default on GPUs


@dataclass(frozen=True)
class Prompts:
    """The prompts to record, in random order.

    Attributes:
        examples: the prompts.
        output: what is asked for.
        split: the prompts that fit, and those that certify.
        hf_config: the model's config.
        probe: the kind of probe.
        right: the right tokens by prompt, if the risk is of accuracy.
        pooled_from: the position from which on pooled heads read the prompts; None for others.
        student: the encoder to train, and the prompts as it reads them; None without a student.
        shared: the tokens that all prompts that fit begin and end with.
        schema: that of the objects that are asked for; None for other answers. What the model
            writes for their values, `output`, is known once they are recorded.
        tokenizer: the model's.
        guesser: what guesses objects; likewise.

    """

    examples: list[Example]
    output: AnyOutput
    split: Split
    hf_config: Any
    probe: ProbeKind
    right: RightTokens | None
    pooled_from: int | None = None
    student: StudentBase | None = None
    shared: SharedTokens = field(default_factory=SharedTokens)
    schema: Schema | None = None
    tokenizer: Any = None
    guesser: Guesser | None = None


def load_prompts(request: CalibrationRequest) -> Prompts:
    """Check the request, and read its data.

    An AdaInferError if the input, the model or the number of rows does not allow it.
    """
    check_writable(request.output)
    options, rows, data = request.options, read_rows(request.data), str(request.data)
    holds_requests = are_requests(rows)
    hf_config, tokenizer = load_config_and_tokenizer(request.model, request.hf_overrides)
    most = hf_config.max_position_embeddings - options.max_tokens
    output: AnyOutput = Tokens(candidates="shortlist" if options.max_tokens > 1 else "full")
    schema = None if request.schema is None else read_schema(request.schema)
    classifies = (head := score_head_of(hf_config)) is not None
    if head is not None:
        check_classifier(request, score_columns(hf_config), head == "sigmoids")
        names = tuple(label.name for label in score_labels(hf_config))
        output, request = Scores(score_head=head, classes=names), replace(request, labels=names)
    check_options(request, holds_requests and not classifies, classifies)
    if not holds_requests and not classifies:
        check_rows(Split.halves(len(rows)), options, data)
    examples = read_examples(
        rows,
        tokenizer,
        hf_config,
        request.template,
        request.chat_template,
        request.label_field,
        most,
    )
    if holds_requests and not classifies:
        examples, schema = common_schema(examples, schema, data)
    if schema is not None:
        check_objects(request)
    elif classifies:
        check_labels_known(examples, output.labels)
    else:
        examples, answers = _answers(
            request, examples, tokenizer, hf_config.vocab_size, holds_requests
        )
        output = answers or output
    labels = output.labels if schema is None else schema.labels
    check_labels(options, labels)
    check_fields(options, {} if schema is None else schema.fields)
    examples, split = split_examples(examples, options, data)
    fitting = [examples[index] for index in split.fit]
    template = None if holds_requests else read_template(request.template)
    shared = shared_tokens(fitting, tokenizer, template)
    probe: ProbeKind
    shortest = min(examples, key=lambda example: len(example.token_ids))
    alone = len(shortest.token_ids) == 1  # nothing is left of it without the first token
    if request.probe == "auto":
        by_last_token = alone or (
            options.promise.unit is Unit.QUERY and begin_alike(fitting, split.groups[split.fit])
        )
        label_head: ProbeKind = "label-head" if by_last_token else "pooled-label-head"
        probe = label_head if labels else "lens"
    else:
        probe = "pooled-label-head" if request.probe == "branch" else request.probe
    if probe == "pooled-label-head" and alone:
        raise AdaInferError(
            f"{shortest.place}: a {request.probe} leaves out the first token of a prompt, and "
            "this one has no other: use --probe label-head, or give a --template"
        )
    right = right_tokens(examples, labels, tokenizer) if options.promise.reads_right else None
    student = None
    if request.student is not None:
        student = load_student_base(request.student, examples, tokenizer, shared)
    return Prompts(
        examples,
        output,
        split,
        hf_config,
        probe,
        right,
        pooled_from(fitting, len(shortest.token_ids)) if probe == "pooled-label-head" else None,
        student,
        shared,
        schema,
        tokenizer,
    )


def begin_alike(examples: Sequence[Example], groups: Ints) -> bool:
    """Whether documents of a query begin with a block that the prefix cache of a server may keep.

    Heads that read whole prompts would then decide the first document, and those for the last token
    the others, and a query that mixes them has no bound of its own.
    """
    queries = [np.flatnonzero(groups == one) for one in np.unique(groups)]
    prompts = [[examples[row].token_ids for row in rows] for rows in queries if len(rows) > 1]
    shared = max(map(shared_start, prompts))
    if shared < PREFIX_BLOCK:
        return False
    say(
        f"documents of a query begin with up to {shared} equal tokens, which a server may keep in "
        "its prefix cache: label-heads decide them all alike, by the last token; --probe "
        "pooled-label-head reads whole prompts, for servers with larger blocks or without the cache"
    )
    return True


def _answers(
    request: CalibrationRequest,
    examples: list[Example],
    tokenizer: Any,
    vocabulary: int,
    are_requests: bool,
) -> tuple[list[Example], AnyOutput | None]:
    """The prompts whose answers are calibrated, and what they ask for; None for any token."""
    texts = () if request.label_pool else request.choices
    if are_requests and request.label_pool:
        examples = [example for example in examples if example.choices is None]
        if not examples:
            raise AdaInferError(
                "all requests have structured_outputs.choice and none names labels: drop "
                "--label-pool"
            )
    elif are_requests:
        examples, texts = common_choices(examples, texts)
        check_options(replace(request, choices=texts), holds_requests=True)
    if are_requests and request.options.by_question:
        check_questions(examples, request.options, str(request.data))
    if request.label_pool:
        return examples, LabelPool(labels=pool_of(request.label_pool, examples, tokenizer))
    if texts:
        output = find_choices(texts, tokenizer, vocabulary)
        return with_labels(examples, texts), output
    if are_requests:
        return examples, Labels(labels=common_labels(examples, tokenizer))
    if not request.labels:
        return examples, None
    labels = find_labels(request.labels, examples[0], tokenizer)
    check_labels_known(examples, labels)
    return examples, Labels(labels=labels)


def right_tokens(
    examples: Sequence[Example], labels: tuple[Label, ...], tokenizer: Any
) -> RightTokens:
    """For each prompt, the first token of its label.

    An AdaInferError if a row has no label.
    """
    ids = {label.name: label.token_id for label in labels}
    right: list[set[int]] = []
    for example in examples:
        if example.label is None:
            raise AdaInferError(
                f"{example.place} has no label, but --risk accuracy needs one in every row: label "
                "the rows (see --label-field) or bound the disagreement"
            )
        if example.labels is not None:
            right.append({int(example.label)})
        elif labels:  # a choice that no first token decides is never the answer
            right.append({ids[example.label]} if example.label in ids else set())
        else:
            right.append({first_token(example.text, example.label, tokenizer)})
    return right
