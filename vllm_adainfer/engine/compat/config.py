"""vLLM's config, and what vLLM derives from it."""

from __future__ import annotations

import importlib.metadata
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def use_model_class(vllm_config: VllmConfig, architecture: str) -> None:
    """Make the loader build `architecture`, for this engine only.

    vLLM 0.32 resolves the class from ``hf_config.architectures`` when it loads the weights
    (`model_loader/utils.py`), so the stock class can stay in the registry.
    """
    vllm_config.model_config.hf_config.architectures = [architecture]


def leave_full_graphs_to_segments(vllm_config: VllmConfig) -> None:
    """Make vLLM's own CUDA graphs piecewise.

    vLLM 0.32 replays a full graph, which holds the whole model, without calling the model, so no
    request could exit. Decode steps get graphs per segment instead, see
    `vllm_adainfer.engine.cuda_graphs.segment_graphs`.
    """
    from vllm.config import CUDAGraphMode

    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode != CUDAGraphMode.NONE:  # or not set yet
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE


def replays_whole_model(vllm_config: VllmConfig) -> bool:
    """Whether vLLM will capture breakable CUDA graphs, and replay them without calling the model.

    vLLM 0.32 decides that after its config hooks (`VllmConfig._maybe_enable_breakable_cudagraph`).
    """
    from vllm import envs

    if "VLLM_USE_BREAKABLE_CUDAGRAPH" in os.environ:
        return envs.VLLM_USE_BREAKABLE_CUDAGRAPH and not vllm_config.model_config.enforce_eager
    by_batch_invariance = vllm_config._uses_breakable_cudagraph_for_batch_invariance
    return bool(envs.VLLM_BATCH_INVARIANT and by_batch_invariance())


def packaged_logits_processors() -> list[str]:
    """The classes of the logits processors that installed packages bring.

    vLLM 0.32 loads them unasked, by the entry point group `LOGITSPROCS_GROUP` of both model
    runners' loaders.
    """
    entries = importlib.metadata.entry_points(group="vllm.logits_processors")
    return [entry.value for entry in entries]


def serves_prompt_logprobs(vllm_config: VllmConfig) -> bool:
    """Whether an engine survives requests for log-probabilities of their prompts.

    On a CPU, vLLM 0.32's LM head with adapters expects one row per request, and raises when it gets
    the rows of a prompt (`punica_cpu.py`, `add_lora_logits`).
    """
    from vllm.platforms import current_platform

    return vllm_config.lora_config is None or not current_platform.is_cpu()
