"""Fixed memory for the hidden states between segments, for piecewise CUDA graphs."""

from __future__ import annotations

from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context

from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.batch.state_memory import StateMemory


class FixedStates:
    """Copies a segment's output to where the next segment's graphs read it.

    vLLM captures each compiled module as if no other graph read its output: the output's memory
    returns to the shared pool, so the next segment's graphs could be captured on top of their own
    input (vLLM 0.32: ``weak_ref_output`` in `compilation/backends.py`; its own model of several
    compiled parts copies between them, `models/gemma3n.py`). Segments run one after the other, so
    all share this memory.
    """

    def __init__(self, rows: int) -> None:
        """Allocate lazily for up to `rows` rows, the largest batch that vLLM captures."""
        self._memory = StateMemory(rows)

    def for_next_segment(self, states: HiddenStates) -> HiddenStates:
        """`states` as the next segment reads them: copied if it replays graphs."""
        if get_forward_context().cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE:
            return states
        memory, rows = self._memory.like(states), slice(0, states.num_rows)
        memory.put(states, rows)
        return memory.rows(rows)
