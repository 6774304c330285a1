"""vLLM's logging."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.logger import _VllmLogger as VllmLogger


def get_logger(module: str) -> VllmLogger:
    """A logger below ``vllm.``, the only name that vLLM 0.32 configures; others drop INFO lines."""
    return init_logger(module.replace("vllm_adainfer", "vllm.adainfer", 1))
