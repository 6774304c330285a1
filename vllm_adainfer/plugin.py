"""Entry point of the ``vllm.general_plugins`` group: what vLLM learns from us."""

from __future__ import annotations

from vllm_adainfer.engine.classes import MODELS


def register() -> None:
    """Tell vLLM about our classes; runs in every process, any number of times.

    Stock registry entries stay: an engine whose ``additional_config`` has no ``adainfer`` key
    builds vLLM's own model, worker and scheduler.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_adainfer.config_hook import config_hook, is_config_hook

    for ours in set(MODELS.values()):
        ModelRegistry.register_model(ours.rpartition(":")[2], ours)
    # The documented hook is asked by architecture. Every architecture gets one, so that the
    # switch is refused, not ignored, on a model without exit points. Some that vLLM 0.32 makes of
    # others (`--convert classify`) are not in its registry, and have a hook.
    for architecture in {*ModelRegistry.get_supported_archs(), *MODELS_CONFIG_MAP}:
        hook = MODELS_CONFIG_MAP.get(architecture)
        if not is_config_hook(hook):
            model_class = MODELS.get(architecture, "").rpartition(":")[2]
            MODELS_CONFIG_MAP[architecture] = config_hook(hook, model_class)
