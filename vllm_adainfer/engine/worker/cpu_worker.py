"""vLLM's CPU worker with early exits."""

from __future__ import annotations

from typing import Any

from typing_extensions import override
from vllm import envs
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_adainfer.engine.compat.runner import cpu_runner_class
from vllm_adainfer.engine.runner.v1_runner import AdaInferCPUModelRunner
from vllm_adainfer.engine.worker.freed_memory import keep_freed_memory
from vllm_adainfer.engine.worker.worker import ExitWorker


class AdaInferCPUWorker(ExitWorker, CPUWorker):
    """Runs Model Runner V1, or V2 where Triton runs on the CPU."""

    @override
    def init_device(self) -> None:
        """Build our V1 runner instead of vLLM's."""
        with cpu_runner_class(AdaInferCPUModelRunner):
            super().init_device()

    @override
    def load_model(self, **kwargs: Any) -> None:
        """Keep freed memory from now on: every step needs it again."""
        super().load_model(**kwargs)
        keep_freed_memory()

    @override
    def compile_or_warm_up_model(self) -> Any:
        """Trace segments with many rows, even in vLLM's CI mode, which skips that pass.

        Torch specialises on a batch of one row. If the first step gave the last segment one row,
        later batches would be written to memory allocated for one row.
        """
        if envs.VLLM_CPU_CI_ENV:
            self.model_runner.warming_up_model()
        return super().compile_or_warm_up_model()
