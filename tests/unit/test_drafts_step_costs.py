"""What a row costs beside a step is measured while serving, whatever the steps look like."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adainfer.drafts.step_costs import FEWEST, MOST, StepCosts

GUESS = 32.0


def measured(
    step: float, row: float, noise: float = 0.0, steps: int = 400, most_rows: int = 64
) -> StepCosts:
    """After steps that take `step` seconds and `row` for each row, up to a share of `noise`."""
    generator = random.Random(0)
    costs = StepCosts(GUESS)
    for _ in range(steps):
        rows = generator.randrange(1, most_rows)
        costs.add(rows, (step + row * rows) * (1 + noise * generator.uniform(-1, 1)))
    return costs


@pytest.mark.parametrize("rows", [5, 20, 100, 400])
def test_a_line_is_found(rows):
    assert measured(rows * 1e-4, 1e-4).rows_per_step == pytest.approx(rows, rel=0.01)


@pytest.mark.parametrize("rows", [20, 100])
def test_a_line_is_found_under_noise(rows):
    found = measured(rows * 1e-4, 1e-4, noise=0.2, most_rows=128).rows_per_step
    assert rows / 2 < found < 2 * rows


def test_it_follows_what_changes():
    costs = measured(20e-4, 1e-4)
    for place in range(400):
        costs.add(1 + place % 50, 100e-4 + 1e-4 * (1 + place % 50))
    assert costs.rows_per_step == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("rows", [1, 16])
def test_steps_of_one_size_tell_nothing(rows):
    costs = StepCosts(GUESS)
    for _ in range(100):
        costs.add(rows, random.Random(rows).random())
    assert costs.rows_per_step == GUESS


def test_nothing_is_learnt_where_more_rows_seem_to_take_less_time():
    costs = StepCosts(GUESS)
    for place in range(100):
        costs.add(1 + place % 50, 1.0 - 0.01 * (place % 50))
    assert costs.rows_per_step == GUESS


@given(
    st.lists(
        st.tuples(st.integers(0, 8192), st.floats(0, 1e4, allow_subnormal=False)), max_size=200
    ),
    st.integers(0, 4096),
)
def test_whatever_was_measured_it_stays_within_bounds(steps, running):
    costs = StepCosts(GUESS)
    for rows, seconds in steps:
        costs.add(rows, seconds)
        assert FEWEST <= costs.rows_per_step <= MOST
        assert 0 <= costs.least_share(running) < 1


def test_the_more_requests_run_the_surer_a_draft_must_be():
    costs = StepCosts(GUESS)
    shares = [costs.least_share(running) for running in (1, 4, 16, 64, 256)]
    assert shares == sorted(set(shares))
    assert costs.least_share(32) == 0.5  # a row costs as much as the request's share of a step
    assert [costs.least_share(1), costs.least_share(256)] == pytest.approx([1 / 33, 8 / 9])
