"""The last layer runs only the rows that are sampled, where that pays.

The toy's states are the places that rows had in the original batch; its layers leave them alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.test_accounting import EmptyBatch
from tests.unit.test_step import step_of
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


def rows_of(forward: ForwardPass) -> list[int]:
    return forward.states.hidden.flatten().tolist()


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


def test_of_a_request_with_a_draft_all_rows_that_are_sampled_run_the_last_layer():
    lens, sampled = [ENOUGH + 5, 3, 4], np.array([3, 1, 4])
    forward = forward_of(lens, sampled_lens=sampled)
    forward.drop_unsampled()
    last = np.cumsum(lens)
    assert rows_of(forward) == [
        row for end, count in zip(last, sampled, strict=True) for row in range(end - count, end)
    ]
    assert forward.layout.query_lens.tolist() == sampled.tolist()
