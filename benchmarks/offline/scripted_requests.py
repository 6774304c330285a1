"""Random prompts, and sampling parameters that name the exit point."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vllm_adainfer.policy.script import SCRIPT_LABELS
from vllm_adainfer.settings.instruments import SCRIPT_ARG

if TYPE_CHECKING:
    from vllm import SamplingParams


def random_prompts(batch: int, length: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """`batch` random prompts of `length` tokens, identical in every call."""
    ids = np.random.default_rng(length * batch).integers(2, vocabulary, (batch, length))
    return [{"prompt_token_ids": row.tolist()} for row in ids]


def scripted_request(layer: int | None, tokens: int = 1) -> SamplingParams:
    """Parameters for `tokens` label tokens; a scripted engine exits after `layer` (None: never)."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        allowed_token_ids=list(SCRIPT_LABELS),
        extra_args=None if layer is None else {SCRIPT_ARG: layer},
    )
