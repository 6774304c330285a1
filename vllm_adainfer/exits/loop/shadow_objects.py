"""Shadow requests for objects, which full depth writes in the steps after the early decision.

The scheduler reads what was written once the request has ended, and tells all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from vllm_adainfer.arrays import Ints
from vllm_adainfer.exits.accounting.counters import PolicyStats
from vllm_adainfer.exits.loop.shadow import warn
from vllm_adainfer.exits.loop.step import StepContext
from vllm_adainfer.policy.policy_set import PolicySet
from vllm_adainfer.promise.links import ByField
from vllm_adainfer.promise.promise import Promise
from vllm_adainfer.watch.watch import Watch


class EarlyObject(NamedTuple):
    """The object of a shadow request by the heads of a policy.

    Attributes:
        policy: the policy's name.
        monitor: the policy's monitor.
        promise: what it promises.
        level: the level of the request among the monitor's.
        code: the object, see `ByField.code`; None where no exit point settled the request: then
            both agree.

    """

    policy: str
    monitor: Watch
    promise: Promise
    level: int
    code: int | None


class ShadowObjects:
    """Early objects that are still to be compared. Each goes with its request."""

    def __init__(self) -> None:
        """Begin without any."""
        self._early: dict[str, EarlyObject] = {}

    def __len__(self) -> int:
        """How many there are."""
        return len(self._early)

    def decided(
        self, step: StepContext, owners: Ints, policies: PolicySet, monitors: Mapping[str, Watch]
    ) -> None:
        """Expect the objects of the shadow requests that a step has decided.

        `owners` [requests] are the places of those who decided them among `policies`.
        """
        if step.shadow is None:
            return
        decided = step.shadow[step.codes[step.shadow] >= 0]
        rows = policies.own_rows(step.threshold_rows[decided], owners[decided])
        settled = step.settled(decided)
        for place, row, is_settled in zip(decided.tolist(), rows, settled.tolist(), strict=True):
            owner = int(owners[place])
            name, promise = policies.names[owner], policies.policies[owner].promise
            level = int(monitors[name].levels_of(row))
            code = int(step.codes[place]) if is_settled else None
            early = EarlyObject(name, monitors[name], promise, level, code)
            self.expect(step.request_ids[place], early)

    def expect(self, request_id: str, early: EarlyObject) -> None:
        """A shadow request has been decided, and now goes on to the end of its own object."""
        self._early[request_id] = early
        for watch in (early.monitor, *early.monitor.labels):
            watch.expect(request_id, early.level)

    def compare(
        self,
        request_id: str,
        code: int,
        monitors: Mapping[str, Watch],
        stats: Mapping[str, PolicyStats],
    ) -> None:
        """Compare with the object that a request has written, count, and warn of a broken bound.

        A negative `code` is no object of the policy, so another one. Nothing counts of requests
        that were not decided, or by a policy that has gone.
        """
        early = self._early.pop(request_id, None)
        if early is None or monitors.get(early.policy) is not early.monitor:
            return
        monitor, own = early.monitor, stats[early.policy]
        answer = code if early.code is None else early.code
        wrong = answer != code  # whatever is promised beside, another object is wrong
        epsilon = float(monitor.epsilons[early.level])
        own.shadow_checked[epsilon] += 1
        own.shadow_disagreed[epsilon] += wrong
        self._observe(request_id, early, monitor, wrong)
        link = early.promise.link
        assert isinstance(link, ByField), "answers are objects"
        for watch in monitor.labels:
            assert watch.about is not None
            bound, column = watch.about
            labels = [link.label_beside(column, one) if one >= 0 else -1 for one in (answer, code)]
            if bound.chosen_by(*labels) != column:
                continue
            changed = labels[0] != labels[1]
            key = epsilon, bound.kind, bound.label
            own.labels_checked[key] += 1
            own.labels_changed[key] += changed
            self._observe(request_id, early, watch, changed)

    def _observe(self, request_id: str, early: EarlyObject, watch: Watch, differs: bool) -> None:
        broken = watch.observe([request_id], np.array([early.level]), np.array([differs]))
        warn(early.policy, watch, broken)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._early.pop(request_id, None)
