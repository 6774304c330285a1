"""vLLM's GPU worker with early exits."""

from __future__ import annotations

import torch
from typing_extensions import override
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

from vllm_adainfer.engine.compat.warm_up import WarmedUp
from vllm_adainfer.engine.runner.ranks import broadcast_from_rank0, same_on_all_ranks
from vllm_adainfer.engine.self_test.passed import configuration_of, record_of, remember
from vllm_adainfer.engine.self_test.self_test import self_test
from vllm_adainfer.engine.worker.warm_up import warm_up
from vllm_adainfer.engine.worker.worker import ExitWorker
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.loop.exit_loop import ExitLoop


class AdaInferGPUWorker(ExitWorker, WarmedUp, Worker):
    """Runs Model Runner V2, which asks the model for its `ModelState`."""

    @override
    def determine_available_memory(self) -> int:
        """Drop our graphs too: vLLM captures graphs here only to measure their memory."""
        available: int = super().determine_available_memory()
        self.model_runner.model_state.drop_graphs()
        return available

    @override
    def sleep(self, level: int = 1) -> None:
        """Allow only level 1: a deeper sleep discards policies, and no reload restores them."""
        if level > 1:
            raise AdaInferError(
                f"vllm-adainfer: sleep at level {level} would discard policies along with the "
                'weights: sleep at level 1, or drop "adainfer" from additional_config'
            )
        super().sleep(level)

    @override
    def warmed_up(self) -> None:
        """Test a device on which that was not done before, and warm up the probes, too."""
        runner, model = self.model_runner, self.model_runner.model
        if isinstance(model.loop, ExitLoop):
            if current_platform.is_cuda_alike():
                self.self_test()
            size = runner.max_num_reqs, model.hidden_size
            states = torch.zeros(size, dtype=runner.dtype, device=model.device)
            warm_up(model.loop.policies, states)
            broadcast_from_rank0(states[:1])
        model.loop.reset_counters()  # of vLLM's warm-up

    def self_test(self) -> None:
        """Check the fast paths; once for the same device, versions and model."""
        runner = self.model_runner
        tested = configuration_of(runner)
        has_passed = record_of(tested).exists()
        if same_on_all_ranks(has_passed) and has_passed:
            return
        if not self_test(runner):
            remember(tested)
