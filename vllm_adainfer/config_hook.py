"""vLLM's config hook: applies the engine switch to the engine and the frontend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vllm_adainfer.engine.compat.processes import end_with_starter
from vllm_adainfer.engine.compat.stats import use_stat_loggers
from vllm_adainfer.engine.startup.bundled_policy import use_bundled_policy
from vllm_adainfer.engine.startup.configure import configure, configure_scheduler
from vllm_adainfer.frontend.request_check import use_check
from vllm_adainfer.frontend.stat_logger import WithExitStats
from vllm_adainfer.settings.engine import read_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class ConfigHook(VerifyAndUpdateConfig):
    """The hook of one architecture; `model_class` is empty for one without exit points."""

    model_class = ""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Run vLLM's own hook, then configure ours if the switch is on.

        With ``--api-server-count``, it runs in each of these.
        """
        super().verify_and_update_config(vllm_config)
        use_bundled_policy(vllm_config)
        settings = read_settings(vllm_config.additional_config)
        if settings is None:
            return
        end_with_starter()
        if not settings.runs_stock:
            admission = configure(vllm_config, settings, cls.model_class)
            if vllm_config.model_config.runner_type == "generate":  # others take no processors
                vllm_config.model_config.logits_processors = [use_check(admission)]
        tells = settings.finishes_choices or settings.drafts_structure or settings.auto is not None
        if tells or not settings.runs_stock:
            use_stat_loggers(WithExitStats)
        configure_scheduler(vllm_config, settings)


def config_hook(stock: type | None, model_class: str) -> type[ConfigHook]:
    """Our hook for an architecture; it runs vLLM's own, `stock`, first."""
    bases = (ConfigHook,) if stock is None else (ConfigHook, stock)
    return type("AdaInferConfigHook", bases, {"model_class": model_class})


def is_config_hook(hook: Any) -> bool:
    """Whether `register` has already installed this hook."""
    return isinstance(hook, type) and issubclass(hook, ConfigHook)
