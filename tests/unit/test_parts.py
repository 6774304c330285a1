"""Two parts of a policy under one bound, whichever of them decides a request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest

from tests.scored import SAFE, UNSAFE, fitted_exits, safe_or_not
from vllm_adainfer.artifact.fields import LabelBound
from vllm_adainfer.offline.calibration.certify.bound import Bound
from vllm_adainfer.offline.calibration.certify.certify import LabelTest, certify
from vllm_adainfer.offline.calibration.certify.path import (
    LAST_TOKEN_SHARE,
    Pair,
    PathPoint,
    Queries,
    held_out_path,
    pair_path,
    pairs_of_thresholds,
    threshold_grid,
    threshold_path,
)
from vllm_adainfer.offline.calibration.fit.exits import FittedExit, Scored
from vllm_adainfer.promise.first_documents import FirstDocuments

DEPTH, LAYERS, ROWS, EVERYONE = 10, (3, 6), 600, 6000
EPSILON, DELTA, RESAMPLES = 0.05, 0.1, 100
RECALL = LabelBound(kind="recall", label="unsafe", epsilon=0.04)


@cache
def population(seed: int = 0) -> tuple[list[Scored], list[Scored]]:
    """Exits of both parts; a sixth is unsafe. They err on different rows, and not always."""
    generator = np.random.default_rng(seed)
    full = np.where(generator.random(EVERYONE) < 1 / 6, UNSAFE, SAFE)

    def exit_point(worst: float) -> Scored:
        return safe_or_not(generator, full, worst)

    return [exit_point(0.4), exit_point(0.2)], [exit_point(0.6), exit_point(0.3)]


def drawn(rows: Any) -> list[list[FittedExit]]:
    """Both parts, certified on `rows` of the population; other rows of it have been fitted on."""
    fit = np.random.default_rng(5).integers(0, EVERYONE, ROWS)
    return [
        fitted_exits(LAYERS, *([one.of_rows(some) for one in part] for some in (fit, rows)))
        for part in population()
    ]


@cache
def served(*thresholds: float) -> Pair:
    """Both parts on the whole population, each at its threshold."""
    points = [
        next(iter(threshold_path(LAYERS, part, DEPTH, [threshold])))
        for part, threshold in zip(population(), thresholds, strict=True)
    ]
    [pair] = pair_path(*([one] for one in points))
    return pair


def pairs_on(parts: Sequence[list[FittedExit]], pairs: Sequence[tuple[float, float]]) -> list[Pair]:
    """The held-out rows of both parts at each of the pairs of thresholds."""
    thresholds = zip(*pairs, strict=True)
    paths = [held_out_path(part, DEPTH, own) for part, own in zip(parts, thresholds, strict=True)]
    return [*pair_path(*paths)]


def missed(pair: Pair) -> float:
    """The share of the unsafe that some choice between the parts calls safe."""
    unsafe = pair.full == UNSAFE
    either = (pair.whole.answers == SAFE) | (pair.last.answers == SAFE)
    return float(either[unsafe].mean())


@cache
def certified_pairs() -> dict[str, list[Pair]]:
    """What is certified on rows drawn again and again: together, or each part by itself."""
    generator, bound = np.random.default_rng(1), Bound("exact", DELTA, 0.0)
    test = LabelTest(RECALL, UNSAFE, bound)
    pairs = pairs_of_thresholds(*drawn(np.arange(ROWS)), DEPTH)
    found: dict[str, list[Pair]] = {"together": [], "with recall": [], "each by itself": []}
    for _ in range(RESAMPLES):
        parts = drawn(generator.integers(0, EVERYONE, ROWS))
        for name, tests in (("together", []), ("with recall", [test])):
            pair = certify(pairs_on(parts, pairs), [EPSILON], bound, tests)[EPSILON]
            found[name].append(served(pair.whole.threshold, pair.last.threshold))
        paths = [held_out_path(part, DEPTH, threshold_grid(part)) for part in parts]
        alone = [certify(path, [EPSILON], bound)[EPSILON].threshold for path in paths]
        found["each by itself"].append(served(*alone))
    return found


def test_the_larger_loss_of_both_parts_exceeds_epsilon_in_no_more_draws_than_delta():
    """So no mixture of them does, whatever decides which of them answers a request."""
    pairs = certified_pairs()["together"]
    assert np.mean([pair.losses.mean() > EPSILON for pair in pairs]) <= DELTA
    assert np.mean([pair.whole.layers_saved for pair in pairs]) > 0.1
    assert np.mean([pair.last.layers_saved for pair in pairs]) > 0.02, "the last token leaves, too"


def test_certified_each_by_itself_some_mixture_of_them_nearly_always_exceeds_epsilon():
    pairs = certified_pairs()["each by itself"]
    assert np.mean([pair.losses.mean() > EPSILON for pair in pairs]) > 0.9


def test_a_promise_about_a_label_holds_with_epsilon_whichever_part_decides():
    pairs = certified_pairs()["with recall"]
    broken = [pair.losses.mean() > EPSILON or missed(pair) > RECALL.epsilon for pair in pairs]
    assert np.mean(broken) <= DELTA
    without = [missed(pair) > RECALL.epsilon for pair in certified_pairs()["together"]]
    assert np.mean(without) > 0.5


def test_the_last_token_adds_no_more_than_its_share_of_the_losses_and_thresholds_never_rise():
    parts = drawn(np.arange(ROWS))
    pairs = pairs_of_thresholds(*parts, DEPTH)
    again = [fitted_exits(LAYERS, *[[one.fitted for one in part]] * 2) for part in parts]
    before = math.inf
    for pair in pairs_on(again, pairs):
        if pair.last.threshold < before:  # it has just been lowered
            most = pair.whole.losses.mean() / (1 - LAST_TOKEN_SHARE)
            assert pair.losses.mean() <= most + 1e-12
        assert pair.last.threshold >= pair.whole.threshold
        before = pair.last.threshold
    assert pairs == sorted(pairs, reverse=True)
    assert sorted((last for _, last in pairs), reverse=True) == [last for _, last in pairs]
    assert len({last for _, last in pairs}) > 5


def test_the_pairs_do_not_depend_on_a_held_out_row():
    some, others = (drawn(np.arange(start, start + ROWS)) for start in (0, 3000))
    assert pairs_of_thresholds(*some, DEPTH) == pairs_of_thresholds(*others, DEPTH)


def point(losses: Any, answers: Any, full: Any, relevance: Any = None) -> PathPoint:
    exits = np.zeros(len(full), dtype=np.int64)
    return PathPoint(0.0, exits, np.asarray(losses), answers, full, 0.0, relevance)


@pytest.mark.parametrize("kind", ["recall", "precision"])
def test_no_choice_between_the_parts_is_worse_for_a_label_than_what_is_tested(kind):
    """Worth of a row: epsilon less its loss, where the promise is about the row; else 0."""
    epsilon, generator = 0.3, np.random.default_rng(0)
    promise = LabelBound(kind=kind, label="unsafe", epsilon=epsilon)

    def worth(answers: Any, full: Any) -> Any:
        about = promise.chosen_by(answers, full) == UNSAFE
        return np.where(about, epsilon - (answers != full), 0.0)

    full, whole, last = generator.choice([SAFE, UNSAFE, 9], (3, 300))
    [pair] = pair_path(*([point(one != full, one, full)] for one in (whole, last)))
    worst = worth(pair.answers_about(UNSAFE), full)
    assert np.array_equal(worst, np.minimum(worth(whole, full), worth(last, full)))


@pytest.mark.parametrize("seed", range(5))
def test_a_query_is_lost_if_some_choice_of_parts_for_its_documents_loses_one(seed):
    generator, promise = np.random.default_rng(seed), FirstDocuments(k=2, margin=0.05)
    groups, documents = np.repeat(np.arange(20), 6), 120
    full = generator.random(documents).round(1)  # with ties
    scores = [full + generator.normal(0, 0.08, documents).round(2) for _ in range(2)]
    scores[1][::4] = np.nan  # full depth's
    points = [point(np.zeros(documents), full, full, one) for one in scores]
    queries = Queries.of_groups(promise, groups, full)
    scores[1][::4] = full[::4]
    lost = [
        any(
            promise.breaks(np.where(which, scores[0][own], scores[1][own]), full[own])
            for which in product([True, False], repeat=len(own))
        )
        for own in queries.rows
    ]
    [pair] = pair_path(*([one] for one in points), queries)
    assert pair.losses.tolist() == lost
    assert 0 < sum(lost) < 20
