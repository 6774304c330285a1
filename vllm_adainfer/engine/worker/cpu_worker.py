"""vLLM's CPU worker with exits."""

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
    """Its runner is V1, or V2 where Triton runs on the CPU."""

    @override
    def init_device(self) -> None:
        """Build our runner in place of V1's."""
        with cpu_runner_class(AdaInferCPUModelRunner):
            super().init_device()

    @override
    def load_model(self, **kwargs: Any) -> None:
        """Then keep memory: what is allocated from now on is needed again in every step."""
        super().load_model(**kwargs)
        keep_freed_memory()

    @override
    def compile_or_warm_up_model(self) -> Any:
        """Trace segments in a pass of many rows, also in vLLM's CI mode, which has no such pass.

        Torch takes a single row for a constant. The last segment may get one in the first step, and
        every later batch would then be written to memory for one row.
        """
        if envs.VLLM_CPU_CI_ENV:
            self.model_runner.warming_up_model()
        return super().compile_or_warm_up_model()
