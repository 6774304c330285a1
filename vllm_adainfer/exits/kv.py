"""KV policies: what later tokens find in the layers that an exited row has skipped.

Only rows of requests that go on to another token matter; nobody reads those of the others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol

import numpy as np
from torch import Tensor

from vllm_adainfer.exits.layout import Ints
from vllm_adainfer.exits.residual import Stream
from vllm_adainfer.exits.row_pool import RowPool
from vllm_adainfer.exits.step import StepContext

# Rows that may wait in all; a request with more runs the next step at full depth, oldest first.
CAPACITY = 4096


class KVPolicy(Protocol):
    """What the exit loop and the runner ask of whoever sees to keys and values.

    Attributes:
        defers: True where the layers that a row skips are run for it later.

    """

    defers: bool

    def leave(self, exit_index: int, requests: Ints, stream: Stream, step: StepContext) -> None:
        """Rows of `requests`, which go on, are about to leave the batch at this exit point."""

    def waiting(self, exit_index: int, step: StepContext, leaving: Ints) -> Ints | None:
        """[requests], rows below this exit point of all but `leaving`; None if there are none."""

    def rejoin(self, exit_index: int, step: StepContext, waiting: Ints) -> Stream:
        """Those rows, in order; they wait no more."""

    def missing(self, request_id: str, end: int) -> int:
        """How many of the request's last positions before `end` are not as at full depth."""

    def overdue(self) -> set[str]:
        """Requests that are to run the next step at full depth."""

    def forget(self, request_id: str) -> None:
        """The request has ended, or its keys and values were thrown away."""


class ExactKV:
    """Rows that left wait, and run the layers they skipped with the next token that goes there.

    Whatever a token attends to in a layer is what full depth would have put there. For the rows
    that wait it is a small chunk of a prompt: weights are read once for all of them. Of a request
    the rows below a later exit point come before those below an earlier one.
    """

    defers = True

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._pool = RowPool()
        # By request, then exit point: places in the pool, in order of positions.
        self._waiting: OrderedDict[str, dict[int, list[Ints]]] = OrderedDict()

    def leave(self, exit_index: int, requests: Ints, stream: Stream, step: StepContext) -> None:
        """See `KVPolicy.leave`."""
        rows = step.layout.rows_of(requests)
        places = self._pool.free_places(len(rows))
        rows_there, places_there = step.on_device(rows, places)
        self._pool.put(stream.rows(rows_there), places_there)
        ends = np.cumsum(step.layout.lens[requests])
        for request, own in zip(requests.tolist(), np.split(places, ends[:-1]), strict=True):
            below = self._waiting.setdefault(step.request_ids[request], {})
            below.setdefault(exit_index, []).append(own)

    def waiting(self, exit_index: int, step: StepContext, leaving: Ints) -> Ints | None:
        """See `KVPolicy.waiting`."""
        if not self._waiting:
            return None
        counts = step.layout.lens * 0
        stay = set(step.layout.here.tolist()) - set(leaving.tolist())
        for request in stay:
            below = self._waiting.get(step.request_ids[request])
            if below is not None:
                counts[request] = _count(below.get(exit_index, ()))
        return counts if counts.any() else None

    def rejoin(self, exit_index: int, step: StepContext, waiting: Ints) -> Stream:
        """See `KVPolicy.rejoin`."""
        joining: list[Ints] = []
        for request in waiting.nonzero()[0].tolist():
            request_id = step.request_ids[request]
            joining += self._waiting[request_id].pop(exit_index)
            if not self._waiting[request_id]:
                del self._waiting[request_id]
        places = np.concatenate(joining)
        stream = self._pool.rows(step.on_device(places)[0])
        self._pool.give_back(places)
        return stream

    def missing(self, request_id: str, end: int) -> int:
        """See `KVPolicy.missing`: those that wait."""
        return sum(map(_count, self._waiting.get(request_id, {}).values()))

    def overdue(self) -> set[str]:
        """See `KVPolicy.overdue`: the oldest, until the rest fits."""
        overdue: set[str] = set()
        excess = self._pool.taken - self._capacity
        for request_id in self._waiting if excess > 0 else ():
            overdue.add(request_id)
            excess -= self.missing(request_id, 0)
            if excess <= 0:
                break
        return overdue

    def forget(self, request_id: str) -> None:
        """See `KVPolicy.forget`."""
        for places in self._waiting.pop(request_id, {}).values():
            for own in places:
                self._pool.give_back(own)


class PropagateKV:
    """Layers that a row skips get keys and values made of the state it left with.

    Cheap, and close only where the state would have changed little: tokens after it attend to
    something else than at full depth, in the layers it skipped, for as long as the request lives.
    """

    defers = False

    def __init__(self, fill: Fill) -> None:
        self.fill = fill
        self._exact: dict[str, int] = {}  # by request, positions before the first that left

    def leave(self, exit_index: int, requests: Ints, stream: Stream, step: StepContext) -> None:
        """See `KVPolicy.leave`."""
        [places] = step.on_device(step.layout.rows_of(requests))
        leaving = step.layout.only(requests)
        rows = step.rows(leaving)
        self.fill(exit_index, stream.rows(places).whole(), rows.positions, rows.slots)
        for request in requests.tolist():
            first = int(leaving.last_positions[request] - leaving.lens[request] + 1)
            self._exact.setdefault(step.request_ids[request], first)

    def waiting(self, exit_index: int, step: StepContext, leaving: Ints) -> None:
        """See `KVPolicy.waiting`: nobody waits."""

    def rejoin(self, exit_index: int, step: StepContext, waiting: Ints) -> Stream:
        """See `KVPolicy.rejoin`: never called."""
        raise AssertionError("nobody waits")

    def missing(self, request_id: str, end: int) -> int:
        """See `KVPolicy.missing`: all from the first that left."""
        return max(0, end - self._exact.get(request_id, end))

    def overdue(self) -> set[str]:
        """See `KVPolicy.overdue`: none, there is nothing to make good."""
        return set()

    def forget(self, request_id: str) -> None:
        """See `KVPolicy.forget`."""
        self._exact.pop(request_id, None)


class Fill(Protocol):
    """Writes keys and values of all layers after an exit point."""

    def __call__(
        self, exit_index: int, states: Tensor, positions: Tensor, slots: dict[str, Tensor]
    ) -> None:
        """For `states` [rows, hidden size] at int64 [rows] `positions`, to `slots` by layer."""


def _count(places: Iterable[Ints]) -> int:
    return sum(len(own) for own in places)
