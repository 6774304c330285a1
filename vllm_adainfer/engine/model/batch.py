"""The batches of a step that the exit loop runs: compiled, or replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from torch import Tensor
from typing_extensions import override
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, ForwardContext, override_forward_context
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from vllm_adainfer.engine.cuda_graphs.segment_graphs import SegmentGraphs
from vllm_adainfer.engine.runner.adapters import StepAdapters
from vllm_adainfer.engine.segments.attention import StepAttention
from vllm_adainfer.engine.segments.segments import Stack, without_graphs
from vllm_adainfer.exits.batch.batch import Batch
from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.batch.layout import RowLayout


class Execution(Enum):
    """The fastest way comes first."""

    SEGMENT_GRAPHS = "CUDA graphs of segments"
    VLLM_GRAPHS = "vLLM's own CUDA graphs"
    COMPILED = "compiled code"
    EAGER = "neither compiled code nor graphs"

    @property
    def replays_parts(self) -> bool:
        """Whether vLLM's piecewise graphs may be replayed."""
        return self in (Execution.SEGMENT_GRAPHS, Execution.VLLM_GRAPHS)

    def applied_to(self, context: ForwardContext) -> ForwardContext:
        """The forward context in which segments run this way."""
        if self.replays_parts:
            return context
        return replace(without_graphs(context), skip_compiled=self is Execution.EAGER)


@dataclass(frozen=True)
class CompiledBatch(Batch):
    """Runs segments as vLLM has compiled them, one kernel (or piecewise graph) at a time.

    Attributes:
        stack: the model's segments.
        positions: int64 [rows], each row's position in its sequence.
        context: vLLM's forward context, with these rows' attention metadata and slots.
        attention: builds both for other rows of the step.
        graphs: CUDA graphs for those other rows; None if the runner has captured none.
        adapters: the LoRA adapters of the step's requests; None where LoRA is off.
        use_adapters: lets layers apply those of the rows; None where LoRA is off.
        replays_parts: whether other rows of the step may replay vLLM's piecewise graphs.
        padded: with padding, the rows of the graphs that these rows replay; None for their own
            number.

    """

    stack: Stack
    positions: Tensor
    context: ForwardContext
    attention: StepAttention
    graphs: SegmentGraphs | None
    adapters: StepAdapters | None
    use_adapters: Callable[[], None] | None
    replays_parts: bool = False
    padded: int | None = None

    @override
    def run(self, segment: int, states: HiddenStates) -> HiddenStates:
        if self.use_adapters is not None:
            self.use_adapters()
        if self.padded is not None:
            states = self.stack.fixed_states.put(states, self.padded)
        with override_forward_context(self.context):
            return self.stack.run(segment, self.positions, states)

    @override
    def write_last_kv(self, states: HiddenStates) -> None:
        if self.use_adapters is not None:
            self.use_adapters()
        with override_forward_context(without_graphs(self.context)):
            self.stack.write_last_kv(self.positions, states, self.context.slot_mapping)

    @override
    def compact(self, layout: RowLayout) -> Batch:
        if (batch := self.replayed(layout)) is not None:
            return batch
        fixed = self.stack.fixed_states
        padded = fixed.size_for(layout.num_rows) if self.replays_parts else None
        if padded is None:
            return self.side_batch(layout)
        batch = self._batch_of(self.attention, layout, padded)
        fixed.put_positions(batch.positions)
        context = replace(
            batch.context,
            cudagraph_runtime_mode=CUDAGraphMode.PIECEWISE,
            batch_descriptor=BatchDescriptor(num_tokens=padded),
        )
        return replace(batch, context=context)

    @override
    def side_batch(self, layout: RowLayout, last_layer_only: bool = False) -> CompiledBatch:
        """Its kernels are launched one by one.

        Piecewise graphs read states where those of the step's remaining rows are, which come back
        when rows beside them have run.
        """
        attention = self.attention
        if last_layer_only:
            attention = attention.of_layer(self.stack.last_layer)
        return self._batch_of(attention, layout)

    def _batch_of(
        self, attention: StepAttention, layout: RowLayout, padded: int | None = None
    ) -> CompiledBatch:
        """A batch of the rows in `layout`, without graphs; `padded` as in the class."""
        positions, slots, attn_metadata = attention.metadata(layout, padded)
        context = replace(
            without_graphs(self.context),
            attn_metadata=attn_metadata,
            slot_mapping=slots,
            is_padding=None,  # no row is padding here, and the step's mask describes other rows
        )
        use = None if self.adapters is None else self.adapters.of_rows(layout)
        return replace(self, positions=positions, context=context, use_adapters=use, padded=padded)

    def replayed(self, layout: RowLayout) -> Batch | None:
        """A batch of the rows in `layout` that replays CUDA graphs; None if no graphs fit them."""
        if self.graphs is None or (graph := self.graphs.stage(layout, self.attention)) is None:
            return None
        return ReplayedBatch(self, layout, self.graphs, graph)


@dataclass(frozen=True)
class ReplayedBatch(Batch):
    """Replays CUDA graphs for requests with one row each, in place of a batch that is `compiled`.

    The `graphs` have the rows of `layout` in their buffers; `graph` is the size to replay.
    """

    compiled: CompiledBatch
    layout: RowLayout
    graphs: SegmentGraphs
    graph: BatchExecutionDescriptor

    @override
    def run(self, segment: int, states: HiddenStates) -> HiddenStates:
        return self.graphs.replay(segment, self.graph, self.layout.num_rows, states)

    @override
    def write_last_kv(self, states: HiddenStates) -> None:
        self.side_batch(self.layout, last_layer_only=True).write_last_kv(states)

    @override
    def compact(self, layout: RowLayout) -> Batch:
        return self.compiled.compact(layout)

    @override
    def side_batch(self, layout: RowLayout, last_layer_only: bool = False) -> CompiledBatch:
        return self.compiled.side_batch(layout, last_layer_only)
