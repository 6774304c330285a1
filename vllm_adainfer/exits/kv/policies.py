"""Rows that left: they wait, and give the layers that they skipped their keys and values.

Only rows of requests that continue to another token matter: nobody reads those of the others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.batch.layout import RowLayout
from vllm_adainfer.transfers import upload

# The most rows that may wait. Above it requests run the next step at full depth, oldest first.
CAPACITY = 4096
FIRST_SIZE = 256  # rows of a pool; the size doubles whenever more are kept


class RowPool:
    """Keeps all rows in one tensor, so that any number goes in or out in one operation."""

    taken = 0

    def __init__(self) -> None:
        self._free = np.arange(0)
        self._states: HiddenStates | None = None  # a row per place; the first `put` allocates them

    def free_places(self, count: int) -> Ints:
        """Take `count` places, [count]."""
        while len(self._free) < count:
            size = len(self._free) + self.taken
            self._free = np.concatenate([np.arange(size, 2 * size or FIRST_SIZE), self._free])
        places, self._free = self._free[:count], self._free[count:]
        self.taken += count
        return places

    def give_back(self, places: Ints) -> None:
        """Free `places`; their rows are no longer needed."""
        self._free = np.concatenate([places, self._free])
        self.taken -= len(places)

    def put(self, states: HiddenStates, places: Tensor) -> None:
        """Keep the rows of `states` at int64 `places`, both on the same device."""
        size = len(self._free) + self.taken
        if self._states is None:
            self._states = states.zeros(size)
        elif self._states.num_rows < size:
            more = states.zeros(size - self._states.num_rows)
            self._states = HiddenStates.cat([self._states, more])
        self._states.put(states, places)

    def take(self, places: Ints) -> HiddenStates:
        """A copy of the rows at `places`, which are free from then on."""
        assert self._states is not None, "rows are put in before they are taken out"
        [places_on_device] = upload((places,), self._states.device)
        states = self._states.rows(places_on_device)
        self.give_back(places)
        return states


class ExactKV:
    """Exited rows wait, and run the layers they skipped with the next token that goes there.

    In each layer a token attends to exactly what full depth would have put there. Layers process
    waiting rows like a small prefill chunk: weights are read once for all of them. Rows of a
    request below a later exit point have earlier positions than those below an earlier one.

    This is the only record of waiting rows: it also holds the policy that each is accounted to.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        # States before the first layer have no residual: those of the first exit point are apart.
        self._pools = RowPool(), RowPool()
        # By request, then exit point, in order of positions: int64 [2, rows], the places in its
        # pool and the policies.
        self._waiting: OrderedDict[str, dict[int, list[Ints]]] = OrderedDict()

    @property
    def taken(self) -> int:
        """The number of rows that wait."""
        return sum(pool.taken for pool in self._pools)

    def _pool(self, exit_index: int) -> RowPool:
        return self._pools[min(exit_index, 1)]

    def leave(
        self,
        exit_index: int,
        request_ids: Sequence[str],
        layout: RowLayout,
        rows: Ints,
        policies: Ints,
        states: HiddenStates,
    ) -> None:
        """Rows are about to leave: all that some requests have, which continue to another token.

        Args:
            exit_index: the exit point at which they leave.
            request_ids: vLLM's ids of the step's requests.
            layout: the rows that leave, and no others.
            rows: [rows], their places in the batch.
            policies: [rows], the policy that each is accounted to.
            states: those of the whole batch at the exit point.

        """
        pool = self._pool(exit_index)
        places = pool.free_places(layout.num_rows)
        rows_on_device, places_on_device = upload((rows, places), states.device)
        pool.put(states.rows(rows_on_device), places_on_device)
        requests = layout.present
        by_request = np.split(np.stack([places, policies]), layout.ends[requests[:-1]], axis=1)
        for request, chunk in zip(requests.tolist(), by_request, strict=True):
            below = self._waiting.setdefault(request_ids[request], {})
            below.setdefault(exit_index, []).append(chunk)

    def waiting(self, exit_index: int, request_ids: Sequence[str], wanted: Bools) -> Ints | None:
        """The number of rows that wait below an exit point, [requests]; None if none do.

        `wanted` [requests] chooses the requests; for others it is 0.
        """
        if not self._waiting:
            return None
        counts = np.zeros(len(request_ids), dtype=np.int64)
        for request in np.flatnonzero(wanted).tolist():
            below = self._waiting.get(request_ids[request])
            if below is not None:
                counts[request] = _count(below.get(exit_index, ()))
        return counts if counts.any() else None

    def rejoin(
        self, exit_index: int, request_ids: Sequence[str], waiting: Ints
    ) -> tuple[HiddenStates, Ints]:
        """Those rows, which wait no more, in order: their states, and the policies of each."""
        joining: list[Ints] = []
        for request in np.flatnonzero(waiting).tolist():
            request_id = request_ids[request]
            joining += self._waiting[request_id].pop(exit_index)
            if not self._waiting[request_id]:
                del self._waiting[request_id]
        places, policies = np.concatenate(joining, axis=1)
        return self._pool(exit_index).take(places), policies

    def _num_waiting(self, request_id: str) -> int:
        return sum(map(_count, self._waiting.get(request_id, {}).values()))

    def missing(self, request_id: str, end: int) -> int:
        """How many of the request's last positions before `end` are not as at full depth."""
        return self._num_waiting(request_id)

    def overdue(self) -> set[str]:
        """Requests that must run the next step at full depth."""
        overdue: set[str] = set()
        excess = self.taken - self._capacity
        for request_id in self._waiting if excess > 0 else ():
            overdue.add(request_id)
            excess -= self._num_waiting(request_id)
            if excess <= 0:
                break
        return overdue

    def forget(self, request_id: str) -> Iterable[tuple[int, Ints]]:
        """The request has ended, or its keys and values were thrown away.

        Returns the rows that no longer wait: exit point, and the policy of each row.
        """
        forgotten = []
        for exit_index, chunks in self._waiting.pop(request_id, {}).items():
            places, policies = np.concatenate(chunks, axis=1)
            self._pool(exit_index).give_back(places)
            forgotten.append((exit_index, policies))
        return forgotten


class RecurrentKV(ExactKV):
    """As `ExactKV`, where some layers keep a state for each request instead of keys and values.

    Waiting rows go through such a layer in order, before the later row that they go with. The
    prefix cache keeps the state at the end of a block, but rows that waited leave only the state
    after all of them. So nothing from the first row on that waited is ever complete.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        super().__init__(capacity)
        self._first: dict[str, int] = {}  # by request, the first position that has left

    @override
    def leave(
        self, exit_index: int, request_ids: Sequence[str], layout: RowLayout, *rows: Any
    ) -> None:
        super().leave(exit_index, request_ids, layout, *rows)
        firsts = layout.last_positions - layout.query_lens + 1
        for request in layout.present.tolist():
            self._first.setdefault(request_ids[request], int(firsts[request]))

    @override
    def missing(self, request_id: str, end: int) -> int:
        return max(0, end - self._first.get(request_id, end))

    @override
    def forget(self, request_id: str) -> Iterable[tuple[int, Ints]]:
        self._first.pop(request_id, None)
        return super().forget(request_id)


def _count(chunks: Iterable[Ints]) -> int:
    return sum(chunk.shape[1] for chunk in chunks)
