"""vLLM's GPU worker with early exits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import vllm
from typing_extensions import override
from vllm import envs
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

import vllm_adainfer
from vllm_adainfer.artifact.artifact import digest_of
from vllm_adainfer.engine.compat.warm_up import WarmedUp
from vllm_adainfer.engine.runner.ranks import broadcast_from_rank0, same_on_all_ranks
from vllm_adainfer.engine.self_test.self_test import self_test
from vllm_adainfer.engine.startup.graph_mode import check_graph_mode
from vllm_adainfer.engine.worker.warm_up import prepare, warm_up
from vllm_adainfer.engine.worker.worker import ExitWorker
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.loop.exit_loop import ExitLoop
from vllm_adainfer.files import PUBLIC, replace_file
from vllm_adainfer.policy.policy_set import PolicySet


class AdaInferGPUWorker(ExitWorker, WarmedUp, Worker):
    """Runs Model Runner V2, which asks the model for its `ModelState`."""

    @override
    def determine_available_memory(self) -> int:
        """Forget graphs: vLLM captures some here only to measure their memory, and drops them."""
        available: int = super().determine_available_memory()
        model = self.model_runner.model
        model.graphs = None
        model.stack.fixed_states.captured.clear()
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
    def init_device(self) -> None:
        """Refuse CUDA graphs of the whole model, which vLLM may choose after our config hook."""
        super().init_device()
        check_graph_mode(self.vllm_config)

    @override
    def warmed_up(self) -> None:
        """Test a device on which that was not done before, and warm up the probes, too."""
        model = self.model_runner.model
        if isinstance(model.loop, ExitLoop):
            if current_platform.is_cuda_alike():
                self.self_test()
            states = self._some_states()
            warm_up(model.loop.policies, states)
            broadcast_from_rank0(states[:1])
        model.loop.reset_counters()  # of vLLM's warm-up

    @override
    def prepare_policies(self, policies: PolicySet) -> None:
        """Compile and test the kernels of policies that come later, before they decide a step."""
        prepare(policies, self._some_states())

    def _some_states(self) -> torch.Tensor:
        """[max requests, hidden size], all zeros."""
        runner, model = self.model_runner, self.model_runner.model
        size = runner.max_num_reqs, model.hidden_size
        return torch.zeros(size, dtype=runner.dtype, device=model.device)

    def self_test(self) -> None:
        """Check the fast paths; once for the same device, versions and model."""
        runner = self.model_runner
        tested = configuration_of(runner)
        has_passed = record_of(tested).exists()
        if same_on_all_ranks(has_passed) and has_passed:
            return
        if self_test(runner).passed:
            remember(tested)


def configuration_of(runner: Any) -> dict[str, Any]:
    """What a Model Runner V2 is about to serve: device, versions, model and artifacts."""
    model, config = runner.model, runner.vllm_config
    return {
        "device": torch.cuda.get_device_name(runner.device),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "vllm_adainfer": vllm_adainfer.__version__,
        "model": type(model).__name__,
        "weights": model.fingerprint,
        "artifacts": digest_of(model.artifacts),
        "attention": sorted(
            {group.backend.get_name() for some in runner.attn_groups for group in some}
        ),
        "config": config.compute_hash(),
        "ranks": config.parallel_config.world_size,
    }


def record_of(tested: dict[str, Any]) -> Path:
    """The file that is there if all of this has passed; its name is a digest of it."""
    text = json.dumps(tested, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Path(envs.VLLM_CACHE_ROOT) / "adainfer" / "self_test" / f"{name}.json"


def remember(tested: dict[str, Any]) -> None:
    """Note that it has passed. Whatever failed or was not tested is tested again at each start."""
    path = record_of(tested)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(tested, indent=1, sort_keys=True), PUBLIC)
