"""vLLM's CPU worker with exits."""

from __future__ import annotations

from typing_extensions import override
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_adainfer.engine import compat
from vllm_adainfer.engine.v1_runner import AdaInferCPUModelRunner
from vllm_adainfer.engine.worker import ExitWorker


class AdaInferCPUWorker(ExitWorker, CPUWorker):
    """Its runner is V1, or V2 where Triton runs on the CPU."""

    @override
    def init_device(self) -> None:
        """Build our runner in place of V1's."""
        with compat.cpu_runner_class(AdaInferCPUModelRunner):
            super().init_device()
