"""Every promise: what is wrong, what classifiers read, what is answered, and in which words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import tiny_config
from vllm_adainfer.artifact.fields import Label
from vllm_adainfer.promise.accuracy import Accuracy
from vllm_adainfer.promise.changed import Changed
from vllm_adainfer.promise.first_documents import FirstDocuments
from vllm_adainfer.promise.gates import Gate, Gates
from vllm_adainfer.promise.links import SIGMOIDS
from vllm_adainfer.promise.probabilities import (
    LabelProbabilities,
    probabilities_of_answers,
    probabilities_of_scores,
)
from vllm_adainfer.promise.promise import Outcome, Promise, Unit
from vllm_adainfer.promise.tolerance import Tolerance

LABELS, GATE = ("a", "b"), Gate(label="a", probability=0.8)
VOCABULARY = 100
PROMISES: dict[str, Promise] = {
    "changed": Changed(),
    "accuracy": Accuracy(),
    "tolerance": Tolerance(tolerance=0.1),
    "tolerance with the mass": Tolerance(tolerance=0.1, label_mass=True).about(
        LABELS, vocabulary=VOCABULARY
    ),
    "tolerance of each label": Tolerance(tolerance=0.1).about(LABELS, SIGMOIDS),
    "gate": Gates(gates=(GATE,)).about(LABELS, vocabulary=VOCABULARY),
    "gate on the best": Gates(gates=(Gate(probability=0.6),)).about(LABELS, vocabulary=VOCABULARY),
    "gate of each label": Gates(gates=(GATE,)).about(LABELS, SIGMOIDS, VOCABULARY),
    "first documents": FirstDocuments(k=1, margin=0.2),
}
EVERY = pytest.mark.parametrize("name", PROMISES)


def outcome(name: str, among: list[float], mass: float = 1.0, is_label: bool = True) -> Outcome:
    """One row whose labels have these probabilities."""
    labels = torch.tensor([among], dtype=torch.float64)
    return Outcome(
        labels.argmax(dim=1),
        PROMISES[name].link.scores_of(labels),
        LabelProbabilities(labels, torch.tensor([mass], dtype=torch.float64)),
        torch.tensor([is_label]),
    )


A, SURER, B = [0.7, 0.3], [0.75, 0.25], [0.3, 0.7]
CASES = [
    *((name, A, A, False) for name in PROMISES),
    *((name, B, A, True) for name in ("changed", "accuracy")),
    ("changed", SURER, A, False),
    ("tolerance", SURER, A, False),
    ("tolerance", [0.55, 0.45], A, True),  # moves too far
    ("tolerance", [0.49, 0.51], [0.51, 0.49], True),  # another label is best
    ("tolerance of each label", [0.49, 0.51], [0.51, 0.49], False),  # none is the answer
    ("tolerance of each label", [0.9, 0.2], [0.9, 0.35], True),
    ("gate", [0.9, 0.1], A, True),
    ("gate", B, A, False),  # both lie below
    ("gate on the best", [0.55, 0.45], A, True),
    ("gate on the best", B, A, True),  # above, and another label
    ("gate on the best", [0.45, 0.55], [0.55, 0.45], False),  # another label, but below
    ("gate of each label", [0.9, 0.9], [0.7, 0.9], True),
    ("first documents", [0.45, 0.55], [0.52, 0.48], False),
    ("first documents", [0.4, 0.6], [0.55, 0.45], True),  # more than half of the margin
]


@pytest.mark.parametrize(("name", "early", "full", "wrong"), CASES)
def test_an_answer_is_wrong_where_it_breaks_the_promise(name, early, full, wrong):
    found = PROMISES[name].wrong(outcome(name, early), outcome(name, full))
    assert found.tolist() == [wrong]


@pytest.mark.parametrize(("mass", "is_label"), [(0.8, True), (1.0, False)])
@EVERY
def test_the_mass_and_a_best_token_that_is_no_label_count_only_where_they_are_promised(
    name, mass, is_label
):
    early, full = outcome(name, A), outcome(name, A, mass, is_label)
    wrong = name == "tolerance with the mass"
    assert PROMISES[name].wrong(early, full).tolist() == [wrong]


def scores_of(rows: int = 60) -> Tensor:
    return 3 * torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))


@EVERY
def test_classifiers_read_as_many_numbers_as_the_artifact_names(name):
    promise = PROMISES[name]
    scores = scores_of() if promise.reads_probabilities else scores_of()[:, :2]
    features = promise.features(scores)
    assert features.shape == (60, len(promise.feature_names))
    assert features.isfinite().all()


@EVERY
def test_answers_have_the_probabilities_that_the_head_gave(name):
    promise, scores = PROMISES[name], scores_of()
    answers = promise.answers(scores)
    if not promise.reads_probabilities:
        assert torch.equal(answers, scores)
        return
    found = probabilities_of_answers(answers, promise.vocabulary, promise.link)
    wanted = probabilities_of_scores(scores, promise.link)
    torch.testing.assert_close(found.among, wanted.among)
    if promise.vocabulary is None:
        assert (found.mass == 1).all()
    else:
        torch.testing.assert_close(found.mass, wanted.mass)


@EVERY
def test_the_loss_is_one_for_a_wrong_answer_and_of_accuracy_what_is_lost(name):
    promise = PROMISES[name]
    right = [{0}] if name == "accuracy" else None
    for early, full, _ in ((B, A, None), (A, B, None), (A, A, None)):
        pair = outcome(name, early), outcome(name, full)
        loss = promise.loss(*pair, right)
        assert loss.dtype == np.float64
        if name == "accuracy":
            assert loss.tolist() == [float(full is A) - float(early is A)]
        else:
            assert loss.tolist() == [float(promise.wrong(*pair).item())]


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({}, Changed, "another answer than full depth's"),
        ({"risk": "accuracy", "bound": "wsr"}, Accuracy, "a wrong answer where full depth's"),
        (
            {"risk": "probability", "tolerance": 0.05},
            Tolerance,
            "another best label than full depth's, or a label's probability that moves by more "
            "than 0.05",
        ),
        (
            {"risk": "probability", "tolerance": 0.05, "label_mass": True},
            Tolerance,
            "a label's probability (among the labels or in the whole vocabulary) that moves by",
        ),
        (
            {"risk": "probability", "gates": (Gate(label="bad", probability=0.8),)},
            Gates,
            "the probability of bad among the labels on the other side of 0.8 than at full depth",
        ),
        (
            {
                "risk": "probability",
                "top_k": FirstDocuments(k=5, margin=0.05),
                "score_head": "sigmoid",
                "labels": (Label(name="no", token_id=0), Label(name="yes", token_id=1)),
            },
            FirstDocuments,
            "a query that loses one of its first 5 documents which at full depth scores more than "
            "0.05 above the next",
        ),
    ],
)
def test_an_artifact_says_which_promise_it_is_and_the_promise_in_which_words(
    tiny_model, changes, kind, words
):
    promise = tiny_config(tiny_model, **changes).promise
    assert type(promise) is kind
    assert words in promise.words()
    assert (promise.unit is Unit.QUERY) == (kind is FirstDocuments)
    assert promise.closes == (kind is not Accuracy)
