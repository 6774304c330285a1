"""What a step asks of a GPU: so many launches, uploads and reads that wait, and no more.

Each number is what the code needs now: whoever lowers it lowers it here, too.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.common.budgets import (
    ALWAYS,
    BLOCK,
    EXIT_POINTS,
    NEVER,
    compacted_batch,
    decode_step,
    staging,
)
from vllm_adainfer.engine.runner.build_loop import compaction_cost_of
from vllm_adainfer.exits.loop.forward_pass import COMPACTION_COST

ROWS = 16


def asked(launches: int = 0, uploads: int = 0, reads: int = 0) -> dict[str, int]:
    return {"launches": launches, "uploads": uploads, "reads": reads}


@pytest.mark.parametrize(("groups", "launches"), [(1, 4), (2, 7)])
def test_a_decode_batch_is_put_into_the_graphs_buffers(groups, launches):
    """By KV cache group the table, the block and the slot; and the slots of padding."""
    device, buffers, tables = staging(groups)
    assert device.asked == asked(launches, uploads=1)
    for table, slots in zip(tables, buffers.slots_of(4), strict=True):
        expected = [
            int(table[request, position // BLOCK]) * BLOCK + position % BLOCK
            for request, position in ((0, 7), (2, 30), (3, 100))
        ]
        assert slots.tolist() == [*expected, -1]


@pytest.mark.parametrize(("groups", "launches"), [(1, 3), (2, 6)])
def test_a_compacted_batch_gets_its_slots_and_tables(groups, launches):
    assert compacted_batch(groups).asked == asked(launches, uploads=1)


def test_a_step_in_which_no_request_may_exit():
    assert decode_step(NEVER, ROWS, full_depth=ROWS).asked == asked()


def test_each_exit_point_where_all_are_asked_and_none_leaves():
    """The residual is added, thresholds are looked up, and one kernel scores and decides."""
    points = len(EXIT_POINTS)
    device = decode_step(NEVER, ROWS)
    assert device.asked == asked(launches=3 * points, uploads=points, reads=points)
    assert device.kernels["score_kernel"] == points


def test_nobody_is_asked_where_nobody_could_leave_by_the_answer():
    assert decode_step(ALWAYS, ROWS, full_depth=ROWS - 2).asked == asked()


def test_all_leave_at_the_first_exit_point():
    """Beside the question: the requests are uploaded, and their scores picked."""
    assert decode_step(ALWAYS, ROWS).asked == asked(launches=4, uploads=2, reads=1)


def test_half_leave_at_the_first_exit_point_and_half_may_not():
    """States are picked of those that are asked, then of those that stay, and put back at the end.

    What attention metadata and the layers' own work ask comes on top.
    """
    device = decode_step(ALWAYS, ROWS, full_depth=ROWS // 2, compaction_cost=1)
    assert device.asked == asked(launches=11, uploads=5, reads=1)


@pytest.mark.parametrize(("width", "cost"), [(1000, 12_500), (20_000, 31)])
def test_on_a_gpu_the_larger_the_layers_the_fewer_must_be_saved(width, cost):
    """By the products that a GPU computes in the time that a compaction takes."""
    with torch.device("meta"):
        layers = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(4)])
        layers += [nn.Linear(width, 3 * width, bias=False) for _ in range(4)]
    stack = SimpleNamespace(
        segments=[SimpleNamespace(layers=layers[:2]), SimpleNamespace(layers=layers[2:])],
        shape=SimpleNamespace(depth=4),
    )
    assert compaction_cost_of(stack, torch.device("cuda")) == cost
    assert compaction_cost_of(stack, torch.device("cpu")) == COMPACTION_COST
