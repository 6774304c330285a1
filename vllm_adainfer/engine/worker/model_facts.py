"""The facts about the served model that the trainer needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from vllm.config import ModelConfig

from vllm_adainfer.artifact.engine_options import EngineOptions
from vllm_adainfer.auto.directory import AutoDirectory, read_json, write_json
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.runner.build_loop import compaction_cost_of
from vllm_adainfer.files import whole_file
from vllm_adainfer.settings.engine import Auto

logger = get_logger(__name__)


def facts_of(model: Any) -> dict[str, Any]:
    """What `ServedModel` says of an `EarlyExit`, but for its head and its speed."""
    soft_cap, scale = model.soft_cap_and_scale
    return {
        "fingerprint": model.fingerprint,
        "engine_options": model.engine_options.model_dump(),
        "depth": model.stack.shape.depth,
        "own_kv_layers": model.num_own_kv_layers,
        "device": model.device.type,
        "soft_cap": soft_cap,
        "scale": scale,
    }


def forget_others(directory: AutoDirectory, auto: Auto, model: Any) -> None:
    """Forget rows, policies and ledgers that are for another model or other settings.

    `model` is an `EarlyExit` whose weights are loaded and whose loop is built.
    """
    identity = {
        "fingerprint": model.fingerprint,
        "exit_points": list(model.loop.policies.exit_points),
        "epsilon": auto.epsilon,
        "delta": auto.delta,
        "tolerance": auto.tolerance,
        "engine_options": model.engine_options.model_dump(),
    }
    before = read_json(directory.identity)
    try:
        options = EngineOptions.model_validate(before.get("engine_options", {}))
    except (AttributeError, ValueError):  # it is damaged
        is_same = False
    else:
        alike = options.why_not_served_by(model.engine_options) is None
        now = {"tolerance": None, **before, "engine_options": identity["engine_options"]}
        is_same = alike and now == identity
    if not is_same:
        if directory.known():
            logger.warning(
                "what lies in %s is for other weights or settings, or does not say for which "
                "ones: all kinds start anew",
                directory.root,
            )
        directory.forget()
    write_json(directory.identity, identity)
    directory.model.unlink(missing_ok=True)  # the model's path may be another, and its speed


def write_facts(
    directory: AutoDirectory,
    model: Any,
    head: Tensor,
    config: ModelConfig,
    label_head_seconds: Mapping[str, float],
) -> None:
    """Write facts and `head` of `model`, and how fast it is by the steps that were timed."""
    with whole_file(directory.head) as draft:
        save_file({"head_weight": head.contiguous()}, draft)
    layers, means, shape = model.loop.times.layers, model.loop.times.means, model.stack.shape
    layer_seconds = layers.seconds / layers.work
    timed = next(count for count in shape.segment_layers if count)
    rows = layers.work / timed / layers.steps  # of a step
    overrides = config.hf_overrides
    facts = {
        "model": config.model,
        "hf_overrides": overrides if isinstance(overrides, dict) else None,
        "layer_seconds": layer_seconds,
        "cut_seconds": compaction_cost_of(model.stack, model.device) * layer_seconds / rows,
        "pool_seconds": means.seconds / max(1, means.work),
        "label_head_seconds": dict(label_head_seconds),
    }
    write_json(directory.model, {**read_json(directory.identity), **facts_of(model), **facts})
