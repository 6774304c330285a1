"""vLLM's request ids."""

from __future__ import annotations

import re


def client_request_id(request_id: str) -> str:
    """The id that the client sent.

    vLLM 0.32 appends a dash and eight random hex digits (`InputProcessor.assign_request_id`, unless
    ``VLLM_DISABLE_REQUEST_ID_RANDOMIZATION`` is set).
    """
    return re.sub(r"-[0-9a-f]{8}$", "", request_id)


def request_group(request_id: str) -> str | None:
    """The id of the HTTP request that an engine request is part of; None if it is not a part.

    vLLM 0.32 makes an engine request of each prompt, item or question of an HTTP request, and names
    it by that request's id, a dash and a number (`next_token_label_reads`,
    `OpenAIServingCompletion.create_completion`).
    """
    group, dash, part = client_request_id(request_id).rpartition("-")
    made_of_parts = group.startswith(("cmpl-", "decision-", "generative-scoring-"))
    return group if dash and part.isdecimal() and made_of_parts else None
