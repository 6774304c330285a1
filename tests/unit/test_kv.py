from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from vllm_adainfer.exits.kv import ExactKV, PropagateKV
from vllm_adainfer.exits.layout import RowLayout
from vllm_adainfer.exits.residual import Stream
from vllm_adainfer.exits.step import Rows
from vllm_adainfer.exits.transfer import upload


def step_of(lens: list[int], last_positions: list[int]) -> Any:
    layout = RowLayout(np.array(lens), np.array(last_positions))
    names = [f"request {place}" for place in range(len(lens))]
    return SimpleNamespace(
        request_ids=names,
        layout=layout,
        rows=rows,
        on_device=lambda *arrays: upload(arrays, torch.device("cpu")),
    )


def rows(layout: RowLayout) -> Rows:
    positions = torch.from_numpy(layout.positions)
    return Rows(positions, {"layer": positions})


def stream(step: Any) -> Stream:
    """Parts [rows, 1] that name request and position of each row."""
    layout = step.layout
    return Stream(
        torch.from_numpy(layout.owners).unsqueeze(1).float(),
        torch.from_numpy(layout.positions).unsqueeze(1).float(),
    )


NOBODY = np.array([], dtype=np.int64)


def test_exact_gives_rows_back_in_order_of_requests_and_positions():
    kv = ExactKV()
    first, second = step_of([2, 1], [1, 7]), step_of([1, 1], [2, 8])
    kv.leave(0, np.array([0, 1]), stream(first), first)
    kv.leave(0, np.array([0]), stream(second), second)
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
    kv.leave(0, np.array([0, 1]), stream(step), step)
    assert kv.waiting(0, step, leaving=np.array([0])).tolist() == [0, 1]


def test_exact_misses_what_waits_and_forgets_it_with_the_request():
    kv, step = ExactKV(), step_of([3, 1], [2, 5])
    kv.leave(1, np.array([0, 1]), stream(step), step)
    assert (kv.missing("request 0", 3), kv.missing("request 1", 6)) == (3, 1)
    kv.forget("request 0")
    kv.forget("never heard of")
    assert (kv.missing("request 0", 3), kv.missing("request 1", 6)) == (0, 1)


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
        kv.leave(0, np.array([place]), stream(step), step)
    assert kv.overdue() == overdue


@pytest.mark.parametrize("how", ["rejoin", "forget"])
def test_rows_that_wait_no_more_leave_their_places_to_others(how):
    kv, step = ExactKV(), step_of([3, 1], [2, 5])
    kv.leave(0, np.array([0, 1]), stream(step), step)
    assert kv._pool.taken == 4
    if how == "rejoin":
        kv.rejoin(0, step, kv.waiting(0, step, NOBODY))
    else:
        for request_id in step.request_ids:
            kv.forget(request_id)
    assert kv._pool.taken == 0


def test_what_waits_does_not_keep_the_states_of_the_whole_batch_alive():
    kv, step = ExactKV(), step_of([1, 500], [4, 499])
    batch = stream(step)
    parts = [StorageWeakRef(part.untyped_storage()) for part in (batch.hidden, batch.residual)]
    kv.leave(0, np.array([0]), batch, step)
    assert not any(part.expired() for part in parts)
    del batch
    gc.collect()
    assert all(part.expired() for part in parts)


def test_propagate_fills_the_rows_that_leave_with_their_states():
    calls = []
    kv = PropagateKV(lambda *arguments: calls.append(arguments))
    step = step_of([2, 1, 1], [1, 7, 3])
    kv.leave(2, np.array([0, 2]), stream(step), step)
    [(exit_index, filled, positions, slots)] = calls
    assert exit_index == 2
    assert filled.flatten().tolist() == [0 + 0, 0 + 1, 2 + 3]
    assert positions.tolist() == slots["layer"].tolist() == [0, 1, 3]
    assert kv.waiting(2, step, NOBODY) is None
    assert kv.overdue() == set()


def test_propagate_misses_all_from_the_first_row_that_left():
    kv, step = PropagateKV(lambda *arguments: None), step_of([3], [12])
    assert kv.missing("request 0", 13) == 0
    kv.leave(0, np.array([0]), stream(step), step)
    assert kv.missing("request 0", 13) == 3
    later = step_of([1], [15])
    kv.leave(0, np.array([0]), stream(later), later)
    assert kv.missing("request 0", 16) == 6
    kv.forget("request 0")
    assert kv.missing("request 0", 16) == 0
