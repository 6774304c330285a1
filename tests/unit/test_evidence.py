"""What closes a bound: evidence that it does not hold now, whatever was before."""

from __future__ import annotations

from copy import deepcopy
from statistics import median
from typing import Any

import numpy as np
import pytest

from vllm_adainfer.monitoring.evidence import BLOCK, Evidence

EPSILON, ALPHA = 0.02, 0.1
Unit = tuple[float, float]  # what differs and what was compared, as shares of the most that count


def answers(rate: float, count: int, generator: Any) -> list[Unit]:
    return [(float(differs), 1.0) for differs in generator.random(count) < rate]


def closed_after(evidence: Evidence, units: list[Unit]) -> int | None:
    """The number of units after which the bound is found broken; None if it is not."""
    return next((n for n, unit in enumerate(units, start=1) if evidence.add(*unit)), None)


def slow_capital(units: list[Unit], epsilon: float) -> float:
    """Its definition: each gambler's bets from the block on that she began with, one by one."""
    held = 0.0
    stakes = np.geomspace(epsilon / 5, 0.9, 24)
    for gambler, first in enumerate(range(0, len(units), BLOCK), start=1):
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
    found = closed_after(Evidence(epsilon, ALPHA), units)
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
    evidence = Evidence(EPSILON, ALPHA)
    assert closed_after(evidence, answers(EPSILON / 2, past, generator)) is None
    found = [
        closed_after(deepcopy(evidence), answers(rate, 10 * within, generator)) for _ in range(15)
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
        evidence, wrong = Evidence(EPSILON, ALPHA), False
        for number, draw in enumerate(generator.random(answers_each).tolist()):
            wrong = draw < rate(number, wrong)
            if evidence.add(float(wrong), 1.0):
                broken += 1
                break
    assert broken <= runs * ALPHA


@pytest.mark.parametrize("epsilon", [0.001, 0.02, 0.5, 0.99])
@pytest.mark.parametrize("checked", [0.1, 1.0])
def test_whoever_bets_gains_nothing_in_the_mean_while_the_bound_holds(epsilon, checked):
    """With the differing share at `checked` or 0, so that it is epsilon of what is compared."""
    held = []
    for differs in checked, 0.0:
        evidence = Evidence(epsilon, ALPHA)
        evidence.add(differs, checked)
        held.append(evidence._capital)
    assert all((capital > 0).all() for capital in held)
    mean = epsilon * held[0] + (1 - epsilon) * held[1]
    assert mean.sum() == pytest.approx(1 / 2)  # what the first gambler began with
