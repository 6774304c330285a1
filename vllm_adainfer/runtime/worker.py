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
        stats: dict[str, Any] = self.model_runner.model.exit_loop.stats.as_dict()
        return stats

    def adainfer_take_record(self, path: str) -> dict[str, Any]:
        """Write the recorded states and sums and the tensors of the model's logit lens to `path`.

        Returns:
            ``fingerprint`` of the served weights, ``norm`` (kind and epsilon of the final one,
            None if there is none), ``threads`` that computed, and the times of
            `vllm_adainfer.models.recording_loop.Timings`.

        """
        model = self.model_runner.model
        loop = model.exit_loop
        tensors = loop.recorder.take()
        lens = model.logit_lens(model.head_weight)
        tensors |= {f"logit_lens.{name}": part.clone() for name, part in lens.own.items()}
        save_file(tensors, path)
        timings = asdict(loop.timings)
        return {
            "fingerprint": model.fingerprint,
            "norm": lens.norm and (lens.norm.kind, lens.norm.eps),
            "threads": torch.get_num_threads(),
            **timings,
        }
