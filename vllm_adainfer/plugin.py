"""Entry point of the group ``vllm.general_plugins``: registers our models and config hooks."""

from __future__ import annotations

from vllm_adainfer.engine.classes import MODELS, model_class_of


def register() -> None:
    """Register our classes with vLLM; runs in every process, any number of times.

    Stock registry entries stay as they are: an engine whose ``additional_config`` has no
    ``adainfer`` key builds vLLM's own model, worker and scheduler.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_adainfer.config_hook import config_hook, is_config_hook

    for ours in set(MODELS.values()):
        ModelRegistry.register_model(ours.rpartition(":")[2], ours)
    # vLLM looks up the documented hook by architecture. Every architecture gets one, so that the
    # switch is refused, not ignored, on a model without exit points. Some architectures that vLLM
    # 0.32 derives from others (`--convert classify`) have a hook but no registry entry.
    for architecture in {*ModelRegistry.get_supported_archs(), *MODELS_CONFIG_MAP}:
        hook = MODELS_CONFIG_MAP.get(architecture)
        if not is_config_hook(hook):
            MODELS_CONFIG_MAP[architecture] = config_hook(hook, model_class_of(architecture))
