"""The probabilities of the fields of JSON answers, for the audit."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from vllm_adainfer.drafts.fields import Fields, Token, fields_of, probabilities

if TYPE_CHECKING:
    from vllm.v1.request import Request

LONGEST_SCHEMA = 1 << 16  # characters
KNOWN_SCHEMAS = 128
MOST_TOKENS = 512  # of an answer whose log-probabilities are kept
DIGITS = 4  # of a probability


class Decisions:
    """An answer with decisions: its `fields`, and its tokens' log-probabilities so far."""

    def __init__(self, fields: Fields) -> None:
        """`fields` are those of its schema."""
        self.fields = fields
        self.rows: list[tuple[Any, Any]] = []  # token ids and log-probabilities, by token

    def add(self, logprobs: Any) -> None:
        """Add those of the tokens of a step, as in `Step.logprobs`."""
        if logprobs is not None and len(self.rows) < MOST_TOKENS:
            ids, values = logprobs.logprob_token_ids, logprobs.logprobs
            self.rows += zip(ids.copy(), values.copy(), strict=True)


def requested_fields(request: Request) -> Fields:
    """The fields with few values of the schema that a request with ``logprobs`` asks for."""
    params, structured = request.sampling_params, request.structured_output_request
    if params is None or structured is None or params.logprobs is None or params.logprobs < 0:
        return {}
    kind, schema = structured.structured_output_key
    return _fields_in(schema) if kind.name == "JSON" and len(schema) <= LONGEST_SCHEMA else {}


@lru_cache(KNOWN_SCHEMAS)
def _fields_in(schema: str) -> Fields:
    try:
        return fields_of(json.loads(schema))
    except RecursionError:  # it nests deeper than any field that is looked for
        return {}


def with_fields(line: dict[str, Any], decisions: Decisions, tokenizer: Any) -> dict[str, Any]:
    """The audit's `line`, with the probabilities of each field's values. It takes a while."""
    answer = []
    for ids, values in decisions.rows:
        texts = map(tokenizer.decode, ids[:, None].tolist())
        sampled, *others = zip(texts, values.tolist(), strict=True)
        answer.append(Token(*sampled, dict(others)))
    found = probabilities(answer, decisions.fields)
    rounded = {
        field: {value: round(share, DIGITS) for value, share in shares.items()}
        for field, shares in found.items()
    }
    return {**line, "fields": rounded} if rounded else line
