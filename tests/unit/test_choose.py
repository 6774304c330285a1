"""Exit points are chosen by expected time, reckoned here a prompt at a time."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from adainfer_kernels import Head

from tests.scored import scored
from vllm_adainfer.offline.calibration.fit import choose
from vllm_adainfer.offline.calibration.fit.choose import (
    choose_exits,
    evenly_spread,
    expected_seconds,
)
from vllm_adainfer.offline.calibration.fit.cost import Costs, shares_of_time
from vllm_adainfer.offline.calibration.fit.exits import HANDICAPS, FittedExit
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.policy.score import score as served_score

DEPTH, ROWS = 12, 80
LAYERS = (2, 4, 6, 8, 10)
PROBE = Probe(Head(torch.zeros(2, 4)))


def exit_after(layer: int, score: np.ndarray, loss: np.ndarray) -> FittedExit:
    rows = scored(torch.tensor(score).float(), loss != 0, loss=loss)
    return FittedExit(layer, PROBE, torch.zeros(3), rows, rows)


def candidates_of(seed: int, lowest: int = 0, ties: bool = False) -> list[FittedExit]:
    """Deeper exit points are surer, and wrong less often; a hard prompt is hard everywhere."""
    generator = np.random.default_rng(seed)
    hardness = generator.random(ROWS)
    exits = []
    for layer in LAYERS:
        score = layer / DEPTH - hardness + 0.3 * generator.standard_normal(ROWS)
        wrong = generator.random(ROWS) < hardness * (1 - layer / DEPTH) / 3
        better = generator.random(ROWS) < 0.05
        loss = np.where(wrong, 1, np.where(better, lowest, 0))
        exits.append(exit_after(layer, score.round(1) if ties else score, loss))
    return exits


def costs_of(probe: float = 1e-4, cut: float = 1e-5, head: float = 0.0, **dear: float) -> Costs:
    by_layer = {layer: dear.get(f"after_{layer}", probe) for layer in LAYERS}
    return Costs(DEPTH, layer=1e-4, cut=cut, probe=by_layer, own_kv_layers=DEPTH, head=head)


def test_fewer_rows_take_the_measured_share_of_a_layers_time():
    """Half of the token rows leave after layer 4, and nine tenths in all after layer 8."""
    tokens = np.full(10, 7.0)
    first = np.where(np.arange(10) < 5, 1.0, -1.0)
    second = np.where(np.arange(10) < 9, 1.0, -1.0)
    exits = [exit_after(4, first, np.zeros(10)), exit_after(8, second, np.zeros(10))]
    late = np.where(np.arange(10) < 9, 0, 1)  # the last row may not leave
    exits = [replace(exit, fitted=replace(exit.fitted, loss=late.astype(float))) for exit in exits]
    costs = replace(costs_of(probe=0.0, cut=0.0), fewer=((0.25, 0.5), (0.5, 0.8)))
    found = expected_seconds(exits, costs, tokens, 0.0)
    shares = 4 * 1.0 + 4 * 0.8 + 4 * (0.5 * 0.1 / 0.25)
    assert found == pytest.approx(costs.layer * 7 * shares)


@pytest.mark.parametrize(
    ("layer", "rows_below", "rows_beyond"),
    [(4, 4 * 70 + 2 * 14, 6 * 2), (8, 6 * 70 + 2 * 10, 4 * 2), (None, 6 * 70, 6 * 10)],
)
def test_layers_that_share_keys_are_run_by_rows_that_decide_alone(layer, rows_below, rows_beyond):
    """Of twelve layers six share. Eight of ten prompts, of seven rows each, leave after one."""
    tokens, losses = np.full(10, 7.0), np.where(np.arange(10) < 8, 0.0, 1.0)
    exits = []
    if layer is not None:
        exit = exit_after(layer, np.where(losses == 0, 1.0, -1.0), losses)
        exits = [replace(exit, fitted=replace(exit.fitted, loss=losses))]
    costs = replace(costs_of(probe=0.0, cut=0.0), own_kv_layers=6)
    found = expected_seconds(exits, costs, tokens, 0.0)
    assert found == pytest.approx(costs.layer * (rows_below + rows_beyond) / 10)


@pytest.mark.parametrize(
    ("fewer", "expected"),
    [
        ([[], [], []], ()),
        ([[(0.5, 0.8), (0.5, 0.7), (0.5, 0.9)], [], []], ((0.5, 0.8),)),
        ([[(0.5, 1.2)], [(0.25, 0.7)], []], ((0.25, 0.7), (0.5, 1.0))),
        ([[(0.5, 0.6)], [(0.25, 0.7)], []], ((0.25, 0.7), (0.5, 0.7))),
    ],
)
def test_measured_shares_are_medians_that_never_fall_with_more_rows(fewer, expected):
    found = shares_of_time(fewer)
    assert [pytest.approx(pair) for pair in expected] == list(found)


def tokens_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed + 100).integers(1, 60, ROWS).astype(np.float64)


def by_prompt(exits, costs, tokens, threshold) -> tuple[float, float]:
    """Mean time and mean loss at one threshold."""
    lost = 0.0
    seconds = 0.0
    scores = [exit.fitted.score.tolist() for exit in exits]
    for row in range(ROWS):
        layers_run = DEPTH
        for exit, score in zip(exits, scores, strict=True):
            seconds += costs.probe[exit.layer] + costs.cut * tokens[row]
            if score[row] >= threshold:
                layers_run = exit.layer
                lost += exit.fitted.loss[row]
                break
        else:
            seconds += costs.head
        seconds += costs.layer * layers_run * tokens[row]
    return seconds / ROWS, lost / ROWS


@pytest.mark.parametrize("allowed", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("lowest", [0, -1])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("layers", [(4,), (2, 8), (4, 6, 10), LAYERS])
@pytest.mark.parametrize("head", [0.0, 5e-3])
def test_a_forecast_is_the_loosest_threshold_before_the_first_beyond_the_bound(
    head, layers, ties, lowest, allowed
):
    exits = [exit for exit in candidates_of(7, lowest, ties) if exit.layer in layers]
    costs, tokens = costs_of(head=head), tokens_of(7)
    thresholds = sorted({float(s) for exit in exits for s in exit.fitted.score}, reverse=True)
    best = by_prompt(exits, costs, tokens, np.inf)
    for threshold in thresholds:
        found = by_prompt(exits, costs, tokens, threshold)
        if found[1] > allowed + 1e-9:
            break
        best = found
    assert expected_seconds(exits, costs, tokens, allowed) == pytest.approx(best[0])


@pytest.mark.parametrize("head", [0.0, 5e-3])
def test_full_depth_is_forecast_without_probes_and_cuts(head):
    costs, tokens = costs_of(head=head), tokens_of(0)
    full = expected_seconds([], costs, tokens, 0.02)
    assert full == pytest.approx(costs.layer * DEPTH * tokens.mean() + head)


@pytest.mark.parametrize("score", [np.nan, -np.inf])
@pytest.mark.parametrize("others", [0, 4])
def test_an_exit_point_that_never_settles_a_row_lets_nobody_leave(score, others):
    exits = candidates_of(0)[1 : 1 + others]
    nowhere = exit_after(2, np.full(ROWS, score), np.zeros(ROWS))
    costs, tokens = costs_of(probe=0.0, cut=0.0), tokens_of(0)
    without = expected_seconds(exits, costs, tokens, 0.05)
    found = expected_seconds([nowhere, *exits], costs, tokens, 0.05)
    assert found == pytest.approx(without)


@pytest.mark.parametrize("odds", HANDICAPS)
def test_a_handicap_moves_scores_and_the_bias_that_serves_them(odds):
    fitted, classifier = candidates_of(3)[0], torch.tensor([2.0, -1.0, 0.5])
    fitted = replace(fitted, classifier=classifier)
    moved = fitted.with_handicap(odds)
    features = torch.randn(5, 2)
    served = served_score(features, moved.classifier, None)
    served = served - served_score(features, classifier, None)
    assert served.tolist() == pytest.approx([odds] * 5, abs=1e-5)
    for ours, theirs in ((moved.fitted, fitted.fitted), (moved.held_out, fitted.held_out)):
        assert (ours.score - theirs.score).tolist() == pytest.approx([odds] * ROWS, abs=1e-5)
    assert classifier.tolist() == [2.0, -1.0, 0.5]


@pytest.mark.parametrize("too_sure", [-2.0, 0.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_student_with_exits_is_no_slower_than_the_better_of_the_two_alone(seed, too_sure):
    """Also where its score is not on the scale of theirs."""
    generator = np.random.default_rng(seed)
    hardness = generator.random(ROWS)
    wrong = np.where(generator.random(ROWS) < 0.2 * hardness, 1.0, 0.0)
    student = exit_after(0, 2 - 2 * hardness + too_sure, wrong)
    beside = [student, *(student.with_handicap(odds) for odds in HANDICAPS)]
    heads, tokens, allowed = candidates_of(seed), tokens_of(seed), 0.03
    costs = replace(costs_of(), probe=dict.fromkeys((0, *LAYERS), 1e-4))

    def seconds(exits) -> float:
        return expected_seconds(choose_exits(exits, costs, tokens, allowed), costs, tokens, allowed)

    assert seconds([*beside, *heads]) <= min(seconds([student]), seconds(heads)) + 1e-9


def test_a_student_that_is_too_sure_gets_a_handicap_so_that_exits_can_follow_it():
    """It is right about half of the rows, and surer of the others than the head that knows them."""
    knows = np.arange(ROWS) < ROWS // 2
    student = exit_after(0, np.where(knows, 1.0, 0.0), np.where(knows, 0.0, 1.0))
    head = exit_after(6, np.where(knows, -4.0, -2.0), np.zeros(ROWS))
    candidates = [student, *(student.with_handicap(odds) for odds in HANDICAPS), head]
    costs = replace(costs_of(), probe={0: 1e-4, 6: 1e-4})
    assert [one.layer for one in choose_exits([student, head], costs, tokens_of(0), 0.0)] == [0]
    found = choose_exits(candidates, costs, tokens_of(0), 0.0)
    assert [(one.layer, one.handicap) for one in found] == [(0, -3.0), (6, 0.0)]


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_best_of_all_sets(seed):
    candidates, costs, tokens = candidates_of(seed), costs_of(), tokens_of(seed)

    def seconds(exits) -> float:
        return expected_seconds(exits, costs, tokens, 0.03)

    every = [
        exits
        for count in range(choose.MAX_EXIT_POINTS + 1)
        for exits in combinations(candidates, count)
    ]
    chosen = choose_exits(candidates, costs, tokens, 0.03)
    assert tuple(chosen) in every
    # Up to the gain below which one exit point more is not worth it.
    spare = choose.MIN_GAIN * seconds([]) * choose.MAX_EXIT_POINTS
    assert seconds(chosen) <= min(map(seconds, every)) + spare


@pytest.mark.parametrize(("rows", "layers"), [(4, [10]), (6, [10, 11])])
def test_an_exit_point_that_gains_next_to_nothing_is_left_out(rows, layers):
    """A row that leaves a layer early takes 1 / (12 * 80), 0.1 %, off full depth's time."""
    row = np.arange(ROWS)
    early = exit_after(10, np.where(row < 40, 1.0, -1.0), row >= 40)
    late = exit_after(11, np.where(row >= ROWS - rows, 1.0, -1.0), np.zeros(ROWS))
    costs = costs_of(probe=0.0, cut=0.0)
    costs = replace(costs, probe={**costs.probe, 11: 0.0})
    chosen = choose_exits([early, late], costs, np.full(ROWS, 20.0), 0.0)
    assert [exit.layer for exit in chosen] == layers


def test_many_rows_are_judged_by_the_first_of_them(monkeypatch):
    candidates, costs, tokens = candidates_of(2), costs_of(), tokens_of(2)
    monkeypatch.setattr(choose, "CHOICE_ROWS", ROWS // 2)
    fewer = [
        exit_after(e.layer, e.fitted.score[: ROWS // 2].numpy(), e.fitted.loss[: ROWS // 2])
        for e in candidates
    ]
    chosen = [exit.layer for exit in choose_exits(candidates, costs, tokens, 0.03)]
    assert chosen == [e.layer for e in choose_exits(fewer, costs, tokens[: ROWS // 2], 0.03)]


@pytest.mark.parametrize("seed", range(4))
def test_an_exit_point_whose_probe_costs_more_than_it_saves_is_dropped(seed):
    candidates, tokens = candidates_of(seed), tokens_of(seed)
    chosen = choose_exits(candidates, costs_of(), tokens, 0.03)
    dear = chosen[0].layer
    costs = costs_of(**{f"after_{dear}": 1.0})
    again = choose_exits(candidates, costs, tokens, 0.03)
    assert again
    assert dear not in [exit.layer for exit in again]


@pytest.mark.parametrize("costs", [costs_of(probe=1.0), costs_of(cut=1.0)], ids=["probe", "cut"])
def test_nothing_is_chosen_where_nothing_pays(costs):
    assert choose_exits(candidates_of(0), costs, tokens_of(0), 0.03) == []


def test_the_choice_does_not_look_at_the_held_out_half():
    candidates, costs, tokens = candidates_of(3), costs_of(), tokens_of(3)
    blind = [replace(exit, held_out=None) for exit in candidates]
    chosen = [exit.layer for exit in choose_exits(candidates, costs, tokens, 0.03)]
    assert [exit.layer for exit in choose_exits(blind, costs, tokens, 0.03)] == chosen


@pytest.mark.parametrize(
    ("count", "layers"), [(0, []), (1, [6]), (2, [4, 8]), (3, [4, 6, 8]), (5, list(LAYERS))]
)
def test_evenly_spread_leaves_like_gaps(count, layers):
    found = [exit.layer for exit in evenly_spread(candidates_of(0), count)]
    assert set(found) <= set(LAYERS)
    if count < 5:
        assert found == layers
