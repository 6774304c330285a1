"""The ids that vLLM gives requests."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def client_request_id(request_id: str) -> str:
    """The id that the client sent: 0.32 appends a dash and eight random hex digits to it.

    (`InputProcessor.assign_request_id`, unless ``VLLM_DISABLE_REQUEST_ID_RANDOMIZATION`` is set.)
    """
    return re.sub(r"-[0-9a-f]{8}$", "", request_id)


def request_group(request_id: str) -> str | None:
    """What the parts of one HTTP request have in common; None if 0.32 does not make it of parts.

    Each prompt, item or question is a request of its own there, named by the HTTP request's id, a
    dash and a number (`next_token_label_reads`, `OpenAIServingCompletion.create_completion`).
    """
    group, dash, part = client_request_id(request_id).rpartition("-")
    made_of_parts = group.startswith(("cmpl-", "decision-", "generative-scoring-"))
    return group if dash and part.isdecimal() and made_of_parts else None
