from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vllm_adainfer.exits.layout import RowLayout
from vllm_adainfer.exits.step import REGROUP_COST, StepContext


def ints(*values: int) -> Any:
    return np.array(values, dtype=np.int64)


def make(
    query_lens: list[int],
    sampled: list[bool] | None = None,
    tags: list[int] | None = None,
    shadow: list[bool] | None = None,
    all_rows_count: bool = False,
) -> StepContext:
    """A step in which each row's position is its place in the batch."""
    count = len(query_lens)
    return StepContext(
        [f"id {place}" for place in range(count)],
        RowLayout(ints(*query_lens), np.cumsum(query_lens) - 1),
        np.array([True] * count if sampled is None else sampled),
        ints(*([0] * count if tags is None else tags)),
        np.ones(count, dtype=np.bool_),
        None if shadow is None else np.array(shadow),
        all_rows_count,
    )


def rows_ready(step: StepContext) -> int:
    return int(step.layout.lens[step.ready()].sum())


def compact(step: StepContext) -> tuple[int, list[int]]:
    """Let all leave who are ready: how many, and the rows that stay."""
    leaving = step.ready()
    return len(leaving), step.regroup(leaving).tolist()


def original_rows(step: StepContext) -> list[int]:
    """Where the rows were in the original batch."""
    output = torch.full((1000, 1), -1.0)
    step.scatter(torch.arange(float(step.layout.num_rows)).unsqueeze(1), output)
    found = (output[:, 0] >= 0).nonzero().squeeze(1)
    return found[output[found, 0].argsort()].tolist()


def test_at_first_every_sampled_and_admitted_request_is_undecided():
    step = make([3, 1, 4, 2], sampled=[True, False, True, True], tags=[0, 1, -1, 2])
    assert step.undecided().tolist() == [0, 3]
    assert step.num_sampled == 3
    assert step.num_requests == 4
    assert step.exited.tolist() == []
    assert rows_ready(step) == 0


@pytest.mark.parametrize("tag", [-1, 0, 5])
def test_a_request_with_more_chunks_to_come_is_never_undecided(tag):
    step = make([4, 2, 3], sampled=[False, True, True], tags=[tag, 0, 0])
    assert step.undecided().tolist() == [1, 2]
    step.settle(ints(1))
    compact(step)
    assert step.undecided().tolist() == [2]
    step.settle(ints(2))
    compact(step)
    assert step.undecided().tolist() == []
    assert step.exited.tolist() == [1, 2]
    assert step.sampled_rows(ints(0)).tolist() == [3]


def test_the_last_row_of_a_request_decides_it_wherever_the_batch_has_moved_it():
    step = make([2, 3, 1, 4])  # rows 0-1, 2-4, 5, 6-9
    assert step.sampled_rows(ints(0, 1, 2, 3)).tolist() == [1, 4, 5, 9]
    step.settle(ints(1))
    compact(step)  # now rows 0-1, 2, 3-6
    assert step.sampled_rows(ints(0, 2, 3)).tolist() == [1, 2, 6]
    step.settle(ints(0))
    compact(step)  # now rows 0, 1-4
    assert step.sampled_rows(ints(2, 3)).tolist() == [0, 4]
    assert step.original_sampled_rows(ints(0, 1, 2, 3)).tolist() == [1, 4, 5, 9]


def test_compacting_keeps_the_rows_of_those_that_stay():
    step = make([2, 3, 1, 4])
    step.settle(ints(1, 2))
    assert rows_ready(step) == 4
    left, kept = compact(step)
    assert (left, kept) == (2, [0, 1, 6, 7, 8, 9])
    assert rows_ready(step) == 0
    step.settle(ints(3))
    assert rows_ready(step) == 4
    left, kept = compact(step)
    assert (left, kept) == (1, [0, 1])
    assert step.exited.tolist() == [1, 2, 3]


def test_settled_requests_stay_until_the_batch_is_compacted():
    step = make([2, 3, 1])
    step.settle(ints(1))
    assert step.undecided().tolist() == [0, 2]
    assert step.exited.tolist() == []
    assert step.sampled_rows(ints(2)).tolist() == [5]
    step.settle(ints(2))
    assert rows_ready(step) == 4
    assert compact(step)[0] == 2


def test_all_may_leave():
    step = make([2, 3])
    step.settle(ints(0, 1))
    left, kept = compact(step)
    assert (left, kept) == (2, [])
    assert step.undecided().tolist() == []


def test_a_shadow_request_is_decided_and_stays():
    step = make([2, 3, 1, 4], shadow=[True, False, True, False])
    assert step.shadow.tolist() == [0, 2]
    assert step.undecided().tolist() == [0, 1, 2, 3]
    step.settle(ints(0, 1))
    assert step.undecided().tolist() == [2, 3]
    assert step.settled(step.shadow).tolist() == [True, False]
    assert rows_ready(step) == 3
    left, kept = compact(step)
    assert (left, kept) == (1, [0, 1, 5, 6, 7, 8, 9])
    assert step.exited.tolist() == [1]
    step.settle(ints(2, 3))
    assert step.settled(step.shadow).tolist() == [True, True]
    left, kept = compact(step)
    assert (left, kept) == (1, [0, 1, 2])
    assert step.exited.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("sampled", "tag"), [(False, 0), (True, -1)], ids=["more chunks follow", "at full depth"]
)
def test_only_a_request_that_may_exit_is_a_shadow(sampled, tag):
    step = make([2, 3], sampled=[sampled, True], tags=[tag, 0], shadow=[True, True])
    assert step.shadow.tolist() == [1]


def test_the_layout_is_of_the_requests_and_rows_that_remain():
    step = make([2, 3, 1, 4])
    step.settle(ints(1))
    compact(step)
    assert (step.layout.present.tolist(), step.layout.positions.tolist()) == (
        [0, 2, 3],
        [0, 1, 5, 6, 7, 8, 9],
    )
    step.settle(ints(0))
    compact(step)
    assert (step.layout.present.tolist(), step.layout.positions.tolist()) == (
        [2, 3],
        [5, 6, 7, 8, 9],
    )


def test_the_last_layer_asks_for_the_last_row_of_each_request_that_remains():
    step = make([40, 3, 150], sampled=[True, True, False])  # rows 0-39, 40-42, 43-192
    step.settle(ints(0))
    compact(step)
    assert step.keep_last_rows(1).tolist() == [2, 152]
    assert step.layout.present.tolist() == [1, 2]
    assert step.layout.positions.tolist() == [42, 192]
    assert original_rows(step) == [42, 192]
    step.settle(ints(1))
    assert compact(step) == (1, [1])
    assert original_rows(step) == [192]


def test_the_more_layers_rows_are_spared_the_fewer_rows_are_worth_it():
    lens = [REGROUP_COST["cpu"] // 4 + 1, 1]
    assert make(lens).keep_last_rows(3) is None
    assert make(lens).keep_last_rows(4).tolist() == [lens[0] - 1, lens[0]]


def test_only_rows_that_leave_out_layers_with_keys_and_values_lack_some():
    step = make([1, 2, 3])
    step.settle(ints(0, 2))
    step.note_all_kv(ints(2))
    compact(step)
    assert step.exited.tolist() == [0, 2]
    assert step.lacking_kv.tolist() == [0]


@pytest.mark.parametrize(
    ("lens", "all_rows_count"),
    [([1, 1, 1], False), ([REGROUP_COST["cpu"] - 1, 2], False), ([500, 9], True)],
    ids=["one row each", "not worth new metadata", "all are wanted"],
)
def test_otherwise_the_last_layer_is_as_vllm_runs_it(lens, all_rows_count):
    assert make(lens, all_rows_count=all_rows_count).keep_last_rows(1) is None


class ObviousStep:
    """The same bookkeeping as a list of (request, original row), one entry a row."""

    def __init__(self, query_lens: list[int], sampled: list[bool], tags: list[int]) -> None:
        owners = [request for request, rows in enumerate(query_lens) for _ in range(rows)]
        self.batch = [(request, row) for row, request in enumerate(owners)]
        self.original = list(self.batch)
        self.may_exit = [s and t >= 0 for s, t in zip(sampled, tags, strict=True)]
        self.settled: set[int] = set()
        self.left: set[int] = set()

    def undecided(self) -> list[int]:
        return [r for r, may in enumerate(self.may_exit) if may and r not in self.settled]

    def last_row(self, batch: list[tuple[int, int]], request: int) -> int:
        return max(place for place, (owner, _) in enumerate(batch) if owner == request)

    def remaining(self) -> list[int]:
        return sorted({request for request, _ in self.batch})

    def rows_ready(self) -> int:
        return sum(request in self.settled for request, _ in self.batch)

    def compact(self) -> tuple[int, list[int]]:
        leaving = {request for request, _ in self.batch if request in self.settled}
        kept = [place for place, (owner, _) in enumerate(self.batch) if owner not in leaving]
        self.left |= leaving
        self.batch = [self.batch[place] for place in kept]
        return len(leaving), kept


@pytest.mark.parametrize("seed", range(40))
def test_the_bookkeeping_is_that_of_a_plain_list_of_rows(seed):
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 9))
    lens = generator.integers(1, 6, count).tolist()
    sampled = (generator.random(count) < 0.8).tolist()
    tags = generator.integers(-1, 3, count).tolist()
    step, oracle = make(lens, sampled, tags), ObviousStep(lens, sampled, tags)
    states = torch.arange(float(sum(lens))).unsqueeze(1)
    remaining = states
    for _ in range(4):
        undecided = step.undecided().tolist()
        assert undecided == oracle.undecided()
        assert step.is_open == bool(undecided)
        rows = [oracle.last_row(oracle.batch, request) for request in undecided]
        assert step.sampled_rows(ints(*undecided)).tolist() == rows
        settled = [request for request in undecided if generator.random() < 0.4]
        step.settle(ints(*settled))
        oracle.settled |= set(settled)
        assert rows_ready(step) == oracle.rows_ready()
        if generator.random() < 0.4:
            continue
        left, kept = compact(step)
        assert (left, kept) == oracle.compact()
        remaining = remaining[kept]
        assert step.exited.tolist() == sorted(oracle.left)
        original = [row for _, row in oracle.batch]
        assert step.layout.present.tolist() == oracle.remaining()
        assert step.layout.positions.tolist() == original
        assert remaining.flatten().tolist() == original
        assert original_rows(step) == original
    everyone = list(range(count))
    assert step.original_sampled_rows(ints(*everyone)).tolist() == [
        oracle.last_row(oracle.original, request) for request in everyone
    ]
