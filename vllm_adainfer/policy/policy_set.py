"""The policies of one engine, one per calibrated task, and their exit points combined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.policy.exit_policy import ExitPolicy
from vllm_adainfer.settings.engine import NO_POLICY


def first_threshold_rows(counts: Iterable[int]) -> list[int]:
    """The first threshold row of each policy, given how many each has; they are numbered on."""
    return [0, *accumulate(counts)][:-1]


@dataclass(frozen=True)
class PolicyRows:
    """The rows that one policy reads at an exit point.

    Attributes:
        policy: index of the policy in the set.
        exit_index: index of this exit point among the policy's own.
        probe_input: what the policy reads there.
        rows: int64 [rows of this policy], indices into all rows.

    """

    policy: int
    exit_index: int
    probe_input: ProbeInput
    rows: Ints


class PolicySet:
    """Several policies, as the exit loop sees them.

    Threshold rows are numbered across the policies, so a request's row also names its policy.

    Attributes:
        policies: the policies, in order of their threshold rows.
        names: their names, then `NO_POLICY` for requests that may not exit.
        exit_points: layers after which the model is cut, ascending.

    """

    def __init__(
        self, policies: Mapping[str, ExitPolicy], exit_points: Sequence[int] | None = None
    ) -> None:
        """Combine `policies`, by name; `exit_points` None means those of the policies."""
        self.policies = tuple(policies.values())
        self.names = (*policies, NO_POLICY)
        points = {point for policy in self.policies for point in policy.exit_points}
        self.exit_points = tuple(sorted(points) if exit_points is None else exit_points)
        counts = [policy.num_threshold_rows for policy in self.policies]
        self._first = np.array(first_threshold_rows(counts))
        # Indexed by threshold row; the last entry serves -1, of requests that may not exit.
        self._owner = np.repeat(np.arange(len(counts) + 1), [*counts, 1])
        self._at = [
            {
                index: policy.exit_points.index(point)
                for index, policy in enumerate(self.policies)
                if point in policy.exit_points
            }
            for point in self.exit_points
        ]

    @cached_property
    def answers_stand(self) -> Bools:
        """[names], whether the answers of each policy do, see `ExitPolicy`."""
        return np.array([*(policy.answers_stand for policy in self.policies), False])

    @cached_property
    def any_exit_point(self) -> Bools:
        """[names], whether each policy may be asked at any exit point, see `ExitPolicy`."""
        return np.array([*(policy.any_exit_point for policy in self.policies), False])

    def reads(self, probe_input: ProbeInput) -> bool:
        """Whether any policy reads this of a request."""
        return any(probe_input in policy.probe_inputs for policy in self.policies)

    def owners(self, threshold_rows: Ints) -> Ints:
        """The policy of each threshold row, as an index into `names`."""
        owners: Ints = self._owner[threshold_rows]
        return owners

    def own_rows(self, threshold_rows: Ints, owners: Ints) -> Ints:
        """Each row's number within its policy; none may be that of `NO_POLICY`."""
        own: Ints = threshold_rows - self._first[owners]
        return own

    def rows_by_policy(self, exit_index: int, owners: Ints) -> Iterator[PolicyRows]:
        """For each policy that reads rows at an exit point, those rows; `owners` is [rows]."""
        at = self._at[exit_index]
        for policy in np.unique(owners).tolist():  # a step has few of all policies
            if policy in at:
                probe_input = self.policies[policy].probe_inputs[at[policy]]
                yield PolicyRows(policy, at[policy], probe_input, np.flatnonzero(owners == policy))
