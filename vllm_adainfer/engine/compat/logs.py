"""The logger that vLLM configures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.logger import _VllmLogger as VllmLogger


def get_logger(module: str) -> VllmLogger:
    """A logger below ``vllm.``: vLLM 0.32 configures only that name; others lose INFO lines."""
    return init_logger(module.replace("vllm_adainfer", "vllm.adainfer", 1))
