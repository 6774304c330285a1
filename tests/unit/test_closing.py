"""A kind is closed for good by evidence that is rarely wrong, and soon there when it is right."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vllm_adainfer.auto.evidence import ERROR_RATE, Evidence

EPSILON, RATE = 0.02, 0.25


def closed_after(share: float, steps: int, size: int, seed: int, good: int = 0) -> float:
    """The requests, after so many good ones, until evidence is enough; infinite if it never is."""
    random = np.random.default_rng([seed, size])
    evidence = Evidence(EPSILON)
    for misses in random.binomial(size, RATE * EPSILON / 4, good // size).tolist():
        evidence.add(size, misses, RATE)
    assert not evidence.is_enough
    for step, misses in enumerate(random.binomial(size, RATE * share, steps).tolist()):
        evidence.add(size, misses, RATE)
        if evidence.is_enough:
            return (step + 1) * size
    return np.inf


@pytest.mark.parametrize("size", [20, 500])
def test_a_policy_at_its_bound_is_closed_in_at_most_so_many_runs(size):
    runs = 400
    closed = sum(closed_after(EPSILON, 60, size, seed) < np.inf for seed in range(runs))
    assert closed <= ERROR_RATE * runs + 3 * np.sqrt(ERROR_RATE * runs)


@pytest.mark.parametrize("good", [0, 20_000, 200_000])
@pytest.mark.parametrize(("share", "soon"), [(0.04, 12_000), (0.1, 1200), (1.0, 100)])
def test_a_change_is_seen_soon_also_after_a_long_good_past(good, share, soon):
    found = [closed_after(share, 1000, 50, seed, good) for seed in range(7)]
    assert np.median(found) <= soon


def test_a_step_of_misses_alone_is_a_finite_number():
    evidence = Evidence(1e-6)
    evidence.add(100_000, 100_000, 0.999)
    assert evidence.is_enough
    again = Evidence.of_dict(1e-6, json.loads(json.dumps(evidence.as_dict(), allow_nan=False)))
    assert again.is_enough
