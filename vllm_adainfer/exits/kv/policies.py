"""KV policies: what later tokens find in the layers that an exited row has skipped.

Only rows of requests that continue to another token matter: nobody reads those of the others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.exits.batch.batch import Batch
from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.batch.layout import RowLayout
from vllm_adainfer.exits.batch.upload import upload
from vllm_adainfer.exits.kv.row_pool import RowPool

# The most rows that may wait. Above it requests run the next step at full depth, oldest first.
CAPACITY = 4096


@dataclass(frozen=True)
class LeavingRows:
    """Rows of requests that continue to another token and are about to leave the batch.

    Attributes:
        exit_index: the exit point at which they leave.
        request_ids: vLLM's ids of the step's requests.
        layout: the rows that leave, and no others.
        rows: [rows], their places in the batch.
        policies: [rows], the policy that each is accounted to.
        states: those of the whole batch at the exit point.
        batch: the whole batch.

    """

    exit_index: int
    request_ids: Sequence[str]
    layout: RowLayout
    rows: Ints
    policies: Ints
    states: HiddenStates
    batch: Batch


class KVPolicy:
    """Takes care of the keys and values of exited rows.

    This base leaves out the layers that a row skips: nothing from the first row on that has left
    is ever complete. A loop that no row leaves needs no more.

    Attributes:
        defers: whether rows that leave wait, and run the layers they skipped later.

    """

    defers = False

    def __init__(self) -> None:
        self._first: dict[str, int] = {}  # by request, the first position that has left

    @property
    def taken(self) -> int:
        """The number of rows that wait."""
        return 0

    def leave(self, leaving: LeavingRows) -> None:
        """Rows are about to leave: all that their requests have in the batch."""
        layout = leaving.layout
        firsts = layout.last_positions - layout.query_lens + 1
        for request in layout.present.tolist():
            self._first.setdefault(leaving.request_ids[request], int(firsts[request]))

    def waiting(self, exit_index: int, request_ids: Sequence[str], wanted: Bools) -> Ints | None:
        """The number of rows that wait below an exit point, [requests]; None if none do.

        `wanted` [requests] chooses the requests; for others it is 0.
        """
        return None

    def rejoin(
        self, exit_index: int, request_ids: Sequence[str], waiting: Ints
    ) -> tuple[HiddenStates, Ints]:
        """Those rows, which wait no more, in order: their states, and the policies of each."""
        raise AssertionError("no rows wait")

    def missing(self, request_id: str, end: int) -> int:
        """How many of the request's last positions before `end` are not as at full depth."""
        return max(0, end - self._first.get(request_id, end))

    def overdue(self) -> set[str]:
        """Requests that must run the next step at full depth."""
        return set()

    def forget(self, request_id: str) -> Iterable[tuple[int, Ints]]:
        """The request has ended, or its keys and values were thrown away.

        Returns the rows that no longer wait: exit point, and the policy of each row.
        """
        self._first.pop(request_id, None)
        return ()


class ExactKV(KVPolicy):
    """Exited rows wait, and run the layers they skipped with the next token that goes there.

    In each layer a token attends to exactly what full depth would have put there. Layers process
    waiting rows like a small prefill chunk: weights are read once for all of them. Rows of a
    request below a later exit point have earlier positions than those below an earlier one.

    This is the only record of waiting rows: it also holds the policy that each is accounted to.
    """

    defers = True

    def __init__(self, capacity: int = CAPACITY) -> None:
        super().__init__()
        self._capacity = capacity
        # States before the first layer have no residual: those of the first exit point are apart.
        self._pools = RowPool(), RowPool()
        # By request, then exit point, in order of positions: int64 [2, rows], the places in its
        # pool and the policies.
        self._waiting: OrderedDict[str, dict[int, list[Ints]]] = OrderedDict()

    @property
    @override
    def taken(self) -> int:
        return sum(pool.taken for pool in self._pools)

    def _pool(self, exit_index: int) -> RowPool:
        return self._pools[min(exit_index, 1)]

    @override
    def leave(self, leaving: LeavingRows) -> None:
        layout, states, pool = leaving.layout, leaving.states, self._pool(leaving.exit_index)
        places = pool.free_places(layout.num_rows)
        rows_on_device, places_on_device = upload((leaving.rows, places), states.device)
        pool.put(states.rows(rows_on_device), places_on_device)
        requests = layout.present
        by_request = np.split(
            np.stack([places, leaving.policies]), layout.ends[requests[:-1]], axis=1
        )
        for request, chunk in zip(requests.tolist(), by_request, strict=True):
            below = self._waiting.setdefault(leaving.request_ids[request], {})
            below.setdefault(leaving.exit_index, []).append(chunk)

    @override
    def waiting(self, exit_index: int, request_ids: Sequence[str], wanted: Bools) -> Ints | None:
        if not self._waiting:
            return None
        counts = np.zeros(len(request_ids), dtype=np.int64)
        for request in np.flatnonzero(wanted).tolist():
            below = self._waiting.get(request_ids[request])
            if below is not None:
                counts[request] = _count(below.get(exit_index, ()))
        return counts if counts.any() else None

    @override
    def rejoin(
        self, exit_index: int, request_ids: Sequence[str], waiting: Ints
    ) -> tuple[HiddenStates, Ints]:
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

    @override
    def missing(self, request_id: str, end: int) -> int:
        return self._num_waiting(request_id)

    @override
    def overdue(self) -> set[str]:
        overdue: set[str] = set()
        excess = self.taken - self._capacity
        for request_id in self._waiting if excess > 0 else ():
            overdue.add(request_id)
            excess -= self._num_waiting(request_id)
            if excess <= 0:
                break
        return overdue

    @override
    def forget(self, request_id: str) -> Iterable[tuple[int, Ints]]:
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

    missing = KVPolicy.missing

    @override
    def leave(self, leaving: LeavingRows) -> None:
        super().leave(leaving)
        KVPolicy.leave(self, leaving)

    @override
    def forget(self, request_id: str) -> Iterable[tuple[int, Ints]]:
        KVPolicy.forget(self, request_id)
        return super().forget(request_id)


class PropagateKV(KVPolicy):
    """Layers that a row skips get keys and values made of the state it left with.

    This is cheap, and close only where the state would have changed little: in the layers it
    skipped, later tokens attend to something else than at full depth for as long as the request
    lives.
    """

    @override
    def leave(self, leaving: LeavingRows) -> None:
        super().leave(leaving)
        [rows] = upload((leaving.rows,), leaving.states.device)
        states = leaving.states.rows(rows).combined()
        leaving.batch.fill_kv(leaving.exit_index, states, leaving.layout)


def _count(chunks: Iterable[Ints]) -> int:
    return sum(chunk.shape[1] for chunk in chunks)
