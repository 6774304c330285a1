"""A policy that a model's directory carries: stock ``vllm serve`` finds it without a flag."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_adainfer.artifact.source import bundled
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.settings.engine import CONFIG_KEY, is_killed

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = get_logger(__name__)


def use_bundled_policy(vllm_config: VllmConfig) -> None:
    """Set the switch to the artifact bundled with the model, if there is one and no switch.

    A hub id is no directory, and this hook runs before vLLM downloads what one names.
    """
    config, folder = vllm_config.additional_config, bundled(vllm_config.model_config.model)
    if folder is None or not isinstance(config, dict) or CONFIG_KEY in config or is_killed():
        return
    logger.info(
        "AdaInfer found the policy %s beside the weights; VLLM_ADAINFER=0, or "
        '--additional-config \'{"adainfer": {"enabled": false}}\', serves without it',
        folder,
    )
    vllm_config.additional_config = {**config, CONFIG_KEY: {"artifact": str(folder.absolute())}}
