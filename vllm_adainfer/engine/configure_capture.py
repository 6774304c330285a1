"""Config time: have the requests of an engine captured, or refuse it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_adainfer.config import Capture
from vllm_adainfer.engine.capture_files import check_directory
from vllm_adainfer.engine.compat import get_logger
from vllm_adainfer.engine.configure import SCHEDULER
from vllm_adainfer.errors import AdaInferError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = get_logger(__name__)


def configure_capture(vllm_config: VllmConfig, capture: Capture) -> None:
    """Check the directory, select our scheduler, and say that users' data goes to disk.

    Raises:
        AdaInferError: files cannot be made there, or the engine has another scheduler.

    """
    if vllm_config.scheduler_config.scheduler_cls not in (None, SCHEDULER):
        raise AdaInferError(
            "vllm-adainfer: requests are captured by our scheduler, which a custom --scheduler-cls "
            'replaces: drop it, or drop "capture" from additional_config'
        )
    if vllm_config.model_config.is_diffusion:
        raise AdaInferError(
            "vllm-adainfer: a diffusion model has a scheduler of its own, which captures nothing: "
            'drop "capture" from additional_config'
        )
    check_directory(capture.directory)
    vllm_config.scheduler_config.scheduler_cls = SCHEDULER
    logger.warning("%s", notice(capture))


def notice(capture: Capture) -> str:
    """The log line that says what is captured."""
    return (
        f"AdaInfer captures {capture.rate:.3g} of the requests, the latest {capture.limit} of each "
        f"engine, in {capture.directory}: these are users' data on disk; drop "
        '"capture" from additional_config to capture none'
    )
