"""What a step asks of a GPU: so many launches, uploads and reads that wait, and no more.

Counted on a CPU, see `tests/launches.py`. Each number is what the code needs now: whoever lowers it
lowers it here, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.launches import Launches, counted
from tests.tiny import EXIT_POINTS, LAYERS, tiny_config, tiny_tensors
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.engine.cuda_graphs.decode_buffers import DecodeBuffers
from vllm_adainfer.engine.segments.attention import StepAttention
from vllm_adainfer.exits.batch.batch import StackShape
from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.batch.layout import RowLayout
from vllm_adainfer.exits.kv.policies import ExactKV
from vllm_adainfer.exits.loop.exit_loop import ExitLoop
from vllm_adainfer.exits.loop.step import StepContext
from vllm_adainfer.policy.load_policy import policy_of
from vllm_adainfer.policy.policy_set import PolicySet

CPU = torch.device("cpu")
ROWS, WIDTH = 16, 64
NEVER, ALWAYS = 9.0, -9.0  # thresholds of a gap


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of Triton, as on a GPU."""
    monkeypatch.setattr("adainfer_kernels.backend.resolve_backend", lambda *_: "triton")


@pytest.mark.parametrize(("groups", "launches"), [(1, 4), (2, 7)])
def test_a_decode_batch_is_put_into_the_graphs_buffers(groups, launches):
    """By KV cache group the table, the block and the slot; and the slots of padding."""
    tables = [torch.randint(0, 99, (8, 12), dtype=torch.int32) for _ in range(groups)]
    buffers = DecodeBuffers(8, tables, CPU)
    attention = StepAttention([], tables, [16] * groups, CPU)
    layout = RowLayout(np.array([1, 0, 1, 1, 0]), np.array([7, 8, 30, 100, 5]))
    with counted() as device:
        buffers.stage(layout, attention, 4)
    assert device.asked == {"launches": launches, "uploads": 1, "reads": 0}
    for table, slots in zip(tables, buffers.slots_of(4), strict=True):
        expected = [
            int(table[request, position // 16]) * 16 + position % 16
            for request, position in ((0, 7), (2, 30), (3, 100))
        ]
        assert slots.tolist() == [*expected, -1]


@pytest.mark.parametrize(("groups", "launches"), [(1, 3), (2, 6)])
def test_a_compacted_batch_gets_its_slots_and_tables(groups, launches):
    """By KV cache group; what each backend's builder launches comes on top."""
    tables = [torch.randint(0, 99, (8, 12), dtype=torch.int32) for _ in range(groups)]
    attention = StepAttention([[] for _ in tables], tables, [16] * groups, CPU)
    with counted() as device:
        attention.metadata(RowLayout(np.array([5, 0, 3]), np.array([7, 8, 30])))
    # `metadata_of` has no builder to ask here, so the tables are all that it would be given.
    assert device.asked == {"launches": launches, "uploads": 1, "reads": 0}


class Layers:
    """In place of the layers, which are not counted here."""

    def run(self, segment: int, states: HiddenStates) -> HiddenStates:
        hidden = torch.ones(len(states.hidden), WIDTH)
        return HiddenStates(hidden, None if segment == len(EXIT_POINTS) else hidden)

    def compact(self, layout: RowLayout, last_layer_only: bool = False) -> Layers:
        return self

    side_batch = compact

    def write_last_kv(self, states: HiddenStates) -> None:
        """Is the layers' work."""


def decode_step(model: Path, threshold: float, full_depth: int = 0, **changes: Any) -> Launches:
    """What a decode step asks, of whose requests the first `full_depth` may not exit."""
    config = tiny_config(model)
    thresholds = torch.full((config.num_threshold_rows, len(EXIT_POINTS)), threshold)
    artifact = Artifact(config, tiny_tensors(config, thresholds), "", None)
    policy = policy_of(artifact, CPU, lambda _: pytest.fail("a label head needs no logit lens"))
    segments = np.diff([0, *EXIT_POINTS, LAYERS]).tolist()
    loop = ExitLoop(
        StackShape(segments, WIDTH),
        PolicySet({"labels": policy}, EXIT_POINTS),
        ExactKV(),
        {},
        max_rows=ROWS,
        read=lambda values: device.read(values),
        **changes,
    )
    rows = np.zeros(ROWS, dtype=np.int64)
    rows[:full_depth] = -1
    step = StepContext(
        request_ids=list(map(str, range(ROWS))),
        layout=RowLayout(np.ones(ROWS, dtype=np.int64), np.full(ROWS, 30)),
        yields_token=np.ones(ROWS, dtype=bool),
        threshold_rows=rows,
        continues=np.zeros(ROWS, dtype=bool),
    )
    ids: Tensor = torch.zeros(ROWS, dtype=torch.int64)
    with counted() as device:
        loop.run(Layers(), ids, step)
    del device.kernels["aten::ones"]  # the layers
    return device


def asked(launches: int = 0, uploads: int = 0, reads: int = 0) -> dict[str, int]:
    return {"launches": launches, "uploads": uploads, "reads": reads}


def test_a_step_in_which_no_request_may_exit(tiny_model):
    assert decode_step(tiny_model, NEVER, full_depth=ROWS).asked == asked()


def test_each_exit_point_where_all_are_asked_and_none_leaves(tiny_model):
    """The residual is added, thresholds are looked up, and one kernel scores and decides."""
    points = len(EXIT_POINTS)
    device = decode_step(tiny_model, NEVER)
    assert device.asked == asked(launches=3 * points, uploads=points, reads=points)
    assert device.kernels["score_kernel"] == points


def test_nobody_is_asked_where_nobody_could_leave_by_the_answer(tiny_model):
    assert decode_step(tiny_model, ALWAYS, full_depth=ROWS - 2).asked == asked()


def test_all_leave_at_the_first_exit_point(tiny_model):
    """Beside the question: the requests are uploaded, and their scores picked."""
    assert decode_step(tiny_model, ALWAYS).asked == asked(launches=4, uploads=2, reads=1)


def test_half_leave_at_the_first_exit_point_and_half_may_not(tiny_model):
    """States are picked of those that are asked, then of those that stay, and put back at the end.

    What attention metadata and the layers' own work ask comes on top.
    """
    device = decode_step(tiny_model, ALWAYS, full_depth=ROWS // 2, compaction_cost=1)
    assert device.asked == asked(launches=11, uploads=5, reads=1)
