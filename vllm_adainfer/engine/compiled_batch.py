"""The rows that are in the stack, and how segments are run on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor
from vllm.forward_context import ForwardContext, override_forward_context

from vllm_adainfer.engine.segments import Stack, without_graphs
from vllm_adainfer.exits.layout import RowLayout
from vllm_adainfer.exits.residual import Stream
from vllm_adainfer.exits.step import StepContext


class Batch(Protocol):
    """Rows that run segments together."""

    def run(self, index: int, stream: Stream) -> Stream:
        """The stream of these rows after a segment."""


@dataclass(frozen=True)
class CompiledBatch:
    """Segments as vLLM has compiled them, launched one kernel (or piecewise graph) at a time.

    Attributes:
        stack: whose segments they are.
        positions: int64 [rows].
        context: vLLM's, with these rows' attention metadata and slots.

    """

    stack: Stack
    positions: Tensor
    context: ForwardContext

    def run(self, index: int, stream: Stream) -> Stream:
        """See `Batch.run`."""
        with override_forward_context(self.context):
            return self.stack.run(index, self.positions, stream)

    def write_last_kv(self, stream: Stream) -> None:
        """Write keys and values of the last layer; `stream`, before it, may be overwritten."""
        with override_forward_context(without_graphs(self.context)):
            self.stack.write_last_kv(self.positions, stream, self.context.slot_mapping)

    def narrowed(self, step: StepContext) -> CompiledBatch:
        """The same with the rows that `step` has now."""
        return self.narrowed_to(step.layout, step)

    def narrowed_to(self, layout: RowLayout, step: StepContext) -> CompiledBatch:
        """The same with the rows of `layout`.

        Piecewise graphs read the stream where it was when they were captured, so only the batch
        as it came replays them.
        """
        rows, attn_metadata = step.narrowed_to(layout)
        context = replace(
            without_graphs(self.context), attn_metadata=attn_metadata, slot_mapping=rows.slots
        )
        return CompiledBatch(self.stack, rows.positions, context)
