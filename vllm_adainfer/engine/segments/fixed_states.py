"""The memory in which piecewise CUDA graphs find the states that the segment before has left."""

from __future__ import annotations

from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context

from vllm_adainfer.exits.hidden_states import HiddenStates


class FixedStates:
    """Keeps a segment's output where the next segment's graphs read it.

    vLLM captures each compiled module as if nothing read its output in another graph: the memory of
    that output returns to the pool of all graphs, and the next segment's graphs could be captured
    on top of their own input (0.32: ``weak_ref_output`` in `compilation/backends.py`; a module of
    several compiled parts copies between them, `models/gemma3n.py`). One segment runs after the
    other, so they share this memory.
    """

    def __init__(self, rows: int) -> None:
        """For up to `rows` rows, the most that vLLM captures."""
        self._rows = rows
        self._states: HiddenStates | None = None  # the first ones have the dtype and widths

    def handed_on(self, states: HiddenStates) -> HiddenStates:
        """`states` of a segment as the next one is to read them: moved, if that replays graphs."""
        if get_forward_context().cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE:
            return states
        if self._states is None:
            self._states = states.zeros(self._rows)
        rows = slice(0, states.num_rows)
        self._states.put(states, rows)
        return self._states.rows(rows)
