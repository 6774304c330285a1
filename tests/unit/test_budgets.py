"""What a step asks of a GPU: so many launches, uploads and reads that wait, and no more.

Each number is what the code needs now: whoever lowers it lowers it here, too.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.common.budgets import (
    ALWAYS,
    BLOCK,
    EXIT_POINTS,
    NEVER,
    WIDTH,
    Layers,
    compacted_batch,
    decode_step,
    label_policy,
    loop_of,
    staging,
    step_of,
)
from benchmarks.common.launches import Launches, counted
from tests import student
from vllm_adainfer.artifact.fields import LabelBound
from vllm_adainfer.engine.runner.adapters import StepAdapters
from vllm_adainfer.engine.runner.build_loop import compaction_cost_of
from vllm_adainfer.exits.batch.layout import RowLayout
from vllm_adainfer.exits.loop.forward_pass import COMPACTION_COST
from vllm_adainfer.exits.loop.step import RecordedRequests
from vllm_adainfer.exits.recording.recorder import CHUNK, served_recorder
from vllm_adainfer.policy.encoders import StateEncoder
from vllm_adainfer.policy.policy import Policy
from vllm_adainfer.policy.text_encoders import TextEncoder
from vllm_adainfer.watch.watch import Watch

ROWS = 16


def asked(
    launches: int = 0, uploads: int = 0, downloads: int = 0, reads: int = 0
) -> dict[str, int]:
    """Copies from memory that is not pinned make the host wait: there are none."""
    counts = {"launches": launches, "uploads": uploads, "downloads": downloads, "reads": reads}
    return {**counts, "pageable": 0}


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


def shadow_step(policy: Policy, promises_labels: bool = False) -> Launches:
    """What a step asks to compare half of its requests, which are all settled early."""
    watch = Watch([0.05], 0.1)
    if promises_labels:
        watch.watch_labels({LabelBound(kind="recall", label="a", epsilon=0.05): 0})
    loop = loop_of(ALWAYS, ROWS, read=lambda values: values.numpy())
    loop.monitors = {"labels": watch}
    loop.reset_counters()
    is_shadow = np.arange(ROWS) % 2 == 0
    step = replace(step_of(ROWS), is_shadow=is_shadow)
    output = loop.run(Layers(), torch.zeros(ROWS, dtype=torch.int64), step)
    [shadow] = output.shadows
    logits = torch.randn(ROWS, 99)
    with counted() as device:
        judgement = shadow.compare(logits, lambda states: states)
    judgement.judge()
    assert watch.readings()[0].checked == ROWS // 2
    return device


@pytest.mark.parametrize(
    ("promises_labels", "expected"),
    [(False, asked(launches=13, downloads=1)), (True, asked(20, uploads=1, downloads=2))],
)
def test_comparing_shadow_requests_makes_nobody_wait(promises_labels, expected):
    """The flags are on their way to the host when the step ends, and are counted later."""
    assert shadow_step(label_policy(ALWAYS), promises_labels).asked == expected


def test_rows_that_are_recorded_are_on_their_way_when_a_chunk_is_full():
    """By exit point, and for the last state, the place of each row, and its lengths."""
    chunks: list[Any] = []
    keep = served_recorder(EXIT_POINTS, lambda kinds, rows: chunks.append((kinds, rows)))
    states = [torch.zeros(CHUNK, WIDTH) for _ in range(len(EXIT_POINTS) + 1)]
    everyone = np.arange(CHUNK)
    requests = RecordedRequests(everyone, ["a"] * CHUNK, everyone, everyone)
    with counted() as device:
        keep(requests, states, states[:-1])
    assert len(chunks) == 1
    kinds_of_rows = 2 * len(EXIT_POINTS) + 3
    assert device.asked == asked(launches=kinds_of_rows + len(EXIT_POINTS), downloads=kinds_of_rows)


TEXTS = [[5, 6, 7], [8] * 60, [9, 10]]


def test_a_student_sends_its_texts_in_few_copies_and_waits_for_none():
    """One that reads texts side by side. Of padded ones, transformers makes masks that wait."""
    encoder = TextEncoder.of(student.encoder(), torch.device("cpu"))
    assert encoder.packs
    encoder(TEXTS)
    with counted() as device:
        encoder(TEXTS)
    assert (device.pageable, device.reads, device.uploads) == (0, 0, 2)


def test_a_branch_sends_where_prompts_lie_and_waits_for_nothing():
    encoder, lens = StateEncoder(WIDTH), np.array([3, 70, 2])
    rows = encoder.projected(torch.randn(int(lens.sum()), WIDTH))
    with counted() as device:
        encoder.read(rows, lens)
    assert (device.pageable, device.reads, device.uploads) == (0, 0, 3)


def test_adapters_are_mapped_again_only_where_the_rows_have_changed():
    """Each new mapping costs vLLM's GPU layers a wait of their own; equal ones are skipped."""
    mapped: list[Any] = []

    def set_active(active: set[Any], mapping: Any) -> None:
        if not mapped or mapped[-1] != mapping:  # as vLLM's manager does
            mapped.append(mapping)

    adapters = StepAdapters(SimpleNamespace(set_active_adapters=set_active), [None] * 3)
    layout = RowLayout(np.array([5, 1, 3]), np.array([7, 8, 30]))
    left, _ = layout.regroup(np.array([0]))
    for rows, segments in ((layout, 3), (left, 2)):
        use = adapters.of_rows(rows)
        for _ in range(segments):
            use()
    assert [len(mapping.index_mapping) for mapping in mapped] == [9, 4]


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
