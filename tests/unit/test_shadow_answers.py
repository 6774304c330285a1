from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.tiny import tiny_artifact, tiny_config
from tests.unit.readings import Compared, compare
from vllm_adainfer.artifact.config import UNKNOWN_GROUP
from vllm_adainfer.artifact.fields import Label
from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.engine.runner.build_loop import grouping_of, monitor_of
from vllm_adainfer.engine.startup.banner import policy_banner
from vllm_adainfer.exits.loop.shadow import warn
from vllm_adainfer.policy.answers import Answers
from vllm_adainfer.policy.policy import Policy
from vllm_adainfer.promise.probabilities import answers_of
from vllm_adainfer.settings.engine import Settings
from vllm_adainfer.watch.watch import Watch

POLICY = Compared()


def labels(*scores: float) -> Answers:
    """The answer of one row."""
    return Answers(torch.tensor([scores]), torch.tensor([7, 3]), of_labels=True)


def disagreed_of(logits: torch.Tensor, answers: Any, settled: Sequence[bool]) -> int:
    """How many of one policy's early answers are counted as different from full depth."""
    monitor, levels = watching(), [*range(len(settled))]
    stats = compare(monitor, POLICY, answers, logits, levels, settled)
    assert stats.shadow_checked.total() == len(settled)
    assert sum(one.disagreed for one in monitor.readings()) == stats.shadow_disagreed.total()
    return stats.shadow_disagreed.total()


def watching() -> Watch:
    return Watch([0.02, 0.05], alpha=0.1)


def scores_of(full: dict[int, float], rows: int = 1) -> torch.Tensor:
    """The scores of ten tokens at full depth; those of the last row as `full` has them."""
    logits = torch.full((rows, 10), -1.0)
    for token, score in full.items():
        logits[-1, token] = score
    return logits


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
    assert disagreed_of(scores_of(full, 2), labels(*early), [False, True]) == disagreed


@pytest.mark.parametrize(
    ("full", "disagreed"), [({7: 5.0}, False), ({3: 5.0}, True), ({7: 5.0, 1: 9.0}, True)]
)
def test_a_shortlists_answer_is_compared_with_any_token(full, disagreed):
    answers = Answers(torch.tensor([[1.0, 2.0]]), token_ids=torch.tensor([3, 7]))
    assert disagreed_of(scores_of(full), answers, [True]) == disagreed


@pytest.mark.parametrize(
    "answers",
    [None, Answers(torch.empty(0, 2), torch.tensor([7, 3]), of_labels=True)],
    ids=["of nobody", "of others only"],
)
def test_what_no_exit_point_settles_agrees(answers):
    assert disagreed_of(torch.zeros(2, 10), answers, [False, False]) == 0


@pytest.mark.parametrize(
    ("early", "full", "wrong", "bucket"),
    [
        ([0.9, 0.1, 0.99], [0.9, 0.1, 0.99], False, 0.001),
        ([0.9, 0.1, 0.99], [0.87, 0.13, 0.99], False, 0.05),
        ([0.9, 0.1, 0.99], [0.82, 0.18, 0.99], True, 0.1),
        ([0.508, 0.492, 0.99], [0.496, 0.504, 0.99], True, 0.02),
        ([0.9, 0.1, 0.99], [0.9, 0.1, 0.6], True, 0.5),
        ([0.9, 0.1, 0.02], [0.9, 0.1, 0.02], True, 0.001),
    ],
    ids=["same", "within", "beyond", "another label", "another mass", "no label is best"],
)
def test_probabilities_are_compared_within_the_tolerance(
    tiny_model, tmp_path, early, full, wrong, bucket
):
    """`early` and `full` are both labels' probabilities among them, and the label mass."""
    promises = {"risk": "probability", "tolerance": 0.05, "label_mass": True}
    artifact = load_artifact(str(tiny_artifact(tiny_model, tmp_path / "policy", **promises)))
    policy = Policy(artifact, torch.device("cpu"))
    ids, vocabulary = policy.answer_ids, artifact.config.vocab_size
    *labels, mass = torch.tensor(full)
    logits = torch.full((1, vocabulary), -30.0)
    logits[0, 1] = (1 - mass).log()  # one token has all that the labels leave
    logits[0, ids] = (mass * torch.stack(labels)).log()
    *labels, mass = torch.tensor(early)
    scores = torch.stack([*(label.log() for label in labels), mass.logit()]).unsqueeze(0)
    answers = Answers(answers_of(scores, vocabulary), ids, of_labels=True, has_rest=True)
    logits = logits.repeat(2, 1)
    stats = compare(watching(), policy, answers, logits, [1, 0], [True, False])
    assert stats.shadow_checked == {0.05: 1, 0.02: 1}
    assert stats.shadow_disagreed == ({0.05: 1} if wrong else {})
    assert stats.shadow_moves == {bucket: 1}


@pytest.mark.parametrize(("best", "disagreed"), [(10, 0), (12, 1), (11, 0)])
def test_of_a_pool_the_labels_of_the_request_alone_are_compared(
    tiny_model, tmp_path, best, disagreed
):
    """The early answer is 10 of the labels 10 and 12; 11 is in the pool, but not asked for."""
    labels = tuple(Label(name=str(token), token_id=token) for token in (12, 11, 10))
    pool = {"labels": labels, "label_pool": True}
    artifact = load_artifact(str(tiny_artifact(tiny_model, tmp_path / "policy", **pool)))
    policy = Policy(artifact, torch.device("cpu"))
    logits = torch.zeros(1, artifact.config.vocab_size)
    logits[0, [10, 12]] = torch.tensor([1.0, 0.5])
    logits[0, best] = 5
    answers = Answers(torch.tensor([[-1.0, -torch.inf, 3.0]]), policy.answer_ids, of_labels=True)
    stats = compare(watching(), policy, answers, logits, [1])
    assert stats.shadow_disagreed.total() == disagreed


@pytest.mark.parametrize(
    ("changes", "most", "closes"),
    [
        ({}, 1, True),
        ({"risk": "accuracy", "bound": "wsr", "largest_group": 1}, 1, False),
        ({"bound": "wsr", "largest_group": 5}, 5, True),
        ({"bound": "wsr"}, UNKNOWN_GROUP, True),
        ({"max_tokens": 32, "bound": "wsr"}, 32, True),
        ({"risk": "probability", "tolerance": 0.05}, 1, True),
    ],
    ids=["answers", "accuracy", "groups", "groups of unknown size", "texts", "probabilities"],
)
def test_each_policy_is_watched_by_the_risk_it_bounds_and_says_what_follows(
    tiny_model, caplog, changes, most, closes
):
    monitor = monitor_of(tiny_config(tiny_model, **changes), Settings(artifact="policy"))
    assert grouping_of(tiny_config(tiny_model, **changes)).most == most
    assert (monitor.alpha, monitor.epsilons.tolist()) == (0.1, [0.02, 0.05])
    for number in range(100):
        compare(monitor, POLICY, labels(2.0, 1.0), scores_of({3: 1.0}), [0], ids=[str(number)])
        warn("guard", monitor, monitor.ended(str(number)))
    assert monitor.tightened.tolist() == [closes, False]
    [warning] = [record.getMessage() for record in caplog.records]
    assert "policy guard: disagreement is above epsilon = 0.02" in warning
    further = changes.get("risk") == "probability"
    assert (
        "differ from full depth or have a probability that moves too far in " in warning
    ) == further
    assert ("run at full depth from now on" in warning) == closes
    assert ("the right answers are not known here, so nothing was closed" in warning) != closes


@pytest.mark.parametrize(
    ("changes", "promise"),
    [
        ({}, "at most 5 % of the answers changed (confidence 90%)"),
        (
            {"risk": "accuracy", "bound": "wsr"},
            "at most 5 points of accuracy lost (confidence 90%)",
        ),
    ],
)
@pytest.mark.parametrize("rate", [0, 0.25])
def test_the_start_up_line_says_what_is_bounded_and_what_shadows_can_tell_of_it(
    tiny_model, changes, promise, rate
):
    config = tiny_config(tiny_model, **changes)
    line = policy_banner("mood", config, Settings(artifact="policy", shadow_rate=rate))
    assert promise in line
    assert f"shadow rate {rate:g}" in line
    assert ("never stop exits" in line) == (rate > 0 and config.promise.reads_right)
