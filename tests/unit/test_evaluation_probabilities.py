"""Measures of probabilities against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from sklearn.metrics import brier_score_loss

from vllm_adainfer.arrays import Floats, Ints
from vllm_adainfer.offline.evaluation.probabilities import (
    BINS,
    among_labels,
    brier_score,
    expected_calibration_error,
    label_mass,
    reliability,
)
from vllm_adainfer.offline.evaluation.run import Logprobs

PER_BIN = 100


def logs(*rows: list[float]) -> Logprobs:
    return np.log(np.array(rows)).astype(np.float32)


def two_labels(overconfident_by: int) -> tuple[Floats, Ints]:
    """A hundred rows for each of 15 confidences; so many more of them are wrong than it says."""
    percents = range(55, 55 + 3 * BINS, 3)
    probabilities = [[1 - percent / 100, percent / 100] for percent in percents]
    truth = [
        [1] * (percent - overconfident_by) + [0] * (PER_BIN - percent + overconfident_by)
        for percent in percents
    ]
    return np.repeat(probabilities, PER_BIN, axis=0), np.concatenate(truth)


@pytest.mark.parametrize("overconfident_by", [0, 10])
def test_the_ece_is_by_how_much_confidence_exceeds_accuracy(overconfident_by):
    bins = reliability(*two_labels(overconfident_by))
    assert [one["rows"] for one in bins] == [PER_BIN] * BINS
    assert expected_calibration_error(bins) == pytest.approx(overconfident_by / 100)


def test_the_ece_does_not_depend_on_the_order_of_rows_with_different_confidence():
    probabilities, truth = two_labels(10)
    blocks = np.arange(len(truth)).reshape(BINS, PER_BIN)[::-1].ravel()
    bins = reliability(probabilities[blocks], truth[blocks])
    assert bins == reliability(probabilities, truth)


def test_errors_of_opposite_sign_do_not_make_up_for_each_other():
    half = 7 * PER_BIN
    over, under = two_labels(3), two_labels(-3)
    probabilities = np.concatenate([over[0][:half], under[0][half:]])
    truth = np.concatenate([over[1][:half], under[1][half:]])
    assert expected_calibration_error(reliability(probabilities, truth)) == pytest.approx(0.03)


def test_a_bin_says_how_sure_and_how_often_right_its_rows_are():
    probabilities = np.array([[0.6, 0.4], [0.1, 0.9]])
    low, high = reliability(probabilities, np.array([1, 1]))
    assert low == {"rows": 1, "confidence": 0.6, "accuracy": 0}
    assert high == {"rows": 1, "confidence": 0.9, "accuracy": 1}


def test_the_brier_score_of_two_labels_is_twice_that_of_scikit_learn():
    generator = np.random.default_rng(0)
    positive, truth = generator.random(50), generator.integers(0, 2, 50)
    found = brier_score(np.stack([1 - positive, positive], axis=1), truth)
    assert found == pytest.approx(2 * brier_score_loss(truth, positive))


def test_the_brier_score_sums_over_the_labels():
    thirds = np.full((4, 3), 1 / 3)
    assert brier_score(thirds, np.array([0, 1, 2, 0])) == pytest.approx(2 / 3)
    assert brier_score(np.eye(3), np.arange(3)) == 0
    assert brier_score(np.eye(3), np.array([1, 2, 0])) == 2


@given(
    arrays(np.float32, array_shapes(min_dims=2, max_dims=2), elements=st.floats(-200, 0, width=32))
)
def test_probabilities_are_never_outside_0_to_1_and_add_up(logprobs):
    among, mass = among_labels(logprobs), label_mass(logprobs)
    for values in among, mass:
        assert ((values >= 0) & (values <= 1)).all()
    assert among.sum(axis=1) == pytest.approx(1)


def test_the_probabilities_among_the_labels_times_the_mass_are_those_in_the_vocabulary():
    logprobs = logs([0.5, 0.2, 0.1], [0.001, 0.002, 0.0005])
    assert label_mass(logprobs) == pytest.approx([0.8, 0.0035])
    product = among_labels(logprobs) * label_mass(logprobs)[:, None]
    assert product == pytest.approx(np.exp(logprobs))
