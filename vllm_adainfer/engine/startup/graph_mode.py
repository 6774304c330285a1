"""The CUDA graphs that vLLM captures in the end, whatever made it choose them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.errors import AdaInferError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = get_logger(__name__)


def check_graph_mode(vllm_config: VllmConfig) -> None:
    """Refuse graphs of the whole model; warn if there are none.

    For a worker, whose config no hook and no default of vLLM changes any more.
    """
    from vllm.config import CUDAGraphMode

    mode = vllm_config.compilation_config.cudagraph_mode
    if mode.has_full_cudagraphs():
        raise AdaInferError(
            f"vllm-adainfer: vLLM has chosen CUDA graphs of the whole model ({mode}), in "
            "which no request can leave: drop the passes and splitting_ops that you set in "
            '--compilation-config, or drop "adainfer" from additional_config'
        )
    if mode == CUDAGraphMode.NONE and vllm_config.model_config.runner_type == "generate":
        logger.warning(
            "CUDA graphs are off (by --enforce-eager, -O0, or a mode in --compilation-config), so "
            "decode steps run without graphs of segments: small models generate more slowly"
        )
