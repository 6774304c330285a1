"""Probabilities of the one label that holds, or of each label by itself."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from vllm_adainfer.artifact.fields import Label
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.score_labels import score_head_of
from vllm_adainfer.offline.calibration.fit.distil import Taught, solve
from vllm_adainfer.offline.calibration.options import (
    CalibrationRequest,
    PolicyOptions,
    check_classifier,
)
from vllm_adainfer.promise.accuracy import Accuracy
from vllm_adainfer.promise.gates import Gate, Gates
from vllm_adainfer.promise.links import SIGMOIDS, SOFTMAX
from vllm_adainfer.promise.probabilities import (
    answers_of,
    features_of,
    probabilities_of_answers,
    probabilities_of_logits,
    probabilities_of_scores,
)
from vllm_adainfer.promise.tolerance import Tolerance

LABELS = tuple(Label(name=name, token_id=place) for place, name in enumerate("abc"))


def scores_of(rows: int, labels: int = 3, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, labels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("link", [SOFTMAX, SIGMOIDS], ids=["softmax", "sigmoids"])
def test_log_odds_and_scores_are_those_of_the_probabilities(link):
    scores = scores_of(50)
    probabilities = link.probabilities(scores)
    for column in range(3):
        columns = torch.full((50, 1), column)
        expected = probabilities.double()[:, column].logit()
        found = link.log_odds(scores, columns).double()
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    again = link.probabilities(link.scores_of(probabilities))
    torch.testing.assert_close(again, probabilities)


def test_cross_entropies_are_torchs():
    scores, teacher = scores_of(40), scores_of(40, seed=1)
    one, each = teacher.softmax(1), teacher.sigmoid()
    torch.testing.assert_close(
        SOFTMAX.cross_entropy(scores, one), cross_entropy(scores, one, reduction="sum")
    )
    torch.testing.assert_close(
        SIGMOIDS.cross_entropy(scores, each),
        binary_cross_entropy_with_logits(scores, each, reduction="sum"),
    )


def test_labels_by_themselves_are_as_many_logistic_regressions():
    """A head of three labels is three heads of one, which is a softmax of two labels."""
    read, teacher = scores_of(300, 8), scores_of(300, 3, seed=1).sigmoid()
    found = solve(Taught(read, teacher, link=SIGMOIDS), 0.1)
    for label in range(3):
        alone = solve(Taught(read, teacher[:, [label]], link=SIGMOIDS), 0.1)
        torch.testing.assert_close(found.matrix[label], alone.matrix[0], atol=5e-3, rtol=0.05)
    predicted = (read @ found.matrix.T + found.bias).sigmoid()
    assert (predicted - teacher).abs().mean() < (teacher.mean(0) - teacher).abs().mean()


def test_answers_and_features_of_labels_by_themselves():
    scores = torch.cat([scores_of(60), torch.zeros(60, 1)], dim=1)
    read = probabilities_of_scores(scores, SIGMOIDS)
    answered = probabilities_of_answers(answers_of(scores, None, SIGMOIDS), None, SIGMOIDS)
    torch.testing.assert_close(answered.among, read.among)
    ids = torch.arange(3)
    torch.testing.assert_close(
        probabilities_of_logits(scores[:, :-1], ids, link=SIGMOIDS).among, scores[:, :-1].sigmoid()
    )
    surest = torch.maximum(read.among, 1 - read.among)
    least = surest.amin(dim=1)
    features = features_of(scores, SIGMOIDS)
    torch.testing.assert_close(features[:, 0], least.logit(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(features[:, 1], 2 * least - 1, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("columns", "problem", "head"),
    [
        (3, None, "softmax"),
        (3, "single_label_classification", "softmax"),
        (3, "multi_label_classification", "sigmoids"),
        (1, "multi_label_classification", "sigmoid"),
    ],
)
def test_the_models_config_says_how_many_labels_may_hold(columns, problem, head):
    class Config:
        architectures = ("LlamaForSequenceClassification",)
        num_labels = columns
        problem_type = problem

    assert score_head_of(Config) == head


GATED = {"promise": Gates(gates=(Gate(label="a", probability=0.5),))}
TOLERATED = {"promise": Tolerance(tolerance=0.1)}


@pytest.mark.parametrize(
    ("options", "more", "words"),
    [
        ({}, {}, "promise their probabilities"),
        ({"promise": Gates(gates=(Gate(probability=0.5),))}, {}, "promise their probabilities"),
        ({**GATED, "never_early": ("a",)}, {}, "drop other promises"),
        ({"promise": Accuracy()}, {}, "promise their probabilities"),
        (
            {"promise": Tolerance(tolerance=0.1)},
            {"student": "minilm"},
            "drop --student and --probe branch",
        ),
        (
            GATED,
            {"probe": "branch"},
            "drop --student and --probe branch",
        ),
    ],
)
def test_promises_about_the_best_label_are_refused(options, more, words, tmp_path):
    request = CalibrationRequest(
        "model", tmp_path, tmp_path, options=PolicyOptions(**options), **more
    )
    with pytest.raises(AdaInferError, match=words):
        check_classifier(request, 3, several_hold=True)


def test_promises_about_each_label_are_taken(tmp_path):
    for options in (GATED, TOLERATED):
        request = CalibrationRequest("model", tmp_path, tmp_path, options=PolicyOptions(**options))
        check_classifier(request, 3, several_hold=True)
