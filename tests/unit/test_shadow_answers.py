from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_adainfer.models import agreement
from vllm_adainfer.models.shadow import ShadowAnswers

LABELS = SimpleNamespace(answer_ids=torch.tensor([7, 3]), restricted=True)
SHORTLIST = SimpleNamespace(answer_ids=torch.tensor([3, 7]), restricted=False)


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "get_tp_group", lambda: SimpleNamespace(world_size=1))


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
        name="default",
        policy=LABELS,
        request_ids=["a", "b"],
        tags=np.array([0, 1]),
        settled=np.array([False, True]),
        requests=torch.tensor([2]),
        answers=torch.tensor([early]),
    )
    assert shadow.disagreed(logits, head).tolist() == [False, disagreed]


@pytest.mark.parametrize(
    ("full", "disagreed"), [({7: 5.0}, False), ({3: 5.0}, True), ({7: 5.0, 1: 9.0}, True)]
)
def test_a_shortlists_answer_is_compared_with_any_token(full, disagreed):
    logits = torch.full((1, 10), -1.0)
    for token, score in full.items():
        logits[0, token] = score
    shadow = ShadowAnswers(
        name="default",
        policy=SHORTLIST,
        request_ids=["a"],
        tags=np.array([0]),
        settled=np.array([True]),
        requests=torch.tensor([0]),
        answers=torch.tensor([[1.0, 2.0]]),
    )
    assert shadow.disagreed(logits, head).tolist() == [disagreed]


@pytest.mark.parametrize("answers", [None, torch.empty(0, 2)], ids=["of nobody", "of others only"])
def test_what_no_exit_point_settles_agrees(answers):
    shadow = ShadowAnswers(
        name="default",
        policy=LABELS,
        request_ids=["a", "b"],
        tags=np.array([0, 1]),
        settled=np.array([False, False]),
        requests=torch.empty(0, dtype=torch.int64),
        answers=answers,
    )
    assert shadow.disagreed(torch.zeros(2, 10), head).tolist() == [False, False]
