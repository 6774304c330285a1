"""What the comparison with other methods says of each."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.common.intervals import mean_interval, share_of
from benchmarks.rivals.classifiers import words
from benchmarks.rivals.judged import Unseen, certified_threshold
from benchmarks.rivals.task import ends_of
from vllm_adainfer.offline.calibration.certify.bound import Bound

BOUND, EPSILON = Bound("exact", 0.1, 0.0), 0.02


@pytest.mark.parametrize("wrong_below", [0.0, 0.5, 0.9])
def test_a_classifier_answers_what_it_is_sure_of_and_no_more_than_the_bound_allows(wrong_below):
    draw = np.random.default_rng(0)
    sure = draw.uniform(size=2000)
    differs = sure < wrong_below
    least = certified_threshold(differs, sure, BOUND, EPSILON)
    served = sure >= least
    assert BOUND.holds((differs & served).astype(float), EPSILON)
    assert served.mean() == pytest.approx(min(1 - wrong_below, 0.9), abs=0.03)


def test_a_promise_is_of_all_requests_not_of_those_that_are_answered():
    sure = np.r_[np.ones(100), np.zeros(1900)]
    differs = np.r_[np.full(10, True), np.full(1990, False)]  # a tenth of those answered
    assert certified_threshold(differs, sure, BOUND, EPSILON) < 1


def test_what_all_prompts_share_is_not_read():
    texts = ["Review: a warm film\nSentiment:", "Review: a cold one\nSentiment:"]
    start, end = ends_of(texts)
    assert [text[start : len(text) - end] for text in texts] == ["warm film", "cold one"]


def test_a_result_compares_answers_with_the_whole_models_and_with_the_right_ones():
    tests = Unseen(np.arange(4), np.array([1, 1, 2, 2]), [{1}, {2}, {2}, {2}])
    row = tests.result(np.array([1, 2, 2, 1]), np.array([1.0, 0.0, 1.0, 0.0]), by_request=True)
    assert (row["spared"], row["changed"], row["accuracy"]) == (0.5, 0.5, 0.75)
    assert tests.stock_accuracy == 0.75
    assert tests.outcome(None)["changed"] == 0


def test_intervals_hold_the_value_and_narrow_with_rows():
    assert share_of(0.5, 100) == "50.0% (39.8 to 60.2%)"
    draw = np.random.default_rng(0)
    few, many = (mean_interval(draw.uniform(size=rows)) for rows in (100, 10_000))
    assert few[0] < 0.5 < few[1]
    assert many[1] - many[0] < 0.2 * (few[1] - few[0])


def test_a_classifier_that_is_wrong_where_it_is_surest_answers_nothing():
    sure = np.ones(2000)
    assert certified_threshold(np.full(2000, True), sure, BOUND, EPSILON) == np.inf


def test_words_learn_the_answers_of_the_model():
    texts = ["a warm and clever film", "a thin and dull plot"] * 20
    answers, sure = words()(texts, np.array([7, 3] * 20))(["clever", "dull"])
    assert answers.tolist() == [7, 3]
    assert ((sure > 0.5) & (sure <= 1)).all()
