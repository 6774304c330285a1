"""Policies that an engine cannot serve as it is configured, each with what to set instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.engine import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def refuse_policy(
    name: str, config: ArtifactConfig, vllm_config: VllmConfig, settings: Settings
) -> None:
    """Refuse a policy that this engine cannot serve, in a sentence that says why."""
    sentence = next(_why_not_served(config, vllm_config, settings), None)
    if sentence is not None:
        raise AdaInferError(f"vllm-adainfer: policy {name} {sentence}")


def _why_not_served(
    config: ArtifactConfig, vllm_config: VllmConfig, settings: Settings
) -> Iterator[str]:
    model = vllm_config.model_config
    classifies = model.runner_type == "pooling"
    if (config.score_head is not None) != classifies:
        asked, served = ("tokens", "scores") if classifies else ("scores", "tokens")
        yield (
            f"decides {asked}, and this engine answers with {served}: calibrate the model as you "
            'serve it (see --runner and --convert), or drop "adainfer" from additional_config'
        )
    if settings.requests == "known" and not config.questions:
        yield (
            "knows no question: calibrate it on requests whose prompts end with their question, or "
            'drop "requests": "known" from additional_config'
        )
    if config.student is not None and model.skip_tokenizer_init:
        yield (
            "has a student, which reads the text of prompts: drop --skip-tokenizer-init, or "
            "calibrate without --student"
        )
    if config.top_k is not None and settings.compares and has_replicas(vllm_config):
        yield (
            "promises which documents of a query come first, and --data-parallel-size spreads the "
            "documents of a query over engines, none of which can compare its order: start each "
            'replica as a server of its own, or drop "shadow_rate"'
        )


def has_replicas(vllm_config: VllmConfig) -> bool:
    """Whether several engines share the requests of a server."""
    size: int = vllm_config.parallel_config.data_parallel_size
    return size > 1
