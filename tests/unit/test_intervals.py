"""Intervals of a rate that miss it with probability alpha at most, however often they are read."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import beta

from vllm_adainfer.watch.intervals import PRIOR, RATES, STAKES, Capital, confidence_interval

ALPHA = 0.1
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
    assert confidence_interval(0, 0, ALPHA) == (0, 1)
    assert Capital(RATES).interval(ALPHA) == (0, 1)


@pytest.mark.parametrize("disagreed", [0, 1, 20_000, 999_999, 1_000_000])
def test_the_interval_stays_around_the_rate_at_a_million_answers(disagreed):
    low, high = confidence_interval(disagreed, 1_000_000, 0.05)
    assert 0 <= low <= disagreed / 1_000_000 <= high <= 1
    assert high - low < 0.002


@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_looked_at_after_every_answer_it_misses_the_truth_in_at_most_alpha_of_paths(rate):
    paths, steps = 300, 500
    generator = np.random.default_rng(0)
    counts = (generator.random((paths, steps)) < rate).cumsum(axis=1)
    missed = 0
    for path in counts:
        ends = [interval(int(k), n, ALPHA) for n, k in enumerate(path, start=1)]
        missed += any(not low <= rate <= high for low, high in ends)
    assert missed <= paths * ALPHA + 2.33 * np.sqrt(paths * ALPHA * (1 - ALPHA))


def slow_capital(groups: list[tuple[float, float]], p: float) -> tuple[float, float]:
    """Its definition, in plain numbers."""
    above = below = 0.0
    for stake in STAKES:
        held = [1.0, 1.0]
        for disagreed, checked in groups:
            held[0] *= 1 + stake * (disagreed - p * checked) / p
            held[1] *= 1 + stake * (p * checked - disagreed) / (1 - p)
        above, below = above + held[0] / len(STAKES), below + held[1] / len(STAKES)
    return above, below


def test_of_groups_it_lies_between_the_rates_against_which_capital_has_reached_two_over_alpha():
    generator = np.random.default_rng(2)
    checked = generator.random(60)
    groups = [
        (c * float(d), float(c)) for c, d in zip(checked, generator.random(60) < 0.3, strict=True)
    ]
    capital = Capital(RATES)
    for group in groups:
        capital.bet(*group)
    low, high = capital.interval(ALPHA)
    held = {p: slow_capital(groups, p) for p in RATES}
    assert low == max(p for p, (above, _) in held.items() if above >= 2 / ALPHA)
    assert high == min(p for p, (_, below) in held.items() if below >= 2 / ALPHA)
    assert 0 < low < high < 1


def text(generator: Any, share: float, most: int) -> tuple[int, int]:
    """Tokens that differ and all; so large a `share` of texts differs from the middle on."""
    if generator.random() < share:
        return most // 2, most
    return 0, int(generator.integers(1, most + 1))


@pytest.mark.parametrize("share", [0.02, 0.2])
def test_looked_at_after_every_text_it_misses_the_truth_in_at_most_alpha_of_paths(share):
    generator, paths, missed, most = np.random.default_rng(1), 60, 0, 20
    truth = (share * most / 2) / (share * most + (1 - share) * (most + 1) / 2)
    for _ in range(paths):
        capital = Capital(RATES)
        for _ in range(100):
            differ, tokens = text(generator, share, most)
            capital.bet(differ / most, tokens / most)
            low, high = capital.interval(ALPHA)
            if not low <= truth <= high:
                missed += 1
                break
    assert missed <= paths * ALPHA + 2.33 * np.sqrt(paths * ALPHA * (1 - ALPHA))
