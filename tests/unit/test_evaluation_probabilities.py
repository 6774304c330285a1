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
    MOVES,
    among_labels,
    brier_score,
    compare_probabilities,
    expected_calibration_error,
    label_mass,
    largest_moves,
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
    moves = largest_moves(logprobs, np.roll(logprobs, 1, axis=0), in_vocabulary=True)
    for values in among, mass, moves:
        assert ((values >= 0) & (values <= 1)).all()
    assert among.sum(axis=1) == pytest.approx(1)


def test_the_probabilities_among_the_labels_times_the_mass_are_those_in_the_vocabulary():
    logprobs = logs([0.5, 0.2, 0.1], [0.001, 0.002, 0.0005])
    assert label_mass(logprobs) == pytest.approx([0.8, 0.0035])
    product = among_labels(logprobs) * label_mass(logprobs)[:, None]
    assert product == pytest.approx(np.exp(logprobs))


FULL = logs([0.6, 0.3], [0.45, 0.45], [0.8, 0.1])


@pytest.mark.parametrize(
    ("answers", "in_vocabulary", "move"),
    [
        (logs([0.3, 0.15]), False, 0),  # halved, yet the same among the labels
        (logs([0.3, 0.15]), True, 0.45),  # their mass was .9
        (logs([0.45, 0.45]), False, 2 / 3 - 1 / 2),
        (logs([0.45, 0.45]), True, 2 / 3 - 1 / 2),  # more than .15 in the vocabulary
        (logs([0.3, 0.6]), True, 1 / 3),
    ],
)
def test_a_move_is_the_largest_of_those_that_the_promise_is_about(answers, in_vocabulary, move):
    found = largest_moves(answers, FULL[:1], in_vocabulary)
    assert found == pytest.approx([move], abs=1e-6)


NO_LABEL = np.array([False, False, True])


def test_answers_are_wrong_by_label_by_move_and_where_no_label_was_best():
    answers = logs([0.3, 0.6], [0.5, 0.4], [0.8, 0.1])
    strict = compare_probabilities(answers, FULL, 0.05, True, NO_LABEL)
    assert strict.label_differs.mean() == pytest.approx(1 / 3)
    assert strict.wrong.all()
    loose = compare_probabilities(answers, FULL, 0.06, True, NO_LABEL)
    assert loose.wrong.mean() == pytest.approx(2 / 3)
    among = compare_probabilities(answers, FULL, 0.06, False, NO_LABEL)
    assert among.wrong.mean() == pytest.approx(1 / 3)


def test_moves_are_summed_up_by_mean_95th_percentile_and_maximum():
    full = np.repeat(logs([0.9, 0.1]), 100, axis=0)
    answers = logs(*([0.9 - step / 1000, 0.1 + step / 1000] for step in range(100)))
    found = compare_probabilities(answers, full, 0.0505, False, np.zeros(100, dtype=bool))
    wanted = {"move_mean": 0.0495, "move_p95": 0.09405, "move_max": 0.099}
    assert {name: of(found.moves) for name, of in MOVES.items()} == pytest.approx(wanted, abs=1e-6)
    assert not found.label_differs.any()
    assert found.wrong.mean() == pytest.approx(0.49)
