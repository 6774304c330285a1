"""Config time: select our scheduler for what needs no policy (capture, choices), or refuse it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_adainfer.engine.classes import SCHEDULER
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.scheduler.capture_files import check_directory
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.engine import Capture, Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = get_logger(__name__)


def configure_scheduler(vllm_config: VllmConfig, settings: Settings) -> None:
    """Check the directory of captured requests, and say that users' data goes to disk.

    Raises:
        AdaInferError: files cannot be made there, or the engine has another scheduler.

    """
    if settings.capture is not None:
        _select(vllm_config, "capture")
        check_directory(settings.capture.directory)
        logger.warning("%s", notice(settings.capture))
    if settings.finish_choices:
        _select(vllm_config, "finish_choices")
    if settings.finishes_choices:
        logger.info("AdaInfer ends requests with a choice once only one choice is left")


def _select(vllm_config: VllmConfig, key: str) -> None:
    if vllm_config.scheduler_config.scheduler_cls not in (None, SCHEDULER):
        raise AdaInferError(
            f'vllm-adainfer: "{key}" is done by our scheduler, which a custom --scheduler-cls '
            f'replaces: drop it, or drop "{key}" from additional_config'
        )
    if vllm_config.model_config.is_diffusion:
        raise AdaInferError(
            f'vllm-adainfer: a diffusion model has a scheduler of its own, without "{key}": drop '
            f'"{key}" from additional_config'
        )
    vllm_config.scheduler_config.scheduler_cls = SCHEDULER


def notice(capture: Capture) -> str:
    """The log line that says what is captured."""
    return (
        f"AdaInfer captures {capture.rate:.3g} of the requests, the latest {capture.limit} of each "
        f"engine, in {capture.directory}: these are users' data on disk; drop "
        '"capture" from additional_config to capture none'
    )
