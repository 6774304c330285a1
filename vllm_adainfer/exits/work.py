"""Work: rows x layers of a step as they are run, skipped for good, or deferred.

Rows count for the policy that their request came under, even when they run layers in a later step
in which the request has another tag. So for each policy, at any time,

    run + skipped + still waiting = rows that came x layers

and each of the counters only ever grows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_adainfer.exits.counters import ExitStats, PolicyStats
from vllm_adainfer.exits.layout import Ints


class Work:
    """An engine's work, and the part of it that waits.

    Attributes:
        stats: the counters.
        names: of policies, in the order of their owners' indices.

    """

    def __init__(
        self, stats: ExitStats, names: Sequence[str], exit_layers: Sequence[int], depth: int
    ) -> None:
        """For a model with `depth` layers whose rows can leave after `exit_layers`."""
        self.stats = stats
        self.names = names
        self._layers_below = [depth - layer for layer in exit_layers]
        self._depth = depth
        # By request, then exit point (an index): [policies], the rows that wait there.
        self._waiting: dict[str, dict[int, Ints]] = {}

    def use_names(self, names: Sequence[str]) -> None:
        """Policies have come or gone; one that has gone is last while rows of it wait."""
        waiting = [rows for below in self._waiting.values() for rows in below.values()]
        still = np.sum(waiting, axis=0).nonzero()[0].tolist() if waiting else []
        kept = [self.names[index] for index in still if self.names[index] not in names]
        former, self.names = list(self.names), (*names, *kept)
        columns = [former.index(name) if name in former else -1 for name in self.names]
        for below in self._waiting.values():
            for exit_index, rows in below.items():
                below[exit_index] = np.append(rows, 0)[columns]

    def step(self, owners: Ints, request_ids: Sequence[str], lens: Ints) -> StepWork:
        """A step begins.

        Args:
            owners: [requests], the policy (an index) that each comes under.
            request_ids: vLLM's.
            lens: [requests], rows of each.

        """
        rows = np.zeros((len(owners), len(self.names)), dtype=np.int64)
        rows[np.arange(len(owners)), owners] = lens
        self.stats.passes_possible += self._depth
        for policy, count in self.by_policy(rows.sum(axis=0)):
            policy.layers_possible += count * self._depth
        return StepWork(self, request_ids, owners, rows)

    def defer(self, request_id: str, exit_index: int, rows: Ints) -> None:
        """`rows` [policies] of a request wait below an exit point."""
        for policy, count in self.by_policy(rows):
            policy.layers_deferred += count * self._layers_below[exit_index]
        below = self._waiting.setdefault(request_id, {})
        below[exit_index] = below.get(exit_index, 0) + rows

    def take(self, request_id: str, exit_index: int) -> Ints:
        """[policies], the rows of a request below an exit point, which no longer wait."""
        below = self._waiting[request_id]
        rows = below.pop(exit_index)
        if not below:
            del self._waiting[request_id]
        return rows

    def forget(self, request_id: str) -> None:
        """A request has ended, or starts anew: its waiting rows are never run."""
        for exit_index, rows in self._waiting.pop(request_id, {}).items():
            self.skip(exit_index, rows)

    def skip(self, exit_index: int, rows: Ints) -> None:
        """`rows` [policies] never run the layers below an exit point."""
        self.spare(rows, self._layers_below[exit_index])

    def spare(self, rows: Ints, layers: int) -> None:
        """`rows` [policies] never run so many layers."""
        for policy, count in self.by_policy(rows):
            policy.layers_skipped += count * layers

    def run(self, rows: Ints, layers: int) -> None:
        """`rows` [policies] have run `layers`."""
        for policy, count in self.by_policy(rows):
            policy.layers_run += count * layers

    def by_policy(self, rows: Ints) -> list[tuple[PolicyStats, int]]:
        """The policies that have some of `rows` [policies], and how many."""
        return [
            (self.stats.by_policy[self.names[index]], int(rows[index]))
            for index in rows.nonzero()[0].tolist()
        ]


class StepWork:
    """The rows of one step, by the policy they came under."""

    def __init__(self, work: Work, request_ids: Sequence[str], owners: Ints, rows: Ints) -> None:
        """`rows` are [requests, policies]; see `Work.step`."""
        self._work = work
        self._request_ids = request_ids
        self._owners = owners
        self._rows = rows
        self._in_batch = work.by_policy(rows.sum(axis=0))

    def ran(self, layers: int) -> None:
        """The batch has run `layers`."""
        self._work.stats.passes_run += layers
        for policy, count in self._in_batch:
            policy.layers_run += count * layers

    def ran_apart(self, rows: Ints, layers: int, batches: int, spared: int = 0) -> None:
        """`rows` [policies] have run `layers` in so many batches of their own.

        `spared` is the number of layers that they never run.
        """
        self._work.stats.passes_run += layers * batches
        self._work.run(rows, layers)
        self._work.spare(rows, spared)

    def keep_last_rows(self, requests: Ints, layers: int) -> None:
        """All rows of `requests` but the last are spared the `layers` that are left."""
        spared = self._rows[requests]
        spared[np.arange(len(requests)), self._owners[requests]] -= 1
        self._work.spare(spared.sum(axis=0), layers)
        self._rows[requests] -= spared
        self._in_batch = self._work.by_policy(self._rows.sum(axis=0))

    def leave(self, exit_index: int, requests: Ints) -> None:
        """`requests` leave the batch at an exit point and never run the layers below."""
        self._work.skip(exit_index, self._rows[requests].sum(axis=0))
        self._remove(requests)

    def defer(self, exit_index: int, requests: Ints) -> None:
        """`requests` leave the batch at an exit point, to run the layers below in a later step."""
        for request in requests.tolist():
            request_id = self._request_ids[request]
            self._work.defer(request_id, exit_index, self._rows[request].copy())
        self._remove(requests)

    def join(self, exit_index: int, requests: Ints) -> None:
        """Rows of `requests` that waited below an exit point have joined the batch."""
        for request in requests.tolist():
            self._rows[request] += self._work.take(self._request_ids[request], exit_index)
        self._in_batch = self._work.by_policy(self._rows.sum(axis=0))

    def take(self, exit_index: int, requests: Ints) -> Ints:
        """[policies], rows of `requests` below an exit point, which no longer wait."""
        taken = [self._work.take(self._request_ids[request], exit_index) for request in requests]
        return np.sum(taken, axis=0)

    def decided(self, requests: Ints, depth: int) -> None:
        """Tokens of `requests` were decided after `depth` layers."""
        counts = np.bincount(self._owners[requests], minlength=len(self._work.names))
        for policy, tokens in self._work.by_policy(counts):
            policy.exit_histogram[depth] += tokens

    def _remove(self, requests: Ints) -> None:
        self._rows[requests] = 0
        self._in_batch = self._work.by_policy(self._rows.sum(axis=0))
