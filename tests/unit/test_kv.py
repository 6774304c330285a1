from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from vllm_adainfer.exits.hidden_states import HiddenStates
from vllm_adainfer.exits.kv import ExactKV, PropagateKV, RecurrentKV
from vllm_adainfer.exits.layout import RowLayout
from vllm_adainfer.exits.transfer import upload


def step_of(lens: list[int], last_positions: list[int]) -> Any:
    layout = RowLayout(np.array(lens), np.array(last_positions))
    names = [f"request {place}" for place in range(len(lens))]
    return SimpleNamespace(
        request_ids=names,
        layout=layout,
        on_device=lambda *arrays: upload(arrays, torch.device("cpu")),
    )


class Filled:
    """A batch that notes what keys and values were made of."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[float], list[int]]] = []

    def fill_kv(self, exit_index: int, states: torch.Tensor, layout: RowLayout) -> None:
        self.calls.append((exit_index, states.flatten().tolist(), layout.positions.tolist()))


def states(step: Any) -> HiddenStates:
    """Parts [rows, 1] that name request and position of each row."""
    layout = step.layout
    return HiddenStates(
        torch.from_numpy(layout.row_requests).unsqueeze(1).float(),
        torch.from_numpy(layout.positions).unsqueeze(1).float(),
    )


NOBODY = np.array([], dtype=np.int64)


def test_exact_gives_rows_back_in_order_of_requests_and_positions():
    kv = ExactKV()
    first, second = step_of([2, 1], [1, 7]), step_of([1, 1], [2, 8])
    kv.leave(0, np.array([0, 1]), Filled(), states(first), first)
    kv.leave(0, np.array([0]), Filled(), states(second), second)
    later = step_of([1, 1], [3, 9])
    assert kv.waiting(1, later, NOBODY) is None
    waiting = kv.waiting(0, later, NOBODY)
    assert waiting.tolist() == [3, 1]
    joining = kv.rejoin(0, later, waiting)
    assert joining.hidden.flatten().tolist() == [0, 0, 0, 1]
    assert joining.residual.flatten().tolist() == [0, 1, 2, 7]
    assert kv.waiting(0, later, NOBODY) is None


def test_rows_of_a_request_that_leaves_again_keep_waiting():
    kv, step = ExactKV(), step_of([1, 1], [4, 4])
    kv.leave(0, np.array([0, 1]), Filled(), states(step), step)
    assert kv.waiting(0, step, leaving=np.array([0])).tolist() == [0, 1]


def test_exact_misses_what_waits_and_forgets_it_with_the_request():
    kv, step = ExactKV(), step_of([3, 1], [2, 5])
    kv.leave(1, np.array([0, 1]), Filled(), states(step), step)
    assert (kv.missing("request 0", 3), kv.missing("request 1", 6)) == (3, 1)
    kv.forget("request 0")
    kv.forget("never heard of")
    assert (kv.missing("request 0", 3), kv.missing("request 1", 6)) == (0, 1)


def test_where_layers_keep_a_state_nothing_from_the_first_row_that_waited_is_ever_complete():
    """Also when the rows have gone through: the state in between is nowhere."""
    kv, prompt, later = RecurrentKV(), step_of([3, 1], [7, 5]), step_of([1, 1], [8, 6])
    kv.leave(0, np.array([0]), Filled(), states(prompt), prompt)
    kv.leave(1, np.array([0, 1]), Filled(), states(later), later)
    kv.rejoin(0, later, kv.waiting(0, later, NOBODY))
    assert (kv.missing("request 0", 9), kv.missing("request 1", 7)) == (4, 1)
    assert (kv.missing("request 0", 5), kv.missing("request 2", 7)) == (0, 0)
    kv.forget("request 0")
    assert kv.missing("request 0", 9) == 0


@pytest.mark.parametrize(
    ("capacity", "overdue"),
    [
        (6, set()),
        (5, {"request 0"}),
        (4, {"request 0"}),
        (3, {"request 0", "request 1"}),
        (0, {"request 0", "request 1", "request 2"}),
    ],
)
def test_beyond_the_capacity_the_oldest_are_overdue(capacity, overdue):
    kv = ExactKV(capacity)
    for place, rows in enumerate([2, 1, 3]):
        lens = [0, 0, 0]
        lens[place] = rows
        step = step_of(lens, [9, 9, 9])
        kv.leave(0, np.array([place]), Filled(), states(step), step)
    assert kv.overdue() == overdue


@pytest.mark.parametrize("how", ["rejoin", "forget"])
def test_rows_that_wait_no_more_leave_their_places_to_others(how):
    kv, step = ExactKV(), step_of([3, 1], [2, 5])
    kv.leave(0, np.array([0, 1]), Filled(), states(step), step)
    assert kv._pool.taken == 4
    if how == "rejoin":
        kv.rejoin(0, step, kv.waiting(0, step, NOBODY))
    else:
        for request_id in step.request_ids:
            kv.forget(request_id)
    assert kv._pool.taken == 0


def test_what_waits_does_not_keep_the_states_of_the_whole_batch_alive():
    kv, step = ExactKV(), step_of([1, 500], [4, 499])
    batch = states(step)
    parts = [StorageWeakRef(part.untyped_storage()) for part in (batch.hidden, batch.residual)]
    kv.leave(0, np.array([0]), Filled(), batch, step)
    assert not any(part.expired() for part in parts)
    del batch
    gc.collect()
    assert all(part.expired() for part in parts)


def test_propagate_fills_the_rows_that_leave_with_their_states():
    kv, batch, step = PropagateKV(), Filled(), step_of([2, 1, 1], [1, 7, 3])
    kv.leave(2, np.array([0, 2]), batch, states(step), step)
    assert batch.calls == [(2, [0 + 0, 0 + 1, 2 + 3], [0, 1, 3])]
    assert kv.waiting(2, step, NOBODY) is None
    assert kv.overdue() == set()


def test_propagate_misses_all_from_the_first_row_that_left():
    kv, step = PropagateKV(), step_of([3], [12])
    assert kv.missing("request 0", 13) == 0
    kv.leave(0, np.array([0]), Filled(), states(step), step)
    assert kv.missing("request 0", 13) == 3
    later = step_of([1], [15])
    kv.leave(0, np.array([0]), Filled(), states(later), later)
    assert kv.missing("request 0", 16) == 6
    kv.forget("request 0")
    assert kv.missing("request 0", 16) == 0
