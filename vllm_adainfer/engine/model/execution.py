"""How segments run: each way is the safe one if those before it give wrong answers."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

from vllm.forward_context import ForwardContext

from vllm_adainfer.engine.segments.segments import without_graphs


class Execution(Enum):
    """The fastest way comes first."""

    SEGMENT_GRAPHS = "CUDA graphs of segments"
    VLLM_GRAPHS = "vLLM's own CUDA graphs"
    COMPILED = "compiled code"
    EAGER = "neither compiled code nor graphs"

    def applied_to(self, context: ForwardContext) -> ForwardContext:
        """The forward context in which segments run this way."""
        if self in (Execution.SEGMENT_GRAPHS, Execution.VLLM_GRAPHS):
            return context
        return replace(without_graphs(context), skip_compiled=self is Execution.EAGER)
