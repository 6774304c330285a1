"""The prompts of a classifier, in whatever form its data have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.batch_files import are_requests
from vllm_adainfer.offline.calibration.data.examples import (
    Example,
    Row,
    make_examples,
    read_template,
)
from vllm_adainfer.offline.calibration.data.pairs import Pairs, are_pairs, read_pairs
from vllm_adainfer.offline.calibration.data.score_requests import read_score_requests


def read_scored(
    rows: Sequence[Row],
    tokenizer: Any,
    hf_config: Any,
    template: str | None,
    chat_template: str | None,
    label_field: str,
    longest: int,
) -> list[Example]:
    """The prompts of a classifier: requests, pairs, or rows for a `template`; see `make_examples`.

    Raises:
        AdaInferError: as `read_score_requests`, `read_pairs` and `make_examples`; or a template is
            for another form.

    """
    if are_requests(rows):
        if template is not None:
            raise AdaInferError(
                "the data hold requests, which bring their prompts: drop --template"
            )
        pairs = Pairs.of(tokenizer, hf_config, chat_template)
        return read_score_requests(rows, pairs, hf_config.vocab_size, longest)
    if not are_pairs(rows):
        if chat_template is not None:
            raise AdaInferError(
                "--chat-template joins queries with documents, and the data hold none: drop it"
            )
        return make_examples(rows, tokenizer, read_template(template), label_field, longest)
    if template is not None:
        raise AdaInferError(
            "the data hold queries with documents, which a --chat-template joins, as it does on "
            "the server: drop --template"
        )
    return read_pairs(rows, tokenizer, hf_config, chat_template, longest)
