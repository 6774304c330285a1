"""The rows of a batch are those of the requests that are left, wherever the batch has moved them.

The toy's states are the places that rows had in the original batch; its layers leave them alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.test_accounting import EmptyBatch
from tests.unit.test_step import ints, step_of
from vllm_adainfer.exits.accounting.counters import ExitStats
from vllm_adainfer.exits.accounting.layers import LayerAccounting
from vllm_adainfer.exits.batch.batch import StackShape
from vllm_adainfer.exits.kv.policies import ExactKV
from vllm_adainfer.exits.loop.forward_pass import COMPACTION_COST, ForwardPass
from vllm_adainfer.settings.engine import NO_POLICY

SHAPE = StackShape((1, 1, 1, 1), head_size=1)
ENOUGH = COMPACTION_COST


def forward_of(query_lens: list[int], *args: Any, shape: StackShape = SHAPE, **more: Any) -> Any:
    """A step of requests that do not continue."""
    more = {"continues": np.zeros(len(query_lens), dtype=np.bool_), **more}
    step = step_of(query_lens, *args, **more)
    return ForwardPass(
        shape,
        step,
        np.zeros(len(query_lens), dtype=np.int64),
        EmptyBatch(step.layout),
        torch.arange(step.layout.num_rows),
        ExactKV(),
        LayerAccounting(ExitStats(), (NO_POLICY,)),
    )


def leave(forward: ForwardPass, *requests: int) -> list[int]:
    """These requests leave; the original rows that are left."""
    forward.regroup(0, ints(*requests), None, 1 << 30)
    return rows_of(forward)


def rows_of(forward: ForwardPass) -> list[int]:
    return forward.states.hidden.flatten().tolist()


def test_leaving_keeps_the_rows_of_those_that_stay():
    forward = forward_of([2, 3, 1, 4])  # rows 0-1, 2-4, 5, 6-9
    assert leave(forward, 1, 2) == [0, 1, 6, 7, 8, 9]
    assert forward.layout.present.tolist() == [0, 3]
    assert forward.layout.last_rows(ints(0, 3)).tolist() == [1, 5]
    assert leave(forward, 3) == forward.layout.positions.tolist() == [0, 1]
    assert forward.step.exited.tolist() == [1, 2, 3]
    assert leave(forward, 0) == []


def test_final_states_go_to_the_original_rows():
    forward = forward_of([2, 3, 1])
    forward.run(0)
    leave(forward, 1)
    output = forward.finish()
    assert output.shape == (6, 1)
    assert output[[0, 1, 5], 0].tolist() == [0, 1, 5]


def test_a_batch_that_nobody_has_left_is_returned_as_it_is_with_its_padding():
    forward = forward_of([2, 3])
    forward.states = type(forward.states)(torch.arange(8))
    forward.batch.layout = step_of([8]).layout
    assert forward.finish().flatten().tolist() == list(range(8))


def test_the_last_layer_runs_the_last_row_of_each_request_that_remains():
    forward = forward_of([40, 3, 150], [True, True, False])  # rows 0-39, 40-42, 43-192
    leave(forward, 0)
    forward.drop_unsampled()
    assert rows_of(forward) == forward.layout.positions.tolist() == [42, 192]
    assert forward.finish()[[42, 192], 0].tolist() == [42, 192]


def test_the_more_layers_are_skipped_the_fewer_rows_pay_for_a_smaller_batch():
    lens = [ENOUGH // 4 + 1, 1]
    for layers, pays in [(3, False), (4, True)]:
        shape = StackShape((1, layers), head_size=1, own_kv_layers=1)
        forward = forward_of(lens, shape=shape)
        forward.drop_unsampled()
        assert (forward.layout.num_rows == 2) == pays


@pytest.mark.parametrize(
    ("lens", "all_rows_count"),
    [([1, 1, 1], False), ([ENOUGH - 1, 2], False), ([500, 9], True)],
    ids=["one row each", "does not pay", "all are wanted"],
)
def test_otherwise_the_last_layer_is_as_vllm_runs_it(lens, all_rows_count):
    forward = forward_of(lens, all_rows_count=all_rows_count)
    forward.drop_unsampled()
    assert forward.layout is forward.step.layout
    assert rows_of(forward) == list(range(sum(lens)))


@pytest.mark.parametrize("seed", range(40))
def test_the_rows_are_those_of_a_plain_list(seed):
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 9))
    lens = generator.integers(1, 6, count).tolist()
    forward, plain = forward_of(lens), [place for place, n in enumerate(lens) for _ in range(n)]
    batch = list(enumerate(plain))  # (original row, request)
    for _ in range(4):
        here = sorted({request for _, request in batch})
        leaving = [request for request in here if generator.random() < 0.4]
        batch = [(row, request) for row, request in batch if request not in leaving]
        assert leave(forward, *leaving) == [row for row, _ in batch]
        assert forward.layout.present.tolist() == sorted({request for _, request in batch})
        assert forward.layout.positions.tolist() == [row for row, _ in batch]
        assert set(forward.step.exited.tolist()) == set(plain) - {request for _, request in batch}
