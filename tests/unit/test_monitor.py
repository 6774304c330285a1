from __future__ import annotations

from functools import cache
from typing import Any, get_args

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import beta

from vllm_adainfer.artifact.kinds import Risk
from vllm_adainfer.monitoring.monitor import (
    PRIOR,
    AnswerMonitor,
    MonitorStatus,
    confidence_interval,
)

EPSILONS = (0.02, 0.05)
interval = cache(confidence_interval)


def slow_interval(disagreed: int, checked: int, alpha: float) -> tuple[float, float]:
    """Its definition: rates on a grid that the mixture of all rates does not beat by 1 / alpha."""

    def likelihood(p: Any) -> Any:
        return p**disagreed * (1 - p) ** (checked - disagreed)

    mixture = quad(lambda p: likelihood(p) * beta.pdf(p, *PRIOR), 0, 1, epsabs=0, limit=500)[0]
    grid = np.linspace(0, 1, 100_001)
    inside = grid[mixture < likelihood(grid) / alpha]
    return float(inside[0]), float(inside[-1])


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5])
@pytest.mark.parametrize(
    ("disagreed", "checked"), [(0, 1), (1, 1), (0, 60), (1, 60), (20, 40), (59, 60), (60, 60)]
)
def test_the_interval_is_its_definition_on_a_grid(disagreed, checked, alpha):
    expected = slow_interval(disagreed, checked, alpha)
    assert confidence_interval(disagreed, checked, alpha) == pytest.approx(expected, abs=2e-5)


def test_before_the_first_answer_every_rate_is_possible():
    assert confidence_interval(0, 0, 0.1) == (0, 1)


@pytest.mark.parametrize("disagreed", [0, 1, 20_000, 999_999, 1_000_000])
def test_the_interval_stays_around_the_rate_at_a_million_answers(disagreed):
    low, high = confidence_interval(disagreed, 1_000_000, 0.05)
    assert 0 <= low <= disagreed / 1_000_000 <= high <= 1
    assert high - low < 0.002


@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_looked_at_after_every_answer_it_misses_the_truth_in_at_most_alpha_of_paths(rate):
    alpha, paths, steps = 0.1, 300, 500
    generator = np.random.default_rng(0)
    counts = (generator.random((paths, steps)) < rate).cumsum(axis=1)
    missed = 0
    for path in counts:
        ends = [interval(int(k), n, alpha) for n, k in enumerate(path, start=1)]
        missed += any(not low <= rate <= high for low, high in ends)
    assert missed <= paths * alpha + 2.33 * np.sqrt(paths * alpha * (1 - alpha))


def outcomes(rate: float, answers: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).random(answers) < rate


def observe(monitor: AnswerMonitor, level: int, disagreed: Any, batch: int = 8) -> list[int]:
    """Feed outcomes in batches; returns after how many answers the level was tightened."""
    found = []
    for start in range(0, len(disagreed), batch):
        part = disagreed[start : start + batch]
        names = [str(number) for number in range(start, start + len(part))]
        if monitor.observe(names, np.full(len(part), level), part):
            found.append(start + len(part))
    return found


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("seed", range(5))
def test_twice_epsilon_is_found_once_and_only_its_level_is_tightened(level, seed):
    monitor = AnswerMonitor(EPSILONS, alpha=0.1)
    found = observe(monitor, level, outcomes(2 * EPSILONS[level], 3000, seed))
    assert len(found) == 1
    assert monitor.tightened.tolist() == [index == level for index in range(2)]


def test_a_level_is_tightened_by_its_latest_answers_and_the_reading_shows_them_and_all():
    """20,000 good ones: what is shown since start is still within epsilon, and true."""
    monitor = AnswerMonitor(EPSILONS, alpha=0.1)
    good = outcomes(0.008, 20_000)
    assert observe(monitor, 0, good) == []
    bad = outcomes(0.1, 2_000, seed=1)
    [found] = observe(monitor, 0, bad)
    assert found < 400
    reading = monitor.status()[0]
    assert reading.tightened
    assert reading.high < reading.epsilon
    assert reading.disagreed == good.sum() + bad.sum()
    assert (reading.latest_checked, reading.latest_disagreed) == (100, bad[-100:].sum())


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_when_a_level_is_tightened_does_not_depend_on_how_answers_come_in_steps(batch):
    disagreed = outcomes(0.12, 1_000)
    [at_once] = observe(AnswerMonitor(EPSILONS, alpha=0.1), 1, disagreed, batch=1)
    found = observe(AnswerMonitor(EPSILONS, alpha=0.1), 1, disagreed, batch)
    assert found == [-(-at_once // batch) * batch]


@pytest.mark.parametrize(
    ("rate", "answers"), [(0.0, 100_000), (0.01, 20_000)], ids=["never", "within"]
)
def test_a_rate_within_epsilon_tightens_nothing(rate, answers):
    monitor = AnswerMonitor(EPSILONS, alpha=0.01)
    assert observe(monitor, 0, outcomes(rate, answers), batch=64) == []
    assert not monitor.tightened.any()
    assert monitor.as_dict()[0.02]["high"] < 0.02


def test_a_tightened_level_goes_on_counting_and_is_not_loosened():
    monitor = AnswerMonitor(EPSILONS, alpha=0.1)
    observe(monitor, 0, np.ones(20, dtype=np.bool_))
    assert observe(monitor, 0, np.zeros(20_000, dtype=np.bool_), batch=64) == []
    reading = monitor.as_dict()[0.02]
    assert reading["tightened"]
    assert reading["high"] < 0.02
    assert (reading["checked"], reading["disagreed"]) == (20_020, 20)


def test_the_readings_are_plain_values_by_epsilon():
    monitor = AnswerMonitor(EPSILONS, alpha=0.1)
    monitor.observe([*"abcd"], np.array([1, 0, 1, 1]), np.array([True, False, False, False]))
    low, high = confidence_interval(1, 3, 0.1)
    assert monitor.as_dict() == {
        0.02: {
            "checked": 1, "disagreed": 0, "rate": 0.0,
            "low": 0.0, "high": confidence_interval(0, 1, 0.1)[1],
            "latest_checked": 1, "latest_disagreed": 0, "tightened": False,
        },
        0.05: {
            "checked": 3, "disagreed": 1, "rate": 1 / 3,
            "low": low, "high": high,
            "latest_checked": 3, "latest_disagreed": 1, "tightened": False,
        },
    }  # fmt: skip
    kinds = {type(value) for reading in monitor.as_dict().values() for value in reading.values()}
    assert kinds == {int, float, bool}


@pytest.mark.parametrize("risk", get_args(Risk))
def test_every_bound_but_that_of_accuracy_closes_once_too_many_answers_are_wrong(risk):
    monitor = AnswerMonitor(EPSILONS, alpha=0.1, risk=risk)
    observe(monitor, 0, outcomes(0.06, 3000))
    assert monitor.tightened.tolist() == [risk != "accuracy", False]


def test_accuracy_lost_is_at_most_the_disagreement_so_that_no_disagreement_breaks_its_bound():
    """6 % of disagreement at epsilon 0.02: right and wrong answers may have changed alike."""
    monitor = AnswerMonitor(EPSILONS, alpha=0.1, risk="accuracy")
    [found] = observe(monitor, 0, outcomes(0.06, 3000))
    assert not monitor.tightened.any()
    reading = monitor.status()[0]
    assert reading.low > reading.epsilon, "what there is to see is shown"
    assert found < 3000
    assert observe(monitor, 0, outcomes(0.06, 3000, seed=1)) == [], "said once"


def test_the_level_that_is_found_above_its_epsilon_is_told_with_its_reading_then():
    monitor = AnswerMonitor(EPSILONS, alpha=0.1)
    disagreed = np.ones(20, dtype=np.bool_)
    [told] = monitor.observe([*map(str, range(20))], np.full(20, 1), disagreed)
    low, high = confidence_interval(told.checked, told.checked, 0.1)
    assert told == MonitorStatus(
        0.05, told.checked, told.checked, low, high, told.checked, told.checked, tightened=True
    )
    assert told.checked < 20
    assert monitor.status()[1].checked == 20
