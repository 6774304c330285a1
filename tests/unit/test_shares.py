"""Measured shares have 95 % intervals that keep what they say, also where rows are clustered."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from vllm_adainfer.offline.evaluation.sequences import differing
from vllm_adainfer.offline.reports.shares import (
    Share,
    clopper_pearson,
    of_rounds,
    spelled,
    verdict,
)


@pytest.mark.parametrize(("hits", "rows"), [(0, 1), (0, 260), (6, 260), (130, 260), (260, 260)])
def test_independent_rows_have_scipys_exact_interval(hits, rows):
    wanted = binomtest(hits, rows).proportion_ci(0.95, method="exact")
    assert clopper_pearson(hits, rows) == pytest.approx((wanted.low, wanted.high))
    alone = Share(np.arange(rows) < hits, np.ones(rows), np.arange(rows))
    assert alone.interval == pytest.approx((wanted.low, wanted.high))


def test_rows_that_all_say_the_same_in_a_group_count_once():
    groups = np.repeat(np.arange(50), 20)
    hit = (groups < 5).astype(float)
    low, high = Share(hit, np.ones(1000), groups).interval
    assert (low, high) == pytest.approx(clopper_pearson(5, 50), abs=0.01)
    assert Share(0 * hit, np.ones(1000), groups).interval == clopper_pearson(0, 50)


def draw(generator: np.random.Generator, rate: float) -> Share:
    """150 groups of 1 to 20 rows, in each of which most rows are hit or few."""
    sizes = generator.integers(1, 21, 150)
    groups = np.repeat(np.arange(150), sizes)
    own = generator.beta(rate, 1 - rate, 150)
    hits = (generator.random(len(groups)) < own[groups]).astype(float)
    return Share(hits, np.ones(len(groups)), groups)


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_the_interval_misses_the_rate_of_clustered_rows_as_seldom_as_it_says(rate):
    generator = np.random.default_rng(0)
    drawn = [draw(generator, rate) for _ in range(400)]
    missed = sum(not one.interval[0] <= rate <= one.interval[1] for one in drawn)
    as_rows = [clopper_pearson(one.hits.sum(), len(one.hits)) for one in drawn]
    assert missed / 400 < 0.08
    assert sum(not low <= rate <= high for low, high in as_rows) / 400 > 0.2


def test_a_text_counts_once_and_its_tokens_up_to_the_first_that_differs():
    texts, full = [[1, 2, 3]] * 30 + [[1, 2, 9]] * 10, [[1, 2, 3]] * 40
    found = differing(texts, full, np.arange(40))
    assert found.value == 10 / 120
    assert found.effective_rows <= 120
    alone = differing([[1], [2]], [[1], [3]], np.arange(2))
    assert alone.interval == clopper_pearson(1, 2)


def test_of_several_rounds_the_median_counts_on_as_many_rows_as_one_has():
    rounds = [Share(np.arange(100) < hits, np.ones(100), np.arange(100)) for hits in (1, 7, 3)]
    assert of_rounds(rounds) == (0.03, clopper_pearson(3, 100))
    value, interval = of_rounds(rounds[:2])
    assert (value, interval) == (0.04, clopper_pearson(4, 100))


def test_accuracy_lost_has_students_interval():
    lost = Share(np.array([1.0, -1, 0, 0] * 50), np.ones(200), np.arange(200))
    reach = 1.972 * np.sqrt(0.5 / 199)
    assert lost.signed_interval == pytest.approx((-reach, reach), abs=1e-4)
    assert Share(np.ones(1), np.ones(1), np.zeros(1, np.int64)).signed_interval == (-1, 1)


@pytest.mark.parametrize(
    ("hits", "said"),
    [
        (5, "within the bound of 2.0%"),
        (6, "compatible with the bound of 2.0%"),
        (15, "above the bound of 2.0%"),
    ],
)
def test_what_was_measured_is_said_to_be_within_compatible_with_or_above_the_bound(hits, said):
    assert verdict(hits / 260, clopper_pearson(hits, 260), 0.02) == said


def test_a_share_is_spelled_with_its_interval():
    assert spelled(6 / 260, clopper_pearson(6, 260)) == "2.3% (0.9 to 5.0%)"
    assert spelled(0.5, (0.4, 0.6), 0) == "50% (40 to 60%)"
