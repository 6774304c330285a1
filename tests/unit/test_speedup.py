"""Speed-ups over paired rounds: their interval keeps what it says, and noise is called noise."""

from __future__ import annotations

from collections import Counter
from inspect import signature

import numpy as np
import pytest

from vllm_adainfer.cli.evaluate import evaluate
from vllm_adainfer.offline.evaluation.rounds import ROUNDS, in_rounds, slice_of, turns
from vllm_adainfer.offline.reports.speedup import LEAST_ROUNDS, Speedup, doubt


def test_load_that_falls_on_both_sides_of_a_round_is_no_noise():
    load = np.array([1.0, 3.0, 1.2, 0.9, 5.0, 1.1])
    found = Speedup.of(2 * load, load)
    assert (found.value, found.interval, found.reach) == (2.0, (2.0, 2.0), 0.0)


def draw(generator: np.random.Generator, rounds: int) -> Speedup:
    """Rounds around 1, of which every fifth falls into a burst of other load."""
    noise = generator.normal(0, 0.03, rounds)
    noise += (generator.random(rounds) < 0.2) * generator.normal(0, 0.5, rounds)
    return Speedup(tuple(np.exp(noise)))


@pytest.mark.parametrize("rounds", [6, 12])
def test_the_interval_misses_the_truth_as_seldom_as_it_says_on_a_host_with_bursts(rounds):
    generator = np.random.default_rng(0)
    intervals = [draw(generator, rounds).interval for _ in range(80)]
    missed = sum(one is None or not one[0] <= 1 <= one[1] for one in intervals)
    assert missed / 80 < 0.08


def test_equal_rounds_give_equal_intervals():
    ratios = tuple(np.random.default_rng(1).normal(2, 0.1, 12))
    assert Speedup(ratios).interval == Speedup(ratios).interval


def test_few_rounds_have_a_range_and_no_interval():
    few = Speedup((1.5, 1.7, 1.6))
    assert few.interval is None
    assert few.text == "1.60x (3 rounds: 1.50 to 1.70)"
    assert "Fewer than 6 rounds" in str(doubt(few))


def test_a_host_is_too_noisy_if_an_interval_reaches_further_than_5_percent():
    calm = Speedup(tuple(np.linspace(1.98, 2.02, 12)))
    wild = Speedup(tuple(np.linspace(1.0, 3.0, 12)))
    assert doubt(calm) is None
    assert str(doubt(calm, wild)).startswith("This host is too noisy to tell: an interval reaches")
    assert f"±{wild.reach:.2f} of its ratio" in str(doubt(calm, wild))


def test_a_report_keeps_the_rounds_and_one_of_before_has_its_ratio_alone():
    found = Speedup(tuple(np.linspace(1.9, 2.1, 8)))
    assert Speedup.read(found.entries("speedup"), "speedup") == found
    assert Speedup.read({"never_exit": 0.97}, "never_exit").text == "0.97x"


def test_every_side_comes_first_equally_often():
    order = list(turns(["stock", "never", "ours"], 12))
    assert len(order) == 36
    assert Counter(side for _, side in order[::3]) == {"stock": 4, "never": 4, "ours": 4}
    assert in_rounds(["a", "b"], 2, str.upper) == {"a": ["A", "A"], "b": ["B", "B"]}


def test_evaluate_runs_as_many_rounds_by_default_as_benchmarks_and_enough_for_an_interval():
    assert signature(evaluate).parameters["repeat"].default == ROUNDS >= 10 > LEAST_ROUNDS


def test_three_rounds_run_every_prompt_once_unless_a_round_would_be_too_small():
    prompts = list(range(100))
    rounds = [slice_of(prompts, number, 20) for number in range(3)]
    assert sorted(prompt for some in rounds for prompt in some) == prompts
    assert [*slice_of(prompts, 1, 60)] == prompts
    assert len(slice_of(prompts, 1, 40)) == 50
