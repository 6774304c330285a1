from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vllm_adainfer.exits.batch.layout import RowLayout
from vllm_adainfer.exits.loop.step import StepContext


def ints(*values: int) -> Any:
    return np.array(values, dtype=np.int64)


def step_of(
    query_lens: list[int],
    yields_token: list[bool] | None = None,
    threshold_rows: list[int] | None = None,
    **more: Any,
) -> StepContext:
    """A step in which each row's position is its place in the batch."""
    count = len(query_lens)
    arguments = {"continues": np.ones(count, dtype=np.bool_), **more}
    return StepContext(
        [f"id {place}" for place in range(count)],
        RowLayout(ints(*query_lens), np.cumsum(query_lens) - 1),
        np.array([True] * count if yields_token is None else yields_token),
        ints(*([0] * count if threshold_rows is None else threshold_rows)),
        **arguments,
    )


def leave(step: StepContext, lacks_kv: bool = True) -> list[int]:
    """All leave who are ready."""
    leaving = step.ready()
    step.leave(leaving, lacks_kv, exit_index=1)
    return leaving.tolist()


def test_at_first_every_admitted_request_that_yields_a_token_is_undecided():
    step = step_of([3, 1, 4, 2], [True, False, True, True], [0, 1, -1, 2])
    assert step.undecided().tolist() == [0, 3]
    assert (step.num_sampled, step.num_requests) == (3, 4)
    assert step.exited.tolist() == step.ready().tolist() == []
    assert step.at_full_depth().tolist() == [0, 2, 3]


@pytest.mark.parametrize("row", [-1, 0, 5])
def test_a_request_with_more_chunks_to_come_is_never_undecided(row):
    step = step_of([4, 2, 3], [False, True, True], [row, 0, 0])
    assert step.undecided().tolist() == [1, 2]
    step.settle(ints(1, 2))
    assert leave(step) == [1, 2]
    assert step.undecided().tolist() == step.at_full_depth().tolist() == []
    assert step.exited.tolist() == [1, 2]


def test_settled_requests_stay_until_they_are_told_to_leave():
    step = step_of([2, 3, 1])
    step.settle(ints(1))
    assert (step.undecided().tolist(), step.exited.tolist()) == ([0, 2], [])
    assert step.is_open
    step.settle(ints(0, 2))
    assert not step.is_open
    assert step.answered().tolist() == leave(step) == [0, 1, 2]
    assert leave(step) == []


def test_a_shadow_request_is_decided_and_stays():
    step = step_of([2, 3, 1, 4], is_shadow=np.array([True, False, True, False]))
    assert step.shadow.tolist() == [0, 2]
    assert step.undecided().tolist() == [0, 1, 2, 3]
    step.settle(ints(0, 1))
    assert step.settled(step.shadow).tolist() == [True, False]
    assert leave(step) == [1]
    step.settle(ints(2, 3))
    assert step.settled(step.shadow).tolist() == [True, True]
    assert leave(step) == [3]
    assert step.exited.tolist() == step.answered().tolist() == [1, 3]
    assert step.at_full_depth().tolist() == [0, 2]


@pytest.mark.parametrize(
    ("yields_token", "row"),
    [(False, 0), (True, -1)],
    ids=["more chunks follow", "at full depth"],
)
def test_only_a_request_that_may_exit_is_a_shadow(yields_token, row):
    step = step_of([2, 3], [yields_token, True], [row, 0], is_shadow=np.array([True, True]))
    assert step.shadow.tolist() == [1]


def test_only_rows_that_skip_layers_with_keys_and_values_lack_some():
    step = step_of([1, 2, 3])
    step.settle(ints(0))
    leave(step)
    step.settle(ints(2))
    leave(step, lacks_kv=False)
    assert (step.exited.tolist(), step.lacking_kv.tolist()) == ([0, 2], [0])


def test_the_last_row_of_each_request_yields_its_token():
    step = step_of([2, 3, 1, 4], [True, False, True, True])
    assert np.flatnonzero(step.sampled_rows()).tolist() == [1, 5, 9]


def test_a_request_that_continues_goes_on_and_so_does_a_prompt_with_chunks_to_come():
    continues = np.array([True, False, True, False])
    step = step_of([1, 1, 1, 1], [True, True, True, False], continues=continues)
    assert step.going_on().tolist() == [0, 2, 3]
    assert step.ending(ints(0, 1, 2)).tolist() == [1]


def test_one_that_is_expected_to_end_does_so_though_it_may_continue():
    step = step_of([1, 1, 1], ends_early=np.array([False, True, False]))
    assert step.ending(ints(0, 1)).tolist() == [1]
    assert step.continues.all()


def test_of_those_who_left_some_have_an_object_as_their_answer():
    step = step_of([3, 1, 5, 5], sampled_lens=ints(1, 1, 3, 3))
    assert step.drafted.tolist() == [0, 0, 2, 2]
    assert step_of([3, 1]).drafted.tolist() == [0, 0]
    step.codes[2:] = 4, 0  # of which one is not settled
    step.settle(ints(0, 3))
    assert leave(step) == [0, 3]
    assert step.early_objects.tolist() == [3]
