"""vLLM's config, and what vLLM derives from it."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
from typing import TYPE_CHECKING, Any

from vllm_adainfer.artifact.engine_options import EngineOptions

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


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


def captures_graphs(vllm_config: VllmConfig) -> bool:
    """Whether vLLM will capture CUDA graphs on a GPU, as far as is known when config hooks run.

    vLLM 0.32 fills in what is not set after them: no graphs for ``-O0``, nor with another
    compilation than its own, since ours are piecewise.
    """
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.config.vllm import OptimizationLevel

    compilation = vllm_config.compilation_config
    if vllm_config.model_config.enforce_eager or compilation.cudagraph_mode == CUDAGraphMode.NONE:
        return False
    if compilation.mode is None:
        return vllm_config.optimization_level > OptimizationLevel.O0
    return compilation.mode == CompilationMode.VLLM_COMPILE


def fuses_attention(vllm_config: VllmConfig) -> bool:
    """Whether a pass will have vLLM capture the whole model, despite piecewise graphs.

    vLLM 0.32 decides that after its config hooks (`set_splitting_ops_for_attn_fusion`). With
    splitting operations of the user's own the graphs stay piecewise, but contain attention.
    """
    compilation = vllm_config.compilation_config
    fuses = compilation.pass_config.fuse_attn_quant
    return bool(fuses and not compilation.use_inductor_graph_partition)


def splits_elsewhere(vllm_config: VllmConfig) -> bool:
    """Whether attention would be inside of vLLM's piecewise graphs.

    vLLM 0.32 turns them off for ``splitting_ops=[]`` (`set_splitting_ops_for_v1`), after its config
    hooks.
    """
    compilation = vllm_config.compilation_config
    own = compilation.splitting_ops is not None
    return own and not compilation.splitting_ops_contain_attention()


def has_custom_worker(vllm_config: VllmConfig) -> bool:
    """Whether an engine's worker is neither vLLM 0.32's own for CPUs or CUDA, nor ours."""
    worker = vllm_config.parallel_config.worker_cls
    stock = "auto", "vllm.v1.worker.cpu_worker.CPUWorker", "vllm.v1.worker.gpu_worker.Worker"
    return worker not in stock and not worker.startswith("vllm_adainfer.")


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


# Keys of a Hugging Face config that change nothing in what the model computes, or that artifacts
# and fingerprints have in another form. vLLM 0.32 sets some of a classifier after config hooks.
NOT_COMPUTED = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "num_labels",
    "pad_token_id",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "use_sep_token",
}


def engine_options_of(vllm_config: VllmConfig) -> EngineOptions:
    """The options of an engine, at config time or in a worker."""
    import torch
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase
    from vllm.utils.torch_utils import resolve_kv_cache_dtype_string

    model, cache = vllm_config.model_config, vllm_config.cache_config
    checkpoint_dtype = ModelArchConfigConvertorBase.get_torch_dtype(
        model.hf_config, model.model, model.revision, model.config_format
    )
    # vLLM converts a checkpoint of fp32 by itself, to a dtype that depends on the platform.
    without_option = model.dtype == checkpoint_dtype and model.dtype != torch.float32
    overrides = model.hf_overrides
    if callable(overrides):
        overrides = {"a function": getattr(overrides, "__qualname__", repr(overrides))}
    # vLLM 0.32 sets `quantization` also where the checkpoint's own config asks for it.
    own = model.model_arch_config.quantization_config is not None
    online = not own or "quantization_config" in overrides
    kv_cache_dtype: str | None = cache.cache_dtype
    default = resolve_kv_cache_dtype_string("auto", model)
    if kv_cache_dtype == default or (
        default == "auto" and f"torch.{kv_cache_dtype}" == str(model.dtype)
    ):
        kv_cache_dtype = None
    return EngineOptions(
        dtype=None if without_option else str(model.dtype).removeprefix("torch."),
        quantization=model.quantization if online else None,
        quantization_config=_changed_quantization(model),
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_dtype_skip_layers=",".join(cache.kv_cache_dtype_skip_layers) or None,
        hf_overrides={
            key: _plain(one) for key, one in overrides.items() if key not in NOT_COMPUTED
        },
        hf_config=_changed_values(model.hf_config),
    )


def _changed_quantization(model: ModelConfig) -> str | None:
    """What ``--quantization-config`` changes in the method of ``--quantization``; None: nothing."""
    from vllm.config.quantization import QuantSpec, resolve_quantization_config

    found = model.quantization_config
    if found is None or found == resolve_quantization_config(model.quantization, None):
        return None
    if isinstance(found, dict):
        return json.dumps(found, sort_keys=True, default=str)
    changed: dict[str, Any] = {"ignore": found.ignore, "targets": found.targets}
    for kind in "linear", "moe":
        spec = getattr(found, kind)
        if spec is not None:
            changed[kind] = [str(QuantSpec(weight=key)) for key in (spec.weight, spec.activation)]
    return json.dumps({key: value for key, value in changed.items() if value}, sort_keys=True)


def _changed_values(hf_config: Any) -> dict[str, Any]:
    """The values of a config that change what the (language) model computes, see `EngineOptions`.

    They are compared with the defaults of its class, so that they outlast versions that add some.
    """
    changed: dict[str, Any] = {}
    text_config = hf_config.get_text_config()
    for config in {id(one): one for one in (hf_config, text_config)}.values():
        defaults = {} if config.has_no_defaults_at_init else type(config)().to_dict()
        left_out = NOT_COMPUTED | config.sub_configs.keys()
        changed |= {
            key: _plain(value)
            for key, value in config.to_dict().items()
            if key not in left_out and value != defaults.get(key)
        }
    return changed


def _plain(value: Any) -> Any:
    """`value` as it comes back from JSON."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)
