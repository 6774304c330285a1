from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.batch.layout import RowLayout
from vllm_adainfer.exits.kv.policies import ExactKV, RecurrentKV

NAMES = [f"request {place}" for place in range(3)]


def leave(
    kv: Any,
    exit_index: int,
    query_lens: list[int],
    last_positions: list[int],
    requests: tuple[int, ...] = (0,),
    policy: int = 0,
) -> HiddenStates:
    """Let requests leave a batch, whose states name request and position of each row."""
    layout = RowLayout(np.array(query_lens), np.array(last_positions))
    states = HiddenStates(
        torch.from_numpy(layout.row_requests).unsqueeze(1).float(),
        torch.from_numpy(layout.positions).unsqueeze(1).float(),
    )
    rows = layout.rows_of(np.array(requests))
    leaving = layout.only(np.array(requests))
    policies = np.full(len(rows), policy)
    kv.leave(exit_index, NAMES, leaving, rows, policies, states)
    return states


def test_where_layers_keep_a_state_nothing_from_the_first_row_that_waited_is_ever_complete():
    """Also when the rows have gone through: the state in between is nowhere."""
    kv = RecurrentKV()
    leave(kv, 0, [3, 1], [7, 5], requests=(0,))
    leave(kv, 1, [1, 1], [8, 6], requests=(0, 1))
    kv.rejoin(0, NAMES, np.array([3, 0, 0]))
    assert (kv.missing("request 0", 9), kv.missing("request 1", 7)) == (4, 1)
    assert (kv.missing("request 0", 5), kv.missing("request 2", 7)) == (0, 0)
    kv.forget("request 0")
    assert kv.missing("request 0", 9) == 0


@pytest.mark.parametrize("kind", [ExactKV, RecurrentKV])
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
def test_beyond_the_capacity_the_oldest_are_overdue(kind, capacity, overdue):
    kv = kind(capacity)
    for place, rows in enumerate([2, 1, 3]):
        lens = [0, 0, 0]
        lens[place] = rows
        leave(kv, 0, lens, [9, 9, 9], requests=(place,))
    assert kv.overdue() == overdue


@pytest.mark.parametrize("how", ["rejoin", "forget"])
def test_rows_that_wait_no_more_leave_their_places_to_others(how):
    kv = ExactKV()
    leave(kv, 0, [3, 1], [2, 5], requests=(0, 1))
    assert kv.taken == 4
    if how == "rejoin":
        kv.rejoin(0, NAMES, np.array([3, 1, 0]))
    else:
        for request_id in NAMES:
            kv.forget(request_id)
    assert kv.taken == 0


def test_what_waits_does_not_keep_the_states_of_the_whole_batch_alive():
    kv = ExactKV()
    batch = leave(kv, 0, [1, 500], [4, 499])
    parts = [StorageWeakRef(part.untyped_storage()) for part in (batch.hidden, batch.residual)]
    assert not any(part.expired() for part in parts)
    del batch
    gc.collect()
    assert all(part.expired() for part in parts)
