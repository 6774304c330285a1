"""Objects at exit points: what is kept of a decision until it is known who leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.unit.test_exit_loop import (
    FIRST_EXIT,
    FULL_DEPTH,
    PROMPTS,
    SECOND_EXIT,
    ExitByRow,
    Toy,
)
from vllm_adainfer.exits.loop.step import StepContext
from vllm_adainfer.policy.answers import Answers
from vllm_adainfer.policy.exit_policy import Decision, UndecidedRows
from vllm_adainfer.policy.policy_set import PolicySet

EXITS = [SECOND_EXIT, FULL_DEPTH, FIRST_EXIT, SECOND_EXIT]


class OfObjects(ExitByRow):
    """Objects of one field with two values, in the order in which requests were asked."""

    decides_objects = True

    def __init__(self) -> None:
        super().__init__((2, 4))
        self.remembered: list[Tensor | None] = []

    def decide(self, exit_index: int, rows: UndecidedRows) -> Decision:
        self.remembered.append(rows.memory)
        count = len(rows.threshold_rows)
        values = torch.arange(3.0 * count).view(count, 3) + 100 * exit_index
        answers = Answers(values, torch.arange(2), of_labels=True, has_rest=True)
        return Decision(
            rows.threshold_rows == exit_index,
            answers,
            memory=10.0 * torch.arange(count) + exit_index,
            codes=torch.arange(count),
        )


@pytest.fixture
def decided() -> tuple[OfObjects, StepContext, Any]:
    toy, policy, steps = Toy(), OfObjects(), []
    toy.loop.use_policies(PolicySet({"toy": policy}), {})
    run = toy.loop.run

    def noting(batch: Any, ids: Tensor, step: StepContext) -> Any:
        steps.append(step)
        return run(batch, ids, step)

    toy.loop.run = noting
    reads = np.array([True, True, True, False])
    _, output = toy.step(
        PROMPTS,
        EXITS,
        continues=np.zeros(4, bool),
        guess_rows=[(0,)] * 4,
        reads_values=reads,
    )
    [step] = steps
    return policy, step, output


def test_a_classifier_over_all_exit_points_sees_what_it_said_at_earlier_ones(decided):
    """Of the requests that are asked again: the third has left."""
    policy, _, _ = decided
    first, second = policy.remembered
    assert first is None
    assert second is not None
    assert second.tolist() == [0, 20], "of the first and the third that were asked"


def test_the_log_probabilities_of_values_are_kept_for_early_objects_that_read_them(decided):
    """From the exit point where each left, without the column of the label mass."""
    _, step, output = decided
    assert step.codes.tolist() == [0, -1, 1, 1]
    assert output.objects.tolist() == [0, 2, 3]
    assert step.value_logprobs == {0: (100, 101), 2: (3, 4)}
    assert output.scored == (), "no logits tell of objects"
