"""Worker with our model runner, and the calls that reach it by ``collective_rpc``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_adainfer import compat
from vllm_adainfer.runtime.v1_runner import AdaInferCPUModelRunner


class AdaInferCPUWorker(CPUWorker):
    """vLLM's CPU worker with exits."""

    def init_device(self) -> None:
        """Build the device state as stock does, with our runner."""
        with compat.cpu_runner_class(AdaInferCPUModelRunner):
            super().init_device()

    def adainfer_stats(self) -> dict[str, Any]:
        """Counters of this worker, see `vllm_adainfer.stats`."""
        stats: dict[str, Any] = self.model_runner.model.model.exit_loop.stats.as_dict()
        return stats

    def adainfer_take_record(self, path: str) -> dict[str, Any]:
        """Write the recorded states and sums, the final norm and the LM head to `path`.

        Returns:
            ``fingerprint`` of the served weights, ``threads`` that computed, and the times of
            `vllm_adainfer.models.recording_loop.Timings`.

        """
        model = self.model_runner.model
        loop = model.model.exit_loop
        tensors = loop.recorder.take()
        tensors["norm_weight"] = model.model.norm.weight.data.clone()
        tensors["head_weight"] = model.head_weight.clone()
        save_file(tensors, path)
        timings = asdict(loop.timings)
        return {"fingerprint": model.fingerprint, "threads": torch.get_num_threads(), **timings}
