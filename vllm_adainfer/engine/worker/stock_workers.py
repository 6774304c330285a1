"""vLLM's workers with its own models, which verify drafts of structured answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from vllm_adainfer.engine.compat.runner import cpu_runner_class, seeds_of_chunks_kept
from vllm_adainfer.engine.runner.v1_drafts import VerifiesDrafts
from vllm_adainfer.engine.runner.v2_drafts import verify_drafts

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as _Worker
else:
    _Worker = object


class DraftingCPUModelRunner(VerifiesDrafts, CPUModelRunner):
    """vLLM's V1 runner, which verifies drafts."""

    @override
    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Sample the step; drafts use up token budget, so that more prompts run in chunks."""
        with seeds_of_chunks_kept(self):
            return super().sample_tokens(*args, **kwargs)


class DraftingWorker(_Worker):
    """Mixin for vLLM's workers. Must precede the vLLM class in the MRO."""

    @override
    def load_model(self, **kwargs: Any) -> None:
        """Let Model Runner V2 verify drafts; V1 is of our class."""
        super().load_model(**kwargs)
        if self.use_v2_model_runner:
            verify_drafts(self.model_runner)


class DraftingCPUWorker(DraftingWorker, CPUWorker):
    """Runs Model Runner V1, or V2 where Triton runs on the CPU."""

    @override
    def init_device(self) -> None:
        """Build our V1 runner instead of vLLM's."""
        with cpu_runner_class(DraftingCPUModelRunner):
            super().init_device()


class DraftingGPUWorker(DraftingWorker, Worker):
    """Runs Model Runner V2."""
