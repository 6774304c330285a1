"""The policies of one engine: one for each calibrated task, at the exit points of them all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from vllm_adainfer.config import NO_POLICY
from vllm_adainfer.policy.exit_policy import ExitPolicy

Ints = npt.NDArray[np.int64]


def first_tags(levels: Iterable[int]) -> list[int]:
    """The first tag of each policy, given how many tags each has: they are numbered through."""
    return [0, *accumulate(levels)][:-1]


@dataclass(frozen=True)
class Asked:
    """Rows that one policy is to decide.

    Attributes:
        policy: its place in the set.
        exit_index: which of its own exit points this is.
        rows: int64 [asked], which of the rows in question.

    """

    policy: int
    exit_index: int
    rows: Ints


class PolicySet:
    """Several policies as the exit loop sees them.

    A request's tag says both which policy decides it and the number this policy knows it by.
    """

    def __init__(
        self, policies: Mapping[str, ExitPolicy], exit_points: Sequence[int] | None = None
    ) -> None:
        """`policies` by name, in order of their tags.

        `exit_points` are where the stack is cut, ascending, if at more than theirs.
        """
        self.policies = tuple(policies.values())
        self.names = (*policies, NO_POLICY)
        own = {point for policy in self.policies for point in policy.exit_points}
        self.exit_points = tuple(sorted(own) if exit_points is None else exit_points)
        counts = [policy.num_tags for policy in self.policies]
        self._first = np.array(first_tags(counts))
        # By tag; the last entry is for -1, the tag of those that may not exit.
        self._owner = np.repeat(np.arange(len(counts) + 1), [*counts, 1])
        self._at = [
            [
                (index, policy.exit_points.index(point))
                for index, policy in enumerate(self.policies)
                if point in policy.exit_points
            ]
            for point in self.exit_points
        ]

    def owners(self, tags: Ints) -> Ints:
        """[requests], the policy (its place in `names`) of each of `tags`."""
        owners: Ints = self._owner[tags]
        return owners

    def own_tags(self, tags: Ints, owners: Ints) -> Ints:
        """[requests], the numbers by which their policies know them; all may exit."""
        own: Ints = tags - self._first[owners]
        return own

    def asked(self, exit_index: int, owners: Ints) -> Iterator[Asked]:
        """Who decides which of the rows with `owners` [rows] at an exit point, and who at all."""
        for policy, own_index in self._at[exit_index]:
            rows = np.flatnonzero(owners == policy)
            if rows.size:
                yield Asked(policy, own_index, rows)
