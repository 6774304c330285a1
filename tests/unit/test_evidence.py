"""Evidence that a bound does not hold now, whatever was before: rarely wrong, and soon there."""

from __future__ import annotations

import json
from copy import deepcopy
from statistics import median
from typing import Any

import numpy as np
import pytest

from vllm_adainfer.watch.evidence import Evidence, log_factors
from vllm_adainfer.watch.ledger import BLOCK as LEDGER_BLOCK
from vllm_adainfer.watch.ledger import ERROR_RATE, TIMES, miss_factors
from vllm_adainfer.watch.watch import BLOCK, LARGEST_STAKE, STAKES

EPSILON, ALPHA, COIN = 0.02, 0.1, 0.25
Unit = tuple[float, float]  # what differs and what was compared, as shares of the most that count


class Of:
    """Evidence as a watch collects it, of one unit after the other."""

    def __init__(self, epsilon: float = EPSILON) -> None:
        self.evidence, self.epsilon = Evidence(STAKES, BLOCK, ALPHA), epsilon
        self.stakes = np.geomspace(epsilon / 5, LARGEST_STAKE, STAKES)

    def add(self, disagreed: float, checked: float) -> bool:
        self.evidence.add(log_factors(self.stakes, self.epsilon, disagreed, checked))
        return self.evidence.is_enough

    def closed_after(self, units: list[Unit]) -> int | None:
        """The number of units after which the bound is found broken; None if it is not."""
        return next((n for n, unit in enumerate(units, start=1) if self.add(*unit)), None)


def answers(rate: float, count: int, generator: Any) -> list[Unit]:
    return [(float(differs), 1.0) for differs in generator.random(count) < rate]


def slow_capital(units: list[Unit], epsilon: float) -> float:
    """Its definition: each gambler's bets from the block on that she began with, one by one."""
    held = 0.0
    stakes = np.geomspace(epsilon / 5, 0.9, 24)
    for gambler, first in enumerate(range(0, len(units), 100), start=1):
        for stake in stakes:
            factors = [1 + stake * (d / epsilon - n) for d, n in units[first:]]
            held += float(np.prod(factors)) / (gambler * (gambler + 1) * len(stakes))
    return held


@pytest.mark.parametrize("epsilon", [0.02, 0.3])
@pytest.mark.parametrize("shares", [(0.0, 1.0), (0.0, 0.25, 0.5, 1.0)], ids=["answers", "groups"])
def test_a_bound_is_broken_once_all_gamblers_together_hold_one_over_alpha(epsilon, shares):
    generator = np.random.default_rng(0)
    checked = generator.choice(shares[1:], 450)
    rates = np.where(np.arange(450) < 350, epsilon / 2, min(1, 10 * epsilon))
    units = [(n * float(d), n) for d, n in zip(generator.random(450) < rates, checked, strict=True)]
    found = Of(epsilon).closed_after(units)
    assert found is not None
    assert found > 350
    before = [*range(0, found, 50), found - 1]
    assert max(slow_capital(units[:n], epsilon) for n in before) < 1 / ALPHA
    assert slow_capital(units[:found], epsilon) >= 1 / ALPHA


@pytest.mark.parametrize(
    ("past", "rate", "within"),
    [
        (0, 0.1, 60),
        (2_000, 0.1, 150),
        (20_000, 0.1, 200),
        (20_000, 0.3, 40),
        (20_000, 0.04, 2_000),
    ],
)
def test_traffic_that_turns_bad_is_noticed_soon_however_long_it_was_good(past, rate, within):
    """Tested as the mean since start, 10 % after 20,000 good answers took 3,500 more."""
    generator = np.random.default_rng(0)
    watched = Of()
    assert watched.closed_after(answers(EPSILON / 2, past, generator)) is None
    found = [
        deepcopy(watched).closed_after(answers(rate, 10 * within, generator)) for _ in range(15)
    ]
    assert median(one or 10 * within for one in found) <= within


def alternating(number: int, held_before: bool) -> float:
    """A rate that is at the bound every other block."""
    return EPSILON * (number // BLOCK % 2)


def after_errors(number: int, held_before: bool) -> float:
    """A rate at the bound for as long as the last answer was wrong, or a while after the start."""
    return EPSILON if held_before or number < 300 else 0.9 * EPSILON


@pytest.mark.parametrize(
    "rate", [lambda number, wrong: EPSILON, alternating, after_errors], ids=["at", "now", "past"]
)
def test_a_bound_that_holds_given_any_past_is_found_broken_in_at_most_alpha_of_runs(rate):
    generator = np.random.default_rng(0)
    runs, answers_each, broken = 150, 1_500, 0
    for _ in range(runs):
        watched, wrong = Of(), False
        for number, draw in enumerate(generator.random(answers_each).tolist()):
            wrong = draw < rate(number, wrong)
            if watched.add(float(wrong), 1.0):
                broken += 1
                break
    assert broken <= runs * ALPHA


@pytest.mark.parametrize("epsilon", [0.001, 0.02, 0.5, 0.99])
@pytest.mark.parametrize("checked", [0.1, 1.0])
def test_whoever_bets_gains_nothing_in_the_mean_while_the_bound_holds(epsilon, checked):
    """With the differing share at `checked` or 0, so that it is epsilon of what is compared."""
    stakes = np.geomspace(min(epsilon / 5, LARGEST_STAKE), LARGEST_STAKE, STAKES)
    held = [np.exp(log_factors(stakes, epsilon, differs, checked)) for differs in (checked, 0.0)]
    assert all((factors > 0).all() for factors in held)
    assert epsilon * held[0] + (1 - epsilon) * held[1] == pytest.approx(1)


# As a ledger collects it, of whole steps


@pytest.mark.parametrize("rate", [COIN, 0.05, 0.999])
def test_a_step_bets_on_compared_misses_being_so_many_times_too_frequent(rate):
    """By likelihood: a compared miss has the probability rate p, with p at epsilon or above."""
    beyond, within = rate * TIMES * EPSILON, rate * EPSILON
    expected = (beyond / within) ** 3 * ((1 - beyond) / (1 - within)) ** 4
    assert np.exp(miss_factors(EPSILON, rate, 7, 3)) == pytest.approx(expected)


def requests_until_closed(share: float, steps: int, size: int, seed: int, good: int = 0) -> float:
    """The requests, after so many good ones, until evidence is enough; infinite if it never is."""
    random = np.random.default_rng([seed, size])
    evidence = Evidence(len(TIMES), LEDGER_BLOCK, ERROR_RATE)
    for misses in random.binomial(size, COIN * EPSILON / 4, good // size).tolist():
        evidence.add(miss_factors(EPSILON, COIN, size, misses), size)
    assert not evidence.is_enough
    for step, misses in enumerate(random.binomial(size, COIN * share, steps).tolist()):
        evidence.add(miss_factors(EPSILON, COIN, size, misses), size)
        if evidence.is_enough:
            return (step + 1) * size
    return np.inf


@pytest.mark.parametrize("size", [20, 500])
def test_a_policy_at_its_bound_is_closed_in_at_most_so_many_runs(size):
    runs = 400
    closed = sum(requests_until_closed(EPSILON, 60, size, seed) < np.inf for seed in range(runs))
    assert closed <= ERROR_RATE * runs + 3 * np.sqrt(ERROR_RATE * runs)


@pytest.mark.parametrize("good", [0, 20_000, 200_000])
@pytest.mark.parametrize(("share", "soon"), [(0.04, 12_000), (0.1, 1200), (1.0, 100)])
def test_a_change_is_seen_soon_also_after_a_long_good_past(good, share, soon):
    found = [requests_until_closed(share, 1000, 50, seed, good) for seed in range(7)]
    assert np.median(found) <= soon


def test_a_step_of_misses_alone_is_a_finite_number_which_a_restart_goes_on_with():
    evidence = Evidence(len(TIMES), LEDGER_BLOCK, ERROR_RATE)
    evidence.add(miss_factors(1e-6, 0.999, 100_000, 100_000), 100_000)
    assert evidence.is_enough
    again = Evidence(len(TIMES), LEDGER_BLOCK, ERROR_RATE)
    again.restore(json.loads(json.dumps(evidence.as_dict(), allow_nan=False)))
    assert again.is_enough
    assert again.as_dict() == evidence.as_dict()
