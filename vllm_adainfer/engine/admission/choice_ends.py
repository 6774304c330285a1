"""Whether a request with a choice ends once one choice is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_adainfer.settings.engine import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Structured outputs backends whose grammars can tell whether they would accept further tokens.
LOOKAHEAD_BACKENDS = ("auto", "xgrammar", "guidance")


def why_choices_run_on(vllm_config: VllmConfig, settings: Settings) -> str | None:
    """Why vLLM samples a choice to its last token; None if requests end once one choice is left."""
    if not settings.finishes_choices:
        return '"finish_choices" is off'
    grammars = vllm_config.structured_outputs_config
    if grammars.reasoning_parser:
        return "the grammar of a server with a reasoning parser begins after the reasoning"
    if grammars.backend not in LOOKAHEAD_BACKENDS:
        return f"the structured outputs backend {grammars.backend} cannot look ahead"
    if vllm_config.model_config.return_sampling_mask:
        return "sampling masks are returned, and the tokens appended would have none"
    return None
