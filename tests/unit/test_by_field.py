"""Objects of decisions: one label of each field holds, and the answer is a number."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from vllm_adainfer.promise.changed import Changed
from vllm_adainfer.promise.links import ByField
from vllm_adainfer.promise.probabilities import features_of, probabilities_of_scores

SIZES = (3, 1, 2, 5)
LINK = ByField(SIZES)
ROWS, LABELS = 60, sum(SIZES)
DECIDED = [0, 2, 3]  # the fields with two labels or more


def scores_of(seed: int = 0) -> Tensor:
    return 3 * torch.randn(ROWS, LABELS, generator=torch.Generator().manual_seed(seed))


def fields(scores: Tensor) -> list[list[Tensor]]:
    """For each row the scores of each field, cut by hand."""
    return [[row[0:3], row[3:4], row[4:6], row[6:11]] for row in scores]


def test_each_answer_has_a_code_of_its_own_by_which_its_labels_are_found_again():
    answers = list(product(*map(range, SIZES)))
    codes = LINK.code(torch.tensor(answers))
    assert codes.dtype == torch.int64
    assert sorted(codes.tolist()) == list(range(len(answers)))
    for answer, code in zip(answers, codes.tolist(), strict=True):
        assert LINK.places(code) == answer
        assert LINK.code_of(answer) == code
        for column, first in (1, 0), (3, 3), (5, 4), (10, 6):
            field = [0, 3, 4, 6].index(first)
            assert LINK.label_beside(column, code) == first + answer[field]
    for field in range(len(SIZES)):
        assert LINK.place_in(field, codes.numpy()).tolist() == [one[field] for one in answers]


def test_as_many_objects_as_a_number_can_tell_keep_codes_of_their_own():
    link = ByField((2,) * 61 + (1,))
    for places in ([1] * 61 + [0], [0, 1] * 30 + [1, 0]):
        [code] = link.code(torch.tensor([places])).tolist()
        assert 0 <= code < 1 << 61
        assert link.places(code) == tuple(places)
        numbers = np.array([code])
        assert [int(link.place_in(field, numbers)[0]) for field in range(62)] == places


def test_the_answer_has_the_best_label_of_each_field():
    scores = scores_of()
    best = [tuple(int(own.argmax()) for own in row) for row in fields(scores)]
    assert [LINK.places(code) for code in LINK.best(scores).tolist()] == best
    assert Changed().about(["x"] * LABELS, LINK).link is LINK


def test_labels_that_tie_may_all_be_the_best_of_their_field():
    tied = torch.tensor([[1.0, 1, 0, -5, 2, 3, 0, 0, 0, 0, 0]])
    expected = [[True, True, False, True, False, True, True, True, True, True, True]]
    assert LINK.may_be_best(tied).tolist() == expected


def test_the_probabilities_of_a_field_are_a_softmax_of_its_own():
    scores = scores_of()
    expected = torch.stack([torch.cat([own.softmax(0) for own in row]) for row in fields(scores)])
    torch.testing.assert_close(LINK.probabilities(scores), expected)
    torch.testing.assert_close(LINK.normalised(scores).exp(), expected)
    again = LINK.probabilities(LINK.scores_of(expected))
    torch.testing.assert_close(again, expected)
    read = probabilities_of_scores(torch.cat([scores, torch.zeros(ROWS, 1)], 1), LINK)
    torch.testing.assert_close(read.among, expected)


@pytest.mark.parametrize("column", range(LABELS))
def test_the_log_odds_of_a_label_are_those_among_its_field(column):
    scores = scores_of()
    expected = LINK.probabilities(scores.double())[:, column].logit()
    found = LINK.log_odds(scores, torch.full((ROWS, 1), column)).double()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert bool(found.isposinf().all()) == (column == 3), "a lone value is certain"


def test_the_cross_entropies_of_fields_add_up_and_their_gradient_is_the_error():
    scores, teacher = scores_of().double().requires_grad_(), LINK.probabilities(scores_of(1))
    entropy = LINK.cross_entropy(scores, teacher.double())
    logs = torch.cat([torch.cat([own.log_softmax(0) for own in row]) for row in fields(scores)])
    torch.testing.assert_close(entropy, -(teacher.flatten() * logs).sum())
    [gradient] = torch.autograd.grad(entropy, scores)
    torch.testing.assert_close(gradient, LINK.probabilities(scores) - teacher)


def test_features_are_the_probability_of_the_object_and_the_least_sure_field():
    """Of a field with one value nothing is unsure."""
    scores = scores_of()
    for row, (top_prob, gap), lead, (top_logit, own_gap, mass) in zip(
        fields(scores),
        Changed().about(["x"] * LABELS, LINK).features(scores).tolist(),
        LINK.lead(scores).tolist(),
        features_of(torch.cat([scores, torch.ones(ROWS, 1)], 1), LINK).tolist(),
        strict=True,
    ):
        tops, gaps, leads, odds = [], [], [], []
        for field in DECIDED:
            first, second, *_ = row[field].double().softmax(0).sort(descending=True).values
            tops.append(first)
            gaps.append(first - second)
            odds.append(first.logit())
            best, other, *_ = row[field].sort(descending=True).values
            leads.append(best - other)
        assert top_prob == pytest.approx(float(np.prod(tops)), rel=1e-4)
        assert gap == pytest.approx(float(min(gaps)), abs=1e-5)
        assert own_gap == pytest.approx(float(min(gaps)), abs=1e-5)
        assert lead == pytest.approx(float(min(leads)), abs=1e-5)
        assert top_logit == pytest.approx(float(min(odds)), abs=1e-3)
        assert mass == 1
