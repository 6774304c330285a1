"""vLLM's request ids."""

from __future__ import annotations

RANDOM = "-00000000"  # how long a suffix vLLM appends
HEX = frozenset("0123456789abcdef")
LONGEST = 256  # characters of an id that we keep
MADE_OF_PARTS = ("cmpl-", "decision-", "generative-scoring-", "score-", "classify-", "pooling-")


def client_request_id(request_id: str) -> str:
    """The id that the client sent.

    vLLM 0.32 appends a dash and eight random hex digits (`InputProcessor.assign_request_id`, unless
    ``VLLM_DISABLE_REQUEST_ID_RANDOMIZATION`` is set).
    """
    client, suffix = request_id[: -len(RANDOM)], request_id[-len(RANDOM) :]
    is_random = len(suffix) == len(RANDOM) and suffix[0] == "-" and HEX.issuperset(suffix[1:])
    return client if is_random else request_id


def request_group(request_id: str) -> str | None:
    """The id of the HTTP request that an engine request is part of; None if it is not a part.

    vLLM 0.32 makes an engine request of each prompt, item, question or document of an HTTP request,
    and names it by that request's id, a dash and a number (`next_token_label_reads`,
    `OpenAIServingCompletion.create_completion`, `PoolingServing._prepare_generators`). A client may
    choose an id of any length (``request_id`` in the body); of a long one the end alone counts.
    """
    group, dash, part = short_id(request_id).rpartition("-")
    begins = group if len(request_id) <= LONGEST else request_id
    return group if dash and part.isdecimal() and begins.startswith(MADE_OF_PARTS) else None


def begins_group(request_id: str) -> bool:
    """Whether an engine request is the first of its HTTP request: vLLM 0.32 sends them in order."""
    return short_id(request_id).endswith("-0")


def short_id(request_id: str) -> str:
    """The id that the client sent; of a long one its end."""
    return client_request_id(request_id[-LONGEST:])
