"""Workers with exits, and the calls that reach them by ``collective_rpc``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker as GPUWorker
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_adainfer import compat
from vllm_adainfer.runtime.requests import RunningRequests
from vllm_adainfer.stats import ExitStats

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as _Worker
else:
    _Worker = object


class ExitWorker(_Worker):
    """Comes before vLLM's class among the bases of ours."""

    @property
    def _running(self) -> RunningRequests:
        runner: Any = self.model_runner
        running: RunningRequests = (
            runner.model_state.running if self.use_v2_model_runner else runner.running
        )
        return running

    def sample_tokens(self, grammar_output: Any) -> Any:
        """As vLLM's; the output says what is complete in the KV cache."""
        output = super().sample_tokens(grammar_output)
        complete = self._running.take_complete()
        if complete is not None:
            compat.note_complete(output, complete)
        return output

    def adainfer_stats(self) -> dict[str, Any]:
        """Counters of this worker, see `vllm_adainfer.stats`."""
        stats: dict[str, Any] = self.model_runner.model.exit_loop.stats.as_dict()
        return stats

    def adainfer_take_record(self, path: str) -> dict[str, Any]:
        """Write the recorded states and sums and the tensors of the model's logit lens to `path`.

        Returns:
            ``fingerprint`` of the served weights, ``norm`` (kind and epsilon of the final one,
            None if there is none), ``threads`` that computed, and the times of
            `vllm_adainfer.models.recording_loop.Timings`.

        """
        model: Any = self.model_runner.model
        loop = model.exit_loop
        tensors = loop.recorder.take()
        lens = model.logit_lens()
        tensors |= {f"logit_lens.{name}": part.clone() for name, part in lens.own.items()}
        save_file(tensors, path)
        timings = asdict(loop.timings)
        return {
            "fingerprint": model.fingerprint,
            "norm": lens.norm and (lens.norm.kind, lens.norm.eps),
            "threads": torch.get_num_threads(),
            **timings,
        }


class AdaInferCPUWorker(ExitWorker, CPUWorker):
    """vLLM's CPU worker with exits."""

    def init_device(self) -> None:
        """Build the device state as stock does, with our runner where that is V1."""
        from vllm_adainfer.runtime.v1_runner import AdaInferCPUModelRunner

        with compat.cpu_runner_class(AdaInferCPUModelRunner):
            super().init_device()


class AdaInferGPUWorker(ExitWorker, GPUWorker):
    """vLLM's GPU worker with exits; its runner is V2, which asks the model for its state."""

    def determine_available_memory(self) -> int:
        """As vLLM's, which captures graphs to measure them and cannot know of ours."""
        available: int = super().determine_available_memory()
        self.model_runner.model_state.drop_graphs()
        return available

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """As vLLM's, which warms up with requests that are not to be counted."""
        times = super().compile_or_warm_up_model()
        loop: Any = self.model_runner.model.exit_loop
        loop.stats = ExitStats(shadow=loop.stats.shadow)
        return times
