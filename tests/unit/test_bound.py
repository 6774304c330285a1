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

from tests.scored import fitted_exits, scored
from vllm_adainfer.offline.calibration.certify.bound import Bound
from vllm_adainfer.offline.calibration.certify.certify import certify
from vllm_adainfer.offline.calibration.certify.path import (
    held_out_path,
    threshold_grid,
    threshold_path,
)
from vllm_adainfer.offline.calibration.fit.exits import Scored

OUTCOMES = [(0, 1), (0, 50), (1, 50), (3, 300), (150, 300), (299, 300), (300, 300)]
EPSILONS = [0.01, 0.02, 0.05, 0.1, 0.5]
DELTAS = [0.0001, 0.01, 0.1, 0.5]
# Every kind on every range of losses it is for: 0 to 1 (disagreement), -1 to 1 (accuracy lost).
KINDS = [("exact", 0), ("wsr", 0), ("wsr", -1)]


def zeros_and_ones(errors: int, rows: int):
    return (np.arange(rows) < errors).astype(float)


def draw(rows: int, mean: float, lowest: int, seed: int):
    """Independent losses of that mean: 0 or 1, or (lowest -1) mostly 0 and as few 1 as can be."""
    uniform = np.random.default_rng(seed).random(rows)
    worse, better = (mean + 0.01, 0.01) if lowest else (mean, 0)
    return np.where(uniform < worse, 1.0, np.where(uniform > 1 - better, -1.0, 0.0))


def wsr_p_value(losses: Sequence[float], epsilon: float, delta: float) -> float:
    """Of losses in [0, 1], a row at a time: the Waudby-Smith-Ramdas bound in Bates et al. 2021."""
    capital = highest = 1.0
    seen, squares, variance = 0.0, 0.0, 1 / 4
    for i, loss in enumerate(losses, start=1):
        bet = min(1, math.sqrt(2 * math.log(1 / delta) / (len(losses) * variance)))
        capital *= 1 - bet * (loss - epsilon)
        highest = max(highest, capital)
        seen += loss
        squares += (loss - (1 / 2 + seen) / (1 + i)) ** 2
        variance = (1 / 4 + squares) / (1 + i)
    return 1 / highest


def reference_p_value(losses, epsilon: float, delta: float, lowest: float) -> float:
    unit = [(loss - lowest) / (1 - lowest) for loss in losses]
    return wsr_p_value(unit, (epsilon - lowest) / (1 - lowest), delta)


@pytest.mark.parametrize("delta", [0.01, 0.05, 0.1, 0.4])
@pytest.mark.parametrize(("errors", "rows"), OUTCOMES)
def test_the_exact_upper_bound_is_scipys(errors, rows, delta):
    two_sided = binomtest(errors, rows).proportion_ci(1 - 2 * delta, method="exact")
    bound = Bound("exact", delta, 0).of(zeros_and_ones(errors, rows))
    assert bound == pytest.approx(two_sided.high, abs=1e-9)


@pytest.mark.parametrize("delta", [0.01, 0.1])
@pytest.mark.parametrize("epsilon", [0.0001, *EPSILONS])
@pytest.mark.parametrize(("errors", "rows"), OUTCOMES)
def test_exactly_certified_is_scipys_one_sided_binomial_test(errors, rows, epsilon, delta):
    test = binomtest(errors, rows, epsilon, alternative="less")
    losses = zeros_and_ones(errors, rows)
    assert Bound("exact", delta, 0).holds(losses, epsilon) == (test.pvalue <= delta)


SAMPLES = {
    "one row": [0.0],
    "one row, wrong": [1.0],
    "no errors": [0.0] * 200,
    "all wrong": [1.0] * 40,
    "few errors": draw(400, 0.01, 0, seed=0),
    "many errors": draw(300, 0.4, 0, seed=1),
    "errors first": zeros_and_ones(5, 400),
    "errors last": zeros_and_ones(5, 400)[::-1],
    "any number": np.random.default_rng(2).beta(0.2, 2, 300),
}
SIGNED_SAMPLES = {
    "no change": [0.0] * 301,
    "all better": [-1.0] * 60,
    "mostly 0": draw(400, 0.0, -1, seed=3),
    "worse": draw(300, 0.2, -1, seed=4),
    "any signed number": np.random.default_rng(5).uniform(-1, 1, 300),
}
REFERENCED = [(losses, 0) for losses in SAMPLES.values()]
REFERENCED += [(losses, -1) for losses in (SAMPLES | SIGNED_SAMPLES).values()]
NAMES = [f"{name}, 0 to 1" for name in SAMPLES]
NAMES += [f"{name}, -1 to 1" for name in SAMPLES | SIGNED_SAMPLES]


@pytest.mark.parametrize("delta", [0.01, 0.1])
@pytest.mark.parametrize(("losses", "lowest"), REFERENCED, ids=NAMES)
def test_wsr_is_the_papers_formula(losses, lowest, delta):
    losses = np.asarray(losses)
    for epsilon in [0.001, *EPSILONS, 0.9]:
        p_value = reference_p_value(losses, epsilon, delta, lowest)
        assert Bound("wsr", delta, lowest).holds(losses, epsilon) == (p_value <= delta)
    bound = Bound("wsr", delta, lowest).of(losses)
    assert reference_p_value(losses, bound - 1e-9, delta, lowest) > delta
    assert bound == 1 or reference_p_value(losses, bound + 1e-9, delta, lowest) <= delta


@pytest.mark.parametrize(("kind", "lowest"), KINDS)
@given(data=st.data(), epsilon=st.floats(0.0001, 0.9), delta=st.floats(0.0001, 0.5))
@settings(deadline=None)
def test_certified_means_that_the_upper_bound_is_within_epsilon(kind, lowest, data, epsilon, delta):
    values = sorted({lowest, 0, 1})
    counts = data.draw(st.lists(st.integers(0, 300), min_size=len(values), max_size=len(values)))
    assume(sum(counts) > 0)
    losses = np.repeat(np.array(values, dtype=float), counts)
    np.random.default_rng(data.draw(st.integers(0, 99))).shuffle(losses)
    if kind != "exact" and data.draw(st.booleans()):
        losses *= 0.7
    bound = Bound(kind, delta, lowest).of(losses)
    assert lowest <= bound <= 1
    assume(not math.isclose(bound, epsilon, rel_tol=1e-9))
    assert Bound(kind, delta, lowest).holds(losses, epsilon) == (bound <= epsilon)


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize(("kind", "lowest"), KINDS)
def test_rows_needed_is_the_smallest_number_of_rows_that_can_certify(kind, lowest, epsilon, delta):
    needed = Bound(kind, delta, lowest).groups_needed(1, epsilon)
    assert Bound(kind, delta, lowest).holds(np.zeros(needed), epsilon)
    for fewer in range(max(1, needed - 400), needed):
        assert not Bound(kind, delta, lowest).holds(np.zeros(fewer), epsilon)


@pytest.mark.parametrize("kind", ["exact", "wsr"])
def test_no_number_of_rows_certifies_that_nothing_is_ever_lost(kind):
    with pytest.raises(ValueError, match="epsilon 0: it must be positive"):
        Bound(kind, 0.1, 0).groups_needed(1, 0.0)


@pytest.mark.parametrize("asked", [lambda bound, of: bound.holds(of, 0.1), Bound.of])
@pytest.mark.parametrize(
    ("losses", "kind", "lowest", "message"),
    [
        ([0.0, 0.5], "exact", 0, "exact bound is for losses of 0 or 1 only"),
        ([0.0, 1.0], "exact", -1, "exact bound is for losses of 0 or 1 only"),
        ([0.0, -1.0], "wsr", 0, "between 0 and 1, got -1 to 0"),
        ([0.0, 1.5], "wsr", -1, "between -1 and 1, got 0 to 1.5"),
    ],
)
def test_losses_that_a_bound_is_not_for_are_refused(asked, losses, kind, lowest, message):
    with pytest.raises(ValueError, match=message):
        asked(Bound(kind, 0.1, lowest), np.array(losses))


DEPTH, LAYERS = 10, (3, 6)
DELTA, RESAMPLES = 0.1, 300
# risk: (least loss, epsilon, held-out rows)
RISKS = {"disagreement": (0, 0.05, 300), "accuracy lost": (-1, 0.1, 1000)}
CERTIFYING = {"disagreement": ["exact", "wsr"], "accuracy lost": ["wsr"]}
SIMULATED = [(risk, kind) for risk, kinds in CERTIFYING.items() for kind in kinds]


def disagreement(score, agrees) -> Scored:
    return scored(torch.as_tensor(score).float(), ~agrees)


def population(rows: int, seed: int, risk: str = "disagreement") -> list[Scored]:
    """Two exit points that err less the surer they are; the later one errs less often."""
    generator = np.random.default_rng(seed)
    right_at_full_depth = generator.random(rows) < 0.8
    exits = []
    for worst in (0.5, 0.3):
        score = generator.random(rows)
        exits.append(disagreement(score, generator.random(rows) >= worst * (1 - score)))
        if risk == "accuracy lost":
            # Another answer than a right one is wrong; than a wrong one, right half of the time.
            other_is_right = ~right_at_full_depth & (generator.random(rows) < 0.5)
            right_here = np.where(exits[-1].agrees, right_at_full_depth, other_is_right)
            exits[-1].loss[:] = right_at_full_depth.astype(float) - right_here
    return exits


@cache
def violations(risk: str) -> dict[str, float]:
    """How often each kind of bound lets the population's mean loss exceed epsilon."""
    lowest, epsilon, rows = RISKS[risk]
    everyone, fitted = population(20_000, 0, risk), population(rows, 1, risk)
    grid = threshold_grid(fitted_exits(LAYERS, fitted, everyone))
    true = {point.threshold: point.risk for point in threshold_path(LAYERS, everyone, DEPTH, grid)}
    generator = np.random.default_rng(2)
    bad = dict.fromkeys([*CERTIFYING[risk], "naive"], 0)
    saved = dict.fromkeys(bad, 0.0)
    for _ in range(RESAMPLES):
        drawn = generator.integers(0, 20_000, rows)
        sample = [exit.of_rows(drawn) for exit in everyone]
        path = list(threshold_path(LAYERS, sample, DEPTH, grid))
        chosen = {
            kind: certify(path, [epsilon], Bound(kind, DELTA, lowest))[epsilon]
            for kind in CERTIFYING[risk]
        }
        chosen["naive"] = [point for point in path if point.risk <= epsilon][-1]
        for kind, point in chosen.items():
            bad[kind] += true[point.threshold] > epsilon
            saved[kind] += point.layers_saved
    # A bound that lets nobody leave would prove nothing.
    assert min(saved.values()) / RESAMPLES > 0.1
    return {kind: count / RESAMPLES for kind, count in bad.items()}


@pytest.mark.parametrize(("risk", "kind"), SIMULATED)
def test_a_certified_policy_exceeds_epsilon_no_more_often_than_delta(risk, kind):
    assert violations(risk)[kind] <= DELTA  # 5 to 8 % of these draws


@pytest.mark.parametrize(("risk", "kind"), SIMULATED)
def test_the_loosest_threshold_within_epsilon_on_the_rows_exceeds_it_far_more_often(risk, kind):
    naive = violations(risk)["naive"]
    assert naive > 0.4
    assert naive > 4 * violations(risk)[kind]


@pytest.mark.parametrize(("risk", "kind"), SIMULATED)
def test_the_certified_point_is_the_last_whose_bounds_up_to_there_are_all_within_epsilon(
    risk, kind
):
    lowest, epsilon, rows = RISKS[risk]
    exits = fitted_exits(LAYERS, population(rows, 6, risk), population(rows, 5, risk))
    path = list(held_out_path(exits, DEPTH, threshold_grid(exits)))
    point = certify(path, [epsilon], Bound(kind, DELTA, lowest))[epsilon]
    bounds = [Bound(kind, DELTA, lowest).of(each.losses) for each in path]
    [first_bad, *_] = (index for index, bound in enumerate(bounds) if bound > epsilon)
    assert point.threshold == path[first_bad - 1].threshold


def test_the_certified_path_stops_at_the_first_point_that_fails():
    # A tenth of the rows is surest, and wrong, at the later exit point. Any looser threshold lets
    # all rows leave earlier and right: no errors, but fixed-sequence testing never gets there.
    wrong = np.arange(1000) < 100
    early = disagreement(np.zeros(1000), np.ones(1000, dtype=np.bool_))
    late = disagreement(np.where(wrong, 1.0, -1.0), ~wrong)
    path = list(threshold_path(LAYERS, [early, late], DEPTH, [math.inf, 1.0, 0.0]))
    assert [point.losses.sum() for point in path] == [0, 100, 0]
    point = certify(path, [0.05], Bound("exact", DELTA, 0))[0.05]
    assert (point.threshold, point.layers_saved) == (math.inf, 0)


@pytest.mark.parametrize("risk", RISKS)
@pytest.mark.parametrize("seed", range(5))
def test_a_row_leaves_at_the_first_exit_point_whose_score_passes(seed, risk):
    exits = population(200, seed, risk)
    for point in threshold_path(LAYERS, exits, DEPTH, [math.inf, 0.9, 0.5, 0.1, -math.inf]):
        where = [
            next((i for i, e in enumerate(exits) if e.score[row] >= point.threshold), len(LAYERS))
            for row in range(200)
        ]
        left = [(row, exit) for row, exit in enumerate(where) if exit < len(LAYERS)]
        losses = np.zeros(200)
        for row, exit in left:
            losses[row] = exits[exit].loss[row]
        assert point.exits.tolist() == where
        assert point.losses.tolist() == losses.tolist()
        assert point.risk == pytest.approx(losses.mean())
        assert point.disagreement == sum(not exits[exit].agrees[row] for row, exit in left) / 200
        saved = sum(DEPTH - LAYERS[exit] for _, exit in left)
        assert point.layers_saved == pytest.approx(saved / (200 * DEPTH))


@pytest.mark.parametrize("together", [1, 5])
@pytest.mark.parametrize(
    ("kind", "rows", "epsilon"),
    [("exact", 300, 0.02), ("wsr", 1500, 0.02), ("wsr", 400, 0.1), ("wsr", 2000, 0.1)],
)
def test_the_allowance_is_the_most_that_certifies(kind, rows, epsilon, together):
    groups = None if together == 1 or kind == "exact" else np.repeat(np.arange(rows // 5), 5)
    bound = Bound(kind, DELTA, 0, groups, longest=together)
    errors = round(bound.allowance(rows, epsilon) * rows)
    order = np.random.default_rng(0).permutation(rows)
    assert bound.holds((order < errors).astype(float), epsilon)
    assert not bound.holds((order < errors + 1).astype(float), epsilon)


def test_nothing_is_certified_with_too_few_rows():
    few = Bound("exact", DELTA, 0).groups_needed(1, 0.05) - 1
    half = [disagreement(torch.rand(few), np.ones(few, dtype=np.bool_)) for _ in LAYERS]
    path = threshold_path(LAYERS, half, DEPTH, [math.inf, 0.5])
    assert certify(path, [0.05], Bound("exact", DELTA, 0)) == {}


def clustered(generator: np.random.Generator, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Losses at a mean of `rate` of 75 prompts of 1 row and, where they all are, 75 of 20 rows."""
    lens = np.tile([1, 20], 75)
    prompts = np.repeat(np.arange(150), lens)
    rate *= 21 / 20
    own = generator.beta(0.3 * rate / (1 - rate), 0.3, 150)  # most prompts at 0, a few near 1
    own[lens == 1] = 0
    return prompts, (generator.random(len(prompts)) < own[prompts]).astype(np.float64)


def test_rows_of_one_prompt_are_not_taken_for_independent():
    """At a rate above epsilon by a tenth, a bound over prompts errs seldom, one over rows often."""
    epsilon, delta, draws = 0.1, 0.1, 300
    generator = np.random.default_rng(3)
    by_prompt = by_row = 0
    for _ in range(draws):
        prompts, losses = clustered(generator, 1.1 * epsilon)
        by_prompt += Bound("wsr", delta, 0.0, prompts, longest=20).holds(losses, epsilon)
        by_row += Bound("exact", delta, 0.0).holds(losses, epsilon)
    assert by_prompt / draws <= delta
    assert by_row / draws > 1.5 * delta


def test_a_bound_over_prompts_certifies_what_is_far_below_it():
    prompts, losses = clustered(np.random.default_rng(5), 0.01)
    bound = Bound("wsr", 0.1, 0.0, prompts, longest=20)
    assert bound.holds(losses, 0.2)
    upper = bound.of(losses)
    assert losses.mean() < upper < 0.2
    assert bound.holds(losses, upper)
    assert not bound.holds(losses, upper - 0.005)


@pytest.mark.parametrize(("kind", "lowest"), KINDS)
def test_where_each_row_is_a_group_of_its_own_the_bound_is_that_of_rows_bit_for_bit(kind, lowest):
    rows = Bound(kind, 0.1, lowest)
    groups = Bound(kind, 0.1, lowest, np.arange(400) + 50, longest=1)
    for losses in draw(400, 0.02, lowest, seed=1), draw(400, 0.0, lowest, seed=2):
        assert groups.of(losses) == rows.of(losses)
        for epsilon in (0.005, 0.02, 0.03, 0.05, 0.1):
            assert groups.holds(losses, epsilon) == rows.holds(losses, epsilon)
    assert groups.groups_needed(400, 0.02) == Bound(kind, 0.1, lowest).groups_needed(1, 0.02)


def test_a_group_that_is_larger_than_can_be_does_not_count():
    groups = np.array([*range(400), *[400] * 30])
    losses = (groups == 400).astype(np.float64)
    without = Bound("exact", 0.1, 0.0).of(np.zeros(400))
    assert Bound("exact", 0.1, 0.0, groups, longest=1).of(losses) == without
    assert Bound("wsr", 0.1, 0.0, groups, longest=29).holds(losses, 0.5)
    assert not Bound("exact", 0.1, 0.0, np.zeros(30), longest=1).holds(np.zeros(30), 0.5)
    assert Bound("exact", 0.1, 0.0, np.zeros(30), longest=1).of(np.zeros(30)) == 1


@pytest.mark.parametrize("sizes", [[5], [1, 5], [1, 1, 1, 20]])
def test_the_groups_needed_are_the_fewest_that_certify(sizes):
    def holds(count: int) -> bool:
        groups = np.repeat(np.arange(count), np.resize(sizes, count))
        return Bound("wsr", 0.1, 0.0, groups, max(sizes)).holds(np.zeros(len(groups)), 0.05)

    some = np.repeat(np.arange(len(sizes)), sizes)
    needed = Bound("wsr", 0.1, 0.0, some, max(sizes)).groups_needed(len(some), 0.05)
    assert holds(needed)
    assert not holds(needed - 1)


def test_thresholds_fall_among_the_scores_that_rows_can_have():
    """Rows that are never settled have none; no threshold lies between those and others."""
    score = torch.linspace(0, 1, 100)
    score[::2], score[1] = -torch.inf, torch.nan
    exits = [disagreement(score, np.ones(100, dtype=np.bool_))] * 2
    first, *grid = threshold_grid(fitted_exits(LAYERS, exits, exits))
    assert first == math.inf
    assert len(grid) > 40
    assert grid == sorted(grid, reverse=True)
    assert min(grid) == score[3]


def test_where_no_row_is_ever_settled_nothing_leaves():
    exits = [disagreement(torch.full((10,), -torch.inf), np.ones(10, dtype=np.bool_))] * 2
    assert threshold_grid(fitted_exits(LAYERS, exits, exits)) == [math.inf]
