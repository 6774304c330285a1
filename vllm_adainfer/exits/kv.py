"""KV policies: what later tokens find in the layers that an exited row has skipped.

Only rows of requests that continue to another token matter; nobody reads those of the others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol

import numpy as np
from typing_extensions import override

from vllm_adainfer.exits.batch import Batch
from vllm_adainfer.exits.hidden_states import HiddenStates
from vllm_adainfer.exits.layout import Ints
from vllm_adainfer.exits.row_pool import RowPool
from vllm_adainfer.exits.step import StepContext

# Rows that may wait in all. Above it requests run the next step at full depth, the oldest first.
CAPACITY = 4096


class KVPolicy(Protocol):
    """Takes care of the keys and values of exited rows, for the exit loop and the runner.

    Attributes:
        defers: whether the layers that a row skips are run for it later.

    """

    defers: bool

    def leave(
        self, exit_index: int, requests: Ints, batch: Batch, states: HiddenStates, step: StepContext
    ) -> None:
        """Rows of `requests`, which continue, are about to leave the batch at this exit point.

        `states` are those of the whole batch.
        """

    def waiting(self, exit_index: int, step: StepContext, leaving: Ints) -> Ints | None:
        """[requests], rows that wait below this exit point, without `leaving`; None if none do."""

    def rejoin(self, exit_index: int, step: StepContext, waiting: Ints) -> HiddenStates:
        """Those rows, in order; they no longer wait."""

    def missing(self, request_id: str, end: int) -> int:
        """How many of the request's last positions before `end` are not as at full depth."""

    def overdue(self) -> set[str]:
        """Requests that must run the next step at full depth."""

    def forget(self, request_id: str) -> None:
        """The request has ended, or its keys and values were thrown away."""


class ExactKV(KVPolicy):
    """Exited rows wait, and run the layers they skipped with the next token that goes there.

    Whatever a token attends to in a layer is what full depth would have put there. To the layers
    the rows that wait are a small chunk of a prompt: weights are read once for all of them. Rows of
    a request below a later exit point come before those below an earlier one.
    """

    defers = True

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._pool = RowPool()
        # By request, then exit point: places in the pool, in order of positions.
        self._waiting: OrderedDict[str, dict[int, list[Ints]]] = OrderedDict()

    @override
    def leave(
        self, exit_index: int, requests: Ints, batch: Batch, states: HiddenStates, step: StepContext
    ) -> None:
        rows = step.layout.rows_of(requests)
        places = self._pool.free_places(len(rows))
        rows_on_device, places_on_device = step.on_device(rows, places)
        self._pool.put(states.rows(rows_on_device), places_on_device)
        ends = np.cumsum(step.layout.lens[requests])
        by_request = np.split(places, ends[:-1])
        for request, request_places in zip(requests.tolist(), by_request, strict=True):
            below = self._waiting.setdefault(step.request_ids[request], {})
            below.setdefault(exit_index, []).append(request_places)

    @override
    def waiting(self, exit_index: int, step: StepContext, leaving: Ints) -> Ints | None:
        if not self._waiting:
            return None
        counts = step.layout.lens * 0
        stay = set(step.layout.present.tolist()) - set(leaving.tolist())
        for request in stay:
            below = self._waiting.get(step.request_ids[request])
            if below is not None:
                counts[request] = _count(below.get(exit_index, ()))
        return counts if counts.any() else None

    @override
    def rejoin(self, exit_index: int, step: StepContext, waiting: Ints) -> HiddenStates:
        joining: list[Ints] = []
        for request in waiting.nonzero()[0].tolist():
            request_id = step.request_ids[request]
            joining += self._waiting[request_id].pop(exit_index)
            if not self._waiting[request_id]:
                del self._waiting[request_id]
        places = np.concatenate(joining)
        states = self._pool.rows(step.on_device(places)[0])
        self._pool.give_back(places)
        return states

    def _num_waiting(self, request_id: str) -> int:
        return sum(map(_count, self._waiting.get(request_id, {}).values()))

    @override
    def missing(self, request_id: str, end: int) -> int:
        return self._num_waiting(request_id)

    @override
    def overdue(self) -> set[str]:
        overdue: set[str] = set()
        excess = self._pool.taken - self._capacity
        for request_id in self._waiting if excess > 0 else ():
            overdue.add(request_id)
            excess -= self._num_waiting(request_id)
            if excess <= 0:
                break
        return overdue

    @override
    def forget(self, request_id: str) -> None:
        for below in self._waiting.pop(request_id, {}).values():
            for places in below:
                self._pool.give_back(places)


class RecurrentKV(ExactKV):
    """As `ExactKV`, where some layers keep a state for each request instead of keys and values.

    Rows that wait go through such a layer in order, before the later row that they go with. What
    the prefix cache keeps of it is the state at the end of a block; rows that waited leave only the
    state after all of them. So nothing from the first row on that waited is ever complete.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        super().__init__(capacity)
        self._left = FirstToLeave()

    @override
    def leave(
        self, exit_index: int, requests: Ints, batch: Batch, states: HiddenStates, step: StepContext
    ) -> None:
        super().leave(exit_index, requests, batch, states, step)
        self._left.note(requests, step)

    @override
    def missing(self, request_id: str, end: int) -> int:
        return self._left.since(request_id, end)

    @override
    def forget(self, request_id: str) -> None:
        super().forget(request_id)
        self._left.forget(request_id)


class PropagateKV(KVPolicy):
    """Layers that a row skips get keys and values made of the state it left with.

    Cheap, and close only where the state would have changed little: tokens after it attend to
    something else than at full depth, in the layers it skipped, for as long as the request lives.
    """

    defers = False

    def __init__(self) -> None:
        self._left = FirstToLeave()

    @override
    def leave(
        self, exit_index: int, requests: Ints, batch: Batch, states: HiddenStates, step: StepContext
    ) -> None:
        [rows] = step.on_device(step.layout.rows_of(requests))
        leaving = step.layout.only(requests)
        batch.fill_kv(exit_index, states.rows(rows).combined(), leaving)
        self._left.note(requests, step)

    @override
    def waiting(self, exit_index: int, step: StepContext, leaving: Ints) -> None:
        return None

    @override
    def rejoin(self, exit_index: int, step: StepContext, waiting: Ints) -> HiddenStates:
        raise AssertionError("no rows wait")

    @override
    def missing(self, request_id: str, end: int) -> int:
        return self._left.since(request_id, end)

    @override
    def overdue(self) -> set[str]:
        return set()

    @override
    def forget(self, request_id: str) -> None:
        self._left.forget(request_id)


class FirstToLeave:
    """Of each request, the first position whose row has left early."""

    def __init__(self) -> None:
        self._first: dict[str, int] = {}

    def note(self, requests: Ints, step: StepContext) -> None:
        """All rows that `requests` have in the batch are about to leave."""
        firsts = step.layout.last_positions - step.layout.lens + 1
        for request in requests.tolist():
            self._first.setdefault(step.request_ids[request], int(firsts[request]))

    def since(self, request_id: str, end: int) -> int:
        """How many positions before `end` come at or after the request's."""
        return max(0, end - self._first.get(request_id, end))

    def forget(self, request_id: str) -> None:
        """The request starts again, or never comes back."""
        self._first.pop(request_id, None)


def _count(places: Iterable[Ints]) -> int:
    return sum(map(len, places))
