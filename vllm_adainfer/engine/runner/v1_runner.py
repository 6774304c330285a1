"""Model Runner V1, which vLLM uses on CPUs: prepares a step context for the model."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from typing_extensions import override
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_adainfer.arrays import Ints
from vllm_adainfer.engine.compat.runner import keep_best_tokens, seeds_of_chunks_kept
from vllm_adainfer.engine.runner.build_loop import build_loop
from vllm_adainfer.engine.runner.requests import RunningRequests
from vllm_adainfer.engine.runner.v1_drafts import VerifiesDrafts
from vllm_adainfer.engine.segments.attention import Groups, StepAttention, with_own_builders


class AdaInferCPUModelRunner(VerifiesDrafts, CPUModelRunner):
    """Tells the model whose rows the next pass has, and who may exit."""

    running: RunningRequests

    @override
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Build the model's loop once the weights are loaded."""
        super().load_model(*args, **kwargs)
        self.model.loop = build_loop(self.model, self.vllm_config)
        keep_best_tokens(self)
        self.running = RunningRequests(self.vllm_config, self.model.loop)

    @override
    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        self.running.use_kv_cache(self.kv_cache_config)

    @cached_property
    def _own_groups(self) -> Groups:
        return with_own_builders(
            self.attn_groups, self.kv_cache_config, self.vllm_config, self.device
        )

    @override
    def _update_states(self, scheduler_output: Any) -> Any:
        """Admit new requests, and forget those that have ended."""
        for request_id in scheduler_output.finished_req_ids:
            self.running.remove(request_id)
        for request_id in scheduler_output.preempted_req_ids or ():
            self.running.lost_kv(request_id)
        for new in scheduler_output.scheduled_new_reqs:
            self.running.add(new)
        return super()._update_states(scheduler_output)

    @override
    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        self._prepare_step()
        return super()._model_forward(*args, **kwargs)

    @override
    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        with seeds_of_chunks_kept(self):
            return super().sample_tokens(*args, **kwargs)

    @override
    def _unread(self) -> Ints:
        return self.running.early_objects

    def _drafted(self, count: int) -> Ints | None:
        """How many rows of each request have drafts; None if none has."""
        drafts = self.input_batch.spec_token_ids[:count]
        return np.array([len(draft) for draft in drafts]) if any(drafts) else None

    def _prepare_step(self) -> None:
        batch = self.input_batch
        count = batch.num_reqs
        tables = [batch.block_table[group] for group in range(len(self._own_groups))]
        step = self.running.describe(
            request_ids=batch.req_ids,
            query_lens=np.diff(self.query_start_loc.np[: count + 1].astype(np.int64)),
            computed=batch.num_computed_tokens_cpu[:count].astype(np.int64),
            yields_token=~self.discard_request_mask.np[:count],
            device=self.device,
            drafted=self._drafted(count),
        )
        attention = StepAttention.of_step(
            self._own_groups,
            [table.get_device_tensor(count) for table in tables],
            [table.block_size for table in tables],
            step.layout,
            self.device,
        )
        self.model.prepared = step, attention, self.running.adapters_of(step)
