"""The row recorder: keeps the states of some requests beside serving, a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from vllm_adainfer.exits.loop.step import RecordedRequests

ROWS = 64  # of a chunk: on a GPU, copying one to the host waits for the device

# Gets the names of the rows' kinds, their states as for `StateKeeper`, and int64 [rows], the token
# rows that the layers ran for each.
ChunkReader: TypeAlias = Callable[[Sequence[str], Sequence[Tensor], Tensor], None]


class RowRecorder:
    """A `StateKeeper` that collects rows, and passes them on in chunks on the host."""

    def __init__(self, put: ChunkReader) -> None:
        """`put` gets each chunk, in the thread of the step: it must not block."""
        self._put = put
        self._kinds: list[str] = []
        self._states: list[Sequence[Tensor]] = []
        self._computed: list[Tensor] = []

    def __call__(self, requests: RecordedRequests, states: Sequence[Tensor]) -> None:
        """Keep the `states` of `requests`."""
        self._kinds += requests.kinds
        self._states.append(states)
        self._computed.append(torch.from_numpy(requests.computed))
        if len(self._kinds) >= ROWS:
            self.flush()

    def flush(self) -> None:
        """Pass on what there is."""
        if not self._kinds:
            return
        states = [torch.cat([*parts]).cpu() for parts in zip(*self._states, strict=True)]
        self._put(self._kinds, states, torch.cat(self._computed))
        self._kinds, self._states, self._computed = [], [], []
