from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import Tensor

from vllm_adainfer.calibration.certify import certify, loosest, threshold_grid, walk
from vllm_adainfer.calibration.fit import FittedExit, Scored
from vllm_adainfer.decision.bound import certified, rows_needed, upper_bound

OUTCOMES = [(0, 1), (0, 50), (1, 50), (3, 300), (150, 300), (299, 300), (300, 300)]
EPSILONS = [0.0001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5]
DELTAS = [0.0001, 0.01, 0.05, 0.1, 0.5]


@pytest.mark.parametrize("delta", [0.01, 0.05, 0.1, 0.4])
@pytest.mark.parametrize(("errors", "rows"), OUTCOMES)
def test_the_upper_bound_is_scipys_exact_one(errors, rows, delta):
    two_sided = binomtest(errors, rows).proportion_ci(1 - 2 * delta, method="exact")
    assert upper_bound(errors, rows, delta) == pytest.approx(two_sided.high, abs=1e-9)


@pytest.mark.parametrize("delta", [0.01, 0.1])
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize(("errors", "rows"), OUTCOMES)
def test_certified_is_scipys_one_sided_binomial_test(errors, rows, epsilon, delta):
    test = binomtest(errors, rows, epsilon, alternative="less")
    assert certified(errors, rows, epsilon, delta) == (test.pvalue <= delta)


@given(
    st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
    st.floats(0.0001, 0.5),
    st.floats(0.0001, 0.5),
)
@settings(deadline=None)
def test_certified_means_that_the_upper_bound_is_within_epsilon(outcome, epsilon, delta):
    errors, rows = outcome
    bound = upper_bound(errors, rows, delta)
    assume(not math.isclose(bound, epsilon, rel_tol=1e-9))
    assert certified(errors, rows, epsilon, delta) == (bound <= epsilon)


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_rows_needed_is_the_smallest_number_of_rows_that_can_certify(epsilon, delta):
    needed = rows_needed(epsilon, delta)
    assert certified(0, needed, epsilon, delta)
    assert not certified(0, needed - 1, epsilon, delta)


DEPTH, LAYERS = 10, (3, 6)
ROWS, RESAMPLES, EPSILON, DELTA = 300, 400, 0.05, 0.1


def scored(score: Tensor, agrees: np.ndarray) -> Scored:
    return Scored(score, agrees, features=torch.empty(len(agrees), 0))  # the bound reads none


def fitted_exits(held_out: Sequence[Scored], fitted: Sequence[Scored]) -> list[FittedExit]:
    return [
        FittedExit(layer, None, torch.zeros(3), ours, theirs)
        for layer, ours, theirs in zip(LAYERS, fitted, held_out, strict=True)
    ]


def population(rows: int, seed: int) -> list[Scored]:
    """Two exit points that err less the surer they are; the later one errs less often."""
    generator = np.random.default_rng(seed)
    exits = []
    for worst in (0.5, 0.3):
        score = generator.random(rows)
        agrees = generator.random(rows) >= worst * (1 - score)
        exits.append(scored(torch.from_numpy(score).float(), agrees))
    return exits


@cache
def violations() -> tuple[float, float]:
    """How often epsilon is exceeded on the population: fixed-sequence testing, naive rule."""
    everyone, fitted = population(20_000, seed=0), population(ROWS, seed=1)
    exits = fitted_exits(everyone, fitted)
    grid = threshold_grid(exits)
    rate = {
        point.threshold: point.errors / point.rows
        for point in walk(exits, lambda fitted: fitted.held_out, DEPTH, grid)
    }
    generator = np.random.default_rng(2)
    bad_tested = bad_naive = 0
    for _ in range(RESAMPLES):
        rows = generator.integers(0, len(everyone[0].agrees), ROWS)
        sample = [scored(whole.score[rows], whole.agrees[rows]) for whole in everyone]
        exits = fitted_exits(sample, fitted)
        tested = certify(exits, DEPTH, EPSILON, DELTA)
        assert tested is not None
        path = list(walk(exits, lambda fitted: fitted.held_out, DEPTH, grid))
        assert tested == loosest(iter(path), EPSILON, DELTA)
        naive = [point for point in path if point.errors / point.rows <= EPSILON][-1]
        bad_tested += rate[tested.threshold] > EPSILON
        bad_naive += rate[naive.threshold] > EPSILON
    return bad_tested / RESAMPLES, bad_naive / RESAMPLES


def test_a_certified_policy_exceeds_epsilon_no_more_often_than_delta():
    tested, _ = violations()
    sampling_error = 3 * math.sqrt(DELTA * (1 - DELTA) / RESAMPLES)
    assert tested <= DELTA + sampling_error


def test_the_loosest_threshold_within_epsilon_on_the_rows_exceeds_it_far_more_often():
    tested, naive = violations()
    assert naive > 0.4
    assert naive > 4 * tested


def test_the_certified_path_stops_at_the_first_point_that_fails():
    # A tenth of the rows is surest, and wrong, at the later exit point. Any looser threshold lets
    # all rows leave earlier and right: no errors, but fixed-sequence testing never gets there.
    wrong = np.arange(1000) < 100
    early = scored(torch.zeros(1000), np.ones(1000, dtype=np.bool_))
    late = scored(torch.from_numpy(np.where(wrong, 1.0, -1.0)).float(), ~wrong)
    exits = fitted_exits([early, late], [early, late])
    path = walk(exits, lambda fitted: fitted.held_out, DEPTH, [math.inf, 1.0, 0.0])
    assert [point.errors for point in path] == [0, 100, 0]
    point = certify(exits, DEPTH, EPSILON, DELTA)
    assert point is not None
    assert (point.threshold, point.layers_saved) == (math.inf, 0)


@pytest.mark.parametrize("seed", range(5))
def test_a_row_leaves_at_the_first_exit_point_whose_score_passes(seed):
    exits = fitted_exits(population(200, seed), population(200, seed + 100))
    grid = threshold_grid(exits)[::20]
    halves = [fitted.held_out for fitted in exits]
    for point in walk(exits, lambda fitted: fitted.held_out, DEPTH, grid):
        errors = saved = 0
        for row in range(200):
            for layer, half in zip(LAYERS, halves, strict=True):
                if half.score[row] >= point.threshold:
                    errors += not half.agrees[row]
                    saved += DEPTH - layer
                    break
        assert (point.errors, point.rows) == (errors, 200)
        assert point.layers_saved == pytest.approx(saved / (200 * DEPTH))


def test_nothing_is_certified_with_too_few_rows():
    few = rows_needed(EPSILON, DELTA) - 1
    half = [scored(torch.rand(few), np.ones(few, dtype=np.bool_)) for _ in LAYERS]
    assert certify(fitted_exits(half, half), DEPTH, EPSILON, DELTA) is None
