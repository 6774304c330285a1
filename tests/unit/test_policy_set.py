from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.policy.policy_set import PolicySet, first_threshold_rows
from vllm_adainfer.settings.engine import NO_POLICY


def policy(exit_points: tuple[int, ...], num_threshold_rows: int) -> Any:
    return SimpleNamespace(
        exit_points=exit_points,
        num_threshold_rows=num_threshold_rows,
        probe_inputs=(ProbeInput.LAST_TOKEN,) * len(exit_points),
    )


def slow_owners(policies: dict[str, Any]) -> list[tuple[int, int | None]]:
    """Policy and own number of each threshold row, one by one; the last is that of -1."""
    rows: list[tuple[int, int | None]] = []
    for place, one in enumerate(policies.values()):
        for own in range(one.num_threshold_rows):
            rows.append((place, own))
    return [*rows, (len(policies), None)]


def slow_parts(policies: dict[str, Any], layer: int, owners: list[int]) -> list[Any]:
    """Each policy that has an exit point after `layer`, and the rows that are its own."""
    found = []
    for place, one in enumerate(policies.values()):
        rows = [row for row, owner in enumerate(owners) if owner == place]
        if layer in one.exit_points and rows:
            found.append((place, one.exit_points.index(layer), rows))
    return found


def parts_of(policies: PolicySet, exit_index: int, owners: Any) -> list[Any]:
    return [
        (part.policy, part.exit_index, part.rows.tolist())
        for part in policies.rows_by_policy(exit_index, np.array(owners, dtype=np.int64))
    ]


@pytest.mark.parametrize(
    ("levels", "firsts"), [([], []), ([3], [0]), ([3, 2], [0, 3]), ([1, 4, 1, 2], [0, 1, 5, 6])]
)
def test_threshold_rows_are_numbered_on_from_policy_to_policy(levels, firsts):
    assert first_threshold_rows(levels) == firsts
    assert first_threshold_rows(iter(levels)) == firsts


def test_without_policies_every_request_runs_to_full_depth():
    policies = PolicySet({}, (3,))
    assert policies.owners(np.array([-1, -1])).tolist() == [0, 0]
    assert policies.names == (NO_POLICY,)
    assert parts_of(policies, 0, [0, 0]) == []


@pytest.mark.parametrize("wider", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_random_sets_do_what_writing_it_all_down_does(seed, wider):
    generator = np.random.default_rng(seed)
    some = {
        str(number): policy(
            tuple(sorted(generator.choice(np.arange(1, 12), generator.integers(1, 5), False))),
            int(generator.integers(1, 5)),
        )
        for number in range(generator.integers(1, 5))
    }
    points = tuple(range(1, 12)) if wider else None
    policies, slow = PolicySet(some, points), slow_owners(some)
    union = sorted(set().union(*(one.exit_points for one in some.values())))
    assert list(policies.exit_points) == (list(points) if points else union)
    assert policies.names == (*some, NO_POLICY)
    rows = generator.integers(-1, len(slow) - 1, 40)
    owners = policies.owners(rows)
    assert owners.tolist() == [slow[tag][0] for tag in rows]
    may_exit = rows >= 0
    own = policies.own_rows(rows[may_exit], owners[may_exit])
    assert own.tolist() == [slow[tag][1] for tag in rows[may_exit]]
    for index, layer in enumerate(policies.exit_points):
        assert parts_of(policies, index, owners) == slow_parts(some, layer, owners.tolist())
