"""CUDA graphs of segments for decode batches: one launch per segment instead of hundreds.

A full graph of vLLM holds the whole model, so no request could leave. Here each segment has one
graph per capture size, and a batch is padded to the next size. vLLM's `CudaGraphManager` captures
and keeps the graphs, as it does for vLLM's own model that runs some layers on a subset of rows
(`models/deepseek_v41/nvidia/decoder_replay_cudagraph.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.cuda_graphs.decode_buffers import DecodeBuffers
from vllm_adainfer.engine.segments.attention import (
    Groups,
    StepAttention,
    by_layer,
    with_own_builders,
)
from vllm_adainfer.engine.segments.segments import Stack
from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.batch.layout import RowLayout

logger = get_logger(__name__)


class SegmentGraphs:
    """Captures the graphs and stages batches for them.

    All graphs share one memory pool (only one runs at a time) and one set of buffers, so each graph
    beyond the largest takes memory only for its launches.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        stack: Stack,
        groups: Groups,
        kv_cache: KVCacheConfig,
        block_tables: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        """Allocate buffers for the attention `groups` of `kv_cache`.

        `block_tables` are int32 [requests, blocks] by KV cache group, as in steps.
        """
        # Only in this mode do builders keep what graphs read at fixed addresses.
        config = copy.copy(vllm_config)
        config.compilation_config = copy.copy(vllm_config.compilation_config)
        config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        self._config = config
        self._stack = stack
        self._groups = with_own_builders(groups, kv_cache, config, device)
        self._managers = [
            CudaGraphManager(config, device, CUDAGraphMode.FULL_DECODE_ONLY, decode_query_len=1)
            for _ in stack.segments
        ]
        size = min(
            config.scheduler_config.max_num_seqs,
            config.compilation_config.max_cudagraph_capture_size or 0,
        )
        self._buffers = DecodeBuffers(size, block_tables, device)

    def capture(self) -> None:
        """Capture all graphs, and log the memory they take."""
        before = torch.accelerator.get_memory_info()[0]
        for index, manager in enumerate(self._managers):
            manager.capture(self._forward_of(index), f"Capturing segment {index + 1} for decoding")
        taken = before - torch.accelerator.get_memory_info()[0]
        logger.info(
            "captured %d CUDA graphs of %d segments for decode batches: %.2f GiB",
            sum(len(manager.graphs) for manager in self._managers),
            len(self._managers),
            taken / (1 << 30),
        )

    def serves(self, layout: RowLayout) -> bool:
        """Whether there are graphs for a batch with the rows of `layout`."""
        return self._graph_for(layout).cg_mode == CUDAGraphMode.FULL

    def stage(self, layout: RowLayout, attention: StepAttention) -> BatchExecutionDescriptor | None:
        """Put the rows of `layout` into the buffers; the graphs to replay, None if none fit."""
        graph = self._graph_for(layout)
        if graph.cg_mode != CUDAGraphMode.FULL:
            return None
        self._buffers.stage(layout, attention, graph.num_tokens)
        # Building metadata updates what graphs read from builders.
        longest = int(layout.last_positions[layout.present].max()) + 1
        self._buffers.metadata(self._groups, graph.num_tokens, longest)
        return graph

    def replay(
        self, segment: int, graph: BatchExecutionDescriptor, rows: int, states: HiddenStates
    ) -> HiddenStates:
        """The hidden states after a segment, in buffers that the next segment overwrites.

        `rows` is the number of staged rows without padding, and `graph` what `stage` returned.
        """
        self._buffers.load(segment, states.rows(slice(0, rows)))
        self._managers[segment].run_fullgraph(graph)
        if segment == len(self._managers) - 1:
            return HiddenStates(self._buffers.final_of(rows))
        return self._buffers.states_after(segment, rows)

    def _graph_for(self, layout: RowLayout) -> BatchExecutionDescriptor:
        """The smallest graph that holds the batch. All segments have the same sizes."""
        rows, requests = layout.num_rows, len(layout.present)
        uniform = 1 if rows == requests else None
        return self._managers[0].dispatch(requests, rows, uniform, num_active_loras=0)

    def _forward_of(self, index: int) -> Callable[..., Callable[[CUDAGraphMode], None]]:
        """The function that prepares a segment's inputs for capture and returns its forward."""

        def prepare(graph: BatchExecutionDescriptor, warmup: bool) -> Callable[..., None]:
            rows, buffers = graph.num_tokens, self._buffers
            longest = self._config.model_config.max_model_len
            metadata = buffers.metadata(self._groups, rows, longest, for_capture=True)
            slots = by_layer(self._groups, buffers.slots_of(rows))

            def forward(mode: CUDAGraphMode) -> None:
                with set_forward_context(
                    metadata,
                    self._config,
                    num_tokens=rows,
                    cudagraph_runtime_mode=mode,
                    slot_mapping=slots,
                    is_padding=buffers.padding_of(rows),
                ):
                    given = buffers.states_after(index - 1, rows) if index else buffers.ids_of(rows)
                    states = self._stack.run(index, buffers.positions[:rows], given)
                    if index == len(self._managers) - 1:
                        buffers.store_final(states.hidden)
                    else:
                        buffers.store(index, states)

            return forward

        return prepare


def why_not_captured(vllm_config: VllmConfig, groups: Groups) -> str | None:
    """Why decode steps cannot be captured; None if they can."""
    if vllm_config.lora_config is not None:
        return "their buffers hold no adapters (LoRA)"
    for kv_group in groups:
        for group in kv_group:
            if group.backend.is_ssm():
                return f"their buffers hold no recurrent states ({group.backend.get_name()})"
            builder = group.get_metadata_builder(0)
            support = builder.get_cudagraph_support(vllm_config, group.kv_cache_spec)
            if support == AttentionCGSupport.NEVER:
                return f"{group.backend.get_name()} cannot be captured"
    return None
