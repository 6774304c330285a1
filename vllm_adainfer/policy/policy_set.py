"""The policies of one engine, one for each calibrated task, and their exit points combined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from vllm_adainfer.policy.exit_policy import ExitPolicy
from vllm_adainfer.settings.engine import NO_POLICY

Ints = npt.NDArray[np.int64]


def first_tags(counts: Iterable[int]) -> list[int]:
    """The first tag of each policy, given how many tags each has; tags are numbered in sequence."""
    return [0, *accumulate(counts)][:-1]


@dataclass(frozen=True)
class PolicyRows:
    """The rows that one policy decides at an exit point.

    Attributes:
        policy: index of the policy in the set.
        exit_index: index of this exit point among the policy's own.
        rows: int64 [rows of this policy], indices into all rows.

    """

    policy: int
    exit_index: int
    rows: Ints


class PolicySet:
    """Several policies, as the exit loop sees them.

    A request's tag identifies both the policy that decides it and its tag within that policy.
    """

    def __init__(
        self, policies: Mapping[str, ExitPolicy], exit_points: Sequence[int] | None = None
    ) -> None:
        """`policies` by name, in the order of their tags.

        `exit_points` are the layers where the model is cut, ascending; None means the policies'.
        """
        self.policies = tuple(policies.values())
        self.names = (*policies, NO_POLICY)
        points = {point for policy in self.policies for point in policy.exit_points}
        self.exit_points = tuple(sorted(points) if exit_points is None else exit_points)
        counts = [policy.num_tags for policy in self.policies]
        self._first = np.array(first_tags(counts))
        # Indexed by tag; the last entry serves -1, the tag of requests that may not exit.
        self._owner = np.repeat(np.arange(len(counts) + 1), [*counts, 1])
        self._at = [
            {
                index: policy.exit_points.index(point)
                for index, policy in enumerate(self.policies)
                if point in policy.exit_points
            }
            for point in self.exit_points
        ]

    def owners(self, tags: Ints) -> Ints:
        """[requests], the policy of each of `tags`, as an index into `names`."""
        owners: Ints = self._owner[tags]
        return owners

    def tags_within(self, tags: Ints, owners: Ints) -> Ints:
        """[requests], each tag within its policy; all of these requests must be able to exit."""
        within: Ints = tags - self._first[owners]
        return within

    def rows_by_policy(self, exit_index: int, owners: Ints) -> Iterator[PolicyRows]:
        """For each policy with rows to decide at an exit point, those rows; `owners` is [rows]."""
        at = self._at[exit_index]
        for policy in np.unique(owners).tolist():  # of all policies, a step has few
            if policy in at:
                yield PolicyRows(policy, at[policy], np.flatnonzero(owners == policy))
