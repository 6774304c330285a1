"""The facts about the served model that the trainer needs."""

from __future__ import annotations

from typing import Any

from safetensors.torch import save_file
from vllm.config import VllmConfig

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
        "soft_cap": soft_cap,
        "scale": scale,
    }


class ModelFacts:
    """Facts of the served model, and its LM head, for the trainer."""

    def __init__(
        self, directory: AutoDirectory, auto: Auto, model: Any, vllm_config: VllmConfig
    ) -> None:
        """Forget rows, policies and ledgers that are for another model or other settings.

        `model` is an `EarlyExit` whose weights are loaded and whose loop is built.
        """
        self._directory, self._model, self._config = directory, model, vllm_config
        self._identity = {
            "fingerprint": model.fingerprint,
            "exit_points": list(model.loop.policies.exit_points),
            "epsilon": auto.epsilon,
            "delta": auto.delta,
            "engine_options": model.engine_options.model_dump(),
        }
        if not self._is_of(read_json(directory.identity)):
            if directory.known():
                logger.warning(
                    "what lies in %s is for other weights or settings, or does not say for which "
                    "ones: all kinds start anew",
                    directory.root,
                )
            directory.forget()
        write_json(directory.identity, self._identity)
        directory.model.unlink(missing_ok=True)  # the model's path may be another, and its speed

    def _is_of(self, before: Any) -> bool:
        """Whether what was recorded `before` is of this model, run alike, and these settings."""
        try:
            options = EngineOptions.model_validate(before.get("engine_options", {}))
        except (AttributeError, ValueError):  # it is damaged
            return False
        now = {"engine_options": self._identity["engine_options"]}
        alike = options.why_not_served_by(self._model.engine_options) is None
        return alike and {**before, **now} == self._identity

    @property
    def are_written(self) -> bool:
        """Whether the trainer can read them."""
        return self._directory.model.exists()

    def write(self, step_seconds: float, steps: int) -> None:
        """Write them; by now it is known how fast the layers are, by the time of all `steps`."""
        head = self._model.logit_lens().head.weight.cpu().contiguous()
        with whole_file(self._directory.head) as draft:
            save_file({"head_weight": head}, draft)
        work, stack = self._model.loop.stats.by_policy, self._model.stack
        layers_run = sum(policy.work["layers_run"] for policy in list(work.values()))
        layer_seconds = step_seconds / layers_run
        rows = layers_run / stack.shape.depth / steps  # of a step
        config = self._config.model_config
        overrides = config.hf_overrides
        cut_seconds = compaction_cost_of(stack, self._model.device) * layer_seconds / rows
        facts = {
            "model": config.model,
            "hf_overrides": overrides if isinstance(overrides, dict) else None,
            "layer_seconds": layer_seconds,
            "cut_seconds": cut_seconds,
        }
        write_json(self._directory.model, {**self._identity, **facts_of(self._model), **facts})
