"""The prompts of an evaluation, and which of their answers are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.requested import Form, Output
from vllm_adainfer.drafts.schemas import digest_of
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.batch_files import are_requests
from vllm_adainfer.offline.calibration.data.choices import common_choices, find_choices, with_labels
from vllm_adainfer.offline.calibration.data.examples import (
    Example,
    check_labels_known,
    find_labels,
    read_rows,
)
from vllm_adainfer.offline.calibration.data.read_examples import read_examples
from vllm_adainfer.offline.calibration.prompts import right_tokens
from vllm_adainfer.offline.evaluation.sequences import Tokens, has_number, is_number
from vllm_adainfer.offline.pretrained import Model


def load_examples(
    data: Path,
    template: str | None,
    chat_template: str | None,
    label_field: str,
    labels: Sequence[str],
    config: ArtifactConfig,
    model: Model,
    longest: int,
    schema: str | None = None,
) -> list[Example]:
    """The tokenised prompts of a data file, of at most `longest` tokens.

    `schema` is that of the objects of the artifact; None if it is for other answers.
    An AdaInferError if the file is not readable, or its prompts or the user's options, such as
    `labels`, do not fit the artifact of `config`.
    """
    rows, tokenizer, scores = read_rows(data), model.tokenizer, config.score_head is not None
    choices, names = ([one.text for one in config.choices], [one.name for one in config.labels])
    holds_requests = are_requests(rows) and not scores
    if scores and labels:
        raise AdaInferError(
            "the artifact is for a classifier, which brings its labels: drop --labels"
        )
    if not scores and chat_template is not None:
        raise AdaInferError(
            "--chat-template joins the queries and documents of a reranker, and the artifact is "
            "for a model that generates: drop it"
        )
    if (choices or schema is not None) and labels:
        what = "choices" if choices else "objects"
        raise AdaInferError(f"the artifact is for {what}, which it names itself: drop --labels")
    if holds_requests and (template is not None or labels or config.max_tokens > 1):
        raise AdaInferError(
            f"{data} holds requests, which bring their prompts, labels and one token each: "
            "drop --template and --labels, and use an artifact for labels"
        )
    examples = read_examples(
        rows, tokenizer, model.hf_config, template, chat_template, label_field, longest
    )
    if schema is not None:
        return _for_the_object(examples, schema, holds_requests, data)
    if choices:
        if holds_requests:
            examples, _ = common_choices(examples, choices)
        if find_choices(choices, tokenizer, config.vocab_size).choices != config.choices:
            raise AdaInferError(
                "this model's tokenizer writes the choices with other tokens than at calibration: "
                "use the model of the calibration"
            )
        return with_labels(examples, choices)
    if holds_requests:
        _check_requests_served(config, examples, tokenizer)
        return examples
    if names and labels and set(labels) != set(names):
        raise AdaInferError(
            f"--labels {','.join(labels)} are not those of the artifact: {','.join(names)}"
        )
    if names and not scores and find_labels(names, examples[0], tokenizer) != config.labels:
        raise AdaInferError(
            "after this prompt the labels begin with other tokens than at calibration: use the "
            "template and the model of the calibration"
        )
    if names:
        check_labels_known(examples, config.labels)
    return examples


def _for_the_object(
    examples: Sequence[Example], schema: str, holds_requests: bool, data: Path
) -> list[Example]:
    """The prompts that ask for the object of `schema`: rows all do, requests as they say."""
    if not holds_requests:
        return [replace(example, schema=schema) for example in examples]
    digest = digest_of(schema)
    found = [one for one in examples if one.schema and digest_of(one.schema) == digest]
    if not found:
        raise AdaInferError(
            f"no request of {data} asks for an object with the schema of the artifact"
        )
    return found


def _check_requests_served(
    config: ArtifactConfig, examples: Sequence[Example], tokenizer: Any
) -> None:
    for example in examples:
        labels = example.labels or ()
        if not Output(Form.TOKEN, frozenset(labels)).is_promised_by(config):
            raise AdaInferError(
                f"{example.place} is about the labels "
                f"{', '.join(map(repr, map(tokenizer.decode, labels)))}, which this policy does "
                "not serve: calibrate with --label-pool"
            )


def right_answers(
    examples: Sequence[Example],
    config: ArtifactConfig,
    tokenizer: Any,
    max_tokens: int,
    texts: Sequence[Tokens],
) -> list[bool] | None:
    """Which of `texts` are right, by the label's first token or by a text's last number.

    None if a row has no label, or if texts are generated and a label is not a number.
    """
    if config.objects is not None:
        return None  # a row's label says nothing of a whole object
    answers = [str(example.label) for example in examples if example.label is not None]
    if len(answers) < len(examples):
        return None
    if max_tokens > 1 and not config.choices:
        if not all(map(is_number, answers)):
            return None
        return [*map(has_number, map(tokenizer.decode, texts), answers)]
    if config.choices:
        written = {choice.text: choice.token_ids for choice in config.choices}
        return [tuple(text) == written[one] for text, one in zip(texts, answers, strict=True)]
    right = right_tokens(examples, config.labels, tokenizer)
    return [set(text) == tokens for text, tokens in zip(texts, right, strict=True)]
