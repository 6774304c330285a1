"""Whether an engine's scheduler ends a request with a choice once one choice is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_adainfer.settings.engine import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LOOKING_AHEAD = ("auto", "xgrammar", "guidance")  # backends whose grammar tells what it would take


def why_choices_go_on(vllm_config: VllmConfig, settings: Settings) -> str | None:
    """Why requests with a choice take vLLM's steps, None if they end early.

    Such a request cannot leave early for good: its next token would run what was skipped.
    """
    if not settings.finishes_choices:
        return '"finish_choices" is off'
    grammars = vllm_config.structured_outputs_config
    if grammars.reasoning_parser:
        return "the grammar of a server with a reasoning parser begins after the thoughts"
    if grammars.backend not in LOOKING_AHEAD:
        return f"the structured outputs backend {grammars.backend} cannot look ahead"
    if vllm_config.model_config.return_sampling_mask:
        return "masks of sampled tokens are returned, and what is appended has none"
    return None
