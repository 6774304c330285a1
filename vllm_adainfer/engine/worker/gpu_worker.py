"""vLLM's GPU worker with exits."""

from __future__ import annotations

import torch
from typing_extensions import override
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_adainfer.engine.worker.warm_up import warm_up
from vllm_adainfer.engine.worker.worker import ExitWorker
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.exit_loop import ExitLoop


class AdaInferGPUWorker(ExitWorker, Worker):
    """Its runner is V2, which asks the model for its state."""

    @override
    def determine_available_memory(self) -> int:
        """vLLM captures graphs to measure them, and does not know of ours."""
        available: int = super().determine_available_memory()
        self.model_runner.model_state.drop_graphs()
        return available

    @override
    def sleep(self, level: int = 1) -> None:
        """Not at a level that discards what was allocated when the model was loaded.

        Reloading brings weights back, but no policies.

        Raises:
            AdaInferError: at such a level.

        """
        if level > 1:
            raise AdaInferError(
                f"vllm-adainfer: sleep at level {level} would discard policies along with the "
                'weights: sleep at level 1, or drop "adainfer" from additional_config'
            )
        super().sleep(level)

    @override
    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Also the probes; vLLM warms up with requests that must not be counted."""
        times = super().compile_or_warm_up_model()
        runner, model = self.model_runner, self.model_runner.model
        if isinstance(model.loop, ExitLoop):
            size = runner.max_num_reqs, model.hidden_size
            states = torch.zeros(size, dtype=runner.dtype, device=model.device)
            warm_up(model.loop.policies, states)
        model.loop.reset_counters()
        return times
