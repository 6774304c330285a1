from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_adainfer.models.shadow import ShadowAnswers

LABEL_IDS = torch.tensor([7, 3])


def head(states: torch.Tensor) -> torch.Tensor:
    raise AssertionError("label scores need no head")


@pytest.mark.parametrize(
    ("early", "full", "disagreed"),
    [
        ([2.0, 1.0], {7: 5.0, 3: 4.0}, False),
        ([2.0, 1.0], {7: 4.0, 3: 5.0}, True),
        ([2.0, 1.0], {7: 5.0, 3: 4.0, 1: 9.0}, False),
        ([2.0, 1.0], {7: 5.0, 3: 5.0}, True),
        ([1.0, 2.0], {7: 5.0, 3: 5.0}, False),
    ],
    ids=["same", "other", "no label is best", "tie goes to the lower id", "and agrees with it"],
)
def test_labels_are_compared_as_the_sampler_chooses_among_them(early, full, disagreed):
    logits = torch.full((3, 10), -1.0)
    for token, score in full.items():
        logits[2, token] = score
    shadow = ShadowAnswers(
        tags=np.array([0, 1]),
        settled=np.array([False, True]),
        requests=torch.tensor([2]),
        answers=torch.tensor([early]),
    )
    assert shadow.disagreed(logits, LABEL_IDS, head).tolist() == [False, disagreed]


@pytest.mark.parametrize("answers", [None, torch.empty(0, 2)], ids=["of nobody", "of others only"])
def test_what_no_exit_point_settles_agrees(answers):
    shadow = ShadowAnswers(
        tags=np.array([0, 1]),
        settled=np.array([False, False]),
        requests=torch.empty(0, dtype=torch.int64),
        answers=answers,
    )
    assert shadow.disagreed(torch.zeros(2, 10), LABEL_IDS, head).tolist() == [False, False]
