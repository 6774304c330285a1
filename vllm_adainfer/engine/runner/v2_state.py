"""Model Runner V2, which vLLM uses on GPUs: a `ModelState` that prepares step contexts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.cuda_graphs.segment_graphs import SegmentGraphs, why_not_captured
from vllm_adainfer.engine.runner.build_loop import build_loop
from vllm_adainfer.engine.runner.requests import RunningRequests
from vllm_adainfer.engine.segments.attention import Groups, StepAttention, with_own_builders

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState as _ModelState
else:
    _ModelState = object

logger = get_logger(__name__)


class ExitModelState(_ModelState):
    """Mixin that prepares the step context. Must precede the vLLM class in the MRO."""

    model: Any

    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: None, device: torch.device
    ) -> None:
        """Build the loop of `model`, whose weights are loaded."""
        super().__init__(vllm_config, model, encoder_cache, device)
        self.model.loop = build_loop(self.model, vllm_config)
        self.running = RunningRequests(vllm_config, self.model.loop)
        self._own_groups: Groups | None = None
        self._block_sizes: list[int] = []

    @override
    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        self.running.add(new_req_data)

    @override
    def remove_request(self, req_id: str) -> None:
        """Forget a request that has ended or was preempted; unknown ids are ignored."""
        super().remove_request(req_id)
        self.running.remove(req_id)

    @override
    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: BlockTables
    ) -> None:
        """Called twice: vLLM first measures graphs with a small cache."""
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self.running.use_kv_cache(kv_cache_config)
        self._own_groups = None
        self._block_sizes = block_tables.block_sizes

    @override
    def capture_inner_cudagraphs(
        self,
        input_buffers: InputBuffers,
        block_tables: BlockTables,
        attn_groups: Groups,
        kv_cache_config: KVCacheConfig,
    ) -> None:
        """Capture the segments' graphs; the runner has captured its own."""
        if self.running.admission.is_recording:  # states are kept, and graphs would overwrite them
            return
        if self.vllm_config.model_config.runner_type == "pooling":  # there are no decode steps
            return
        reason = why_not_captured(self.vllm_config, attn_groups)
        if reason is not None:
            logger.warning("decode steps run without CUDA graphs of segments: %s", reason)
            return
        graphs = SegmentGraphs(
            self.vllm_config,
            self.model.stack,
            attn_groups,
            kv_cache_config,
            block_tables.input_block_tables,
            self.device,
        )
        graphs.capture()
        self.model.graphs = graphs

    @override
    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: Any,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: Groups,
        kv_cache_config: KVCacheConfig,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Also describe the step, unless this is a dummy batch, whose groups may lack layers."""
        self.model.prepared, graphs = None, self.model.graphs
        if self.running.knows(input_batch.req_ids[0]):
            if self._own_groups is None:
                self._own_groups = with_own_builders(
                    attn_groups, kv_cache_config, self.vllm_config, self.device
                )
            computed = input_batch.num_computed_tokens_np.astype(np.int64)
            query_lens = input_batch.num_scheduled_tokens.astype(np.int64)
            step = self.running.describe(
                request_ids=input_batch.req_ids,
                query_lens=query_lens,
                computed=computed,
                yields_token=computed + query_lens >= input_batch.prefill_len_np,
                device=self.device,
                drafted=input_batch.num_draft_tokens_per_req,
            )
            attention = StepAttention.of_step(
                self._own_groups, block_tables, self._block_sizes, step.layout, self.device
            )
            self.model.prepared = step, attention, self.running.adapters_of(step)
            if graphs is not None and graphs.serves(step.layout):
                return {}  # the graphs have their own
        return super().prepare_attn(
            input_batch,
            cudagraph_mode,
            block_tables,
            slot_mappings,
            attn_groups,
            kv_cache_config,
            *args,
            **kwargs,
        )


class AdaInferModelState(ExitModelState, DefaultModelState):
    """For models whose layers all have attention."""


class AdaInferHybridModelState(ExitModelState, MambaHybridModelState):
    """For models of which some layers keep a recurrent state."""
