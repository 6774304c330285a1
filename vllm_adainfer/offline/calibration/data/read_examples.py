"""The prompts of a data file, in whatever form it has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.batch_files import are_requests, read_requests
from vllm_adainfer.offline.calibration.data.examples import (
    Example,
    Row,
    make_examples,
    read_template,
)
from vllm_adainfer.offline.calibration.data.pairs import Pairs, are_pairs, read_pairs
from vllm_adainfer.offline.calibration.data.score_labels import is_classifier
from vllm_adainfer.offline.calibration.data.score_requests import read_score_requests


def read_examples(
    rows: Sequence[Row],
    tokenizer: Any,
    hf_config: Any,
    template: str | None,
    chat_template: str | None,
    label_field: str,
    longest: int,
) -> list[Example]:
    """The prompts of rows for a `template` (see `make_examples`), of requests, or of pairs.

    An AdaInferError if a row is malformed or a prompt too long, or a template is for another form.
    """
    vocabulary, scores = hf_config.vocab_size, is_classifier(hf_config)
    if are_requests(rows):
        if not scores:
            return read_requests(rows, tokenizer, vocabulary, longest)
        if template is not None:
            raise AdaInferError(
                "the data hold requests, which bring their prompts: drop --template"
            )
        pairs = Pairs.of(tokenizer, hf_config, chat_template)
        return read_score_requests(rows, pairs, vocabulary, longest)
    if scores and are_pairs(rows):
        if template is not None:
            raise AdaInferError(
                "the data hold queries with documents, which a --chat-template joins, as it does "
                "on the server: drop --template"
            )
        return read_pairs(rows, Pairs.of(tokenizer, hf_config, chat_template), longest)
    if scores and chat_template is not None:
        raise AdaInferError(
            "--chat-template joins queries with documents, and the data hold none: drop it"
        )
    return make_examples(rows, tokenizer, read_template(template), label_field, longest)
