"""A decode step on a device asks at one exit point, where that has paid, or at none."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import chain, combinations

import numpy as np
import pytest
import torch

from benchmarks.common.budgets import (
    ALWAYS,
    EXIT_POINTS,
    NEVER,
    Layers,
    loop_of,
    step_of,
)
from tests.calibrations import calibration_of, recording_of
from tests.scored import scored
from vllm_adainfer.exits.accounting.clock import Clock
from vllm_adainfer.exits.loop.exit_loop import ExitLoop
from vllm_adainfer.exits.loop.schedule import LOOK, DecodeSchedule, DecodeTimes
from vllm_adainfer.offline.calibration.certify.path import threshold_path
from vllm_adainfer.offline.calibration.fit import cost
from vllm_adainfer.offline.calibration.fit_policy import make_policy

LEFT = (24, 16, 8)
LARGE = DecodeTimes(layer=220e-6, rows=240, question=60e-6, between=1.2e-3)  # 8B on an H100
SMALL = replace(LARGE, layer=45e-6)  # 1B
ROWS = 64


def asked(times: DecodeTimes, settles: tuple[int, ...], steps: int) -> list[int | None]:
    """Where steps ask, if so many rows are settled at each exit point."""
    schedule, places = DecodeSchedule(LEFT, times), list[int | None]()
    for _ in range(steps):
        place = schedule.next()
        if place is not None:
            schedule.asked(place, ROWS, settles[place])
        places.append(place)
    return places


def test_steps_ask_where_questions_save_most_and_look_elsewhere_now_and_then():
    places = asked(LARGE, (0, ROWS, ROWS), 20 * LOOK)
    assert {*places[:3]} == {0, 1, 2}, "each is tried once"
    counts = Counter(places)
    assert counts[1] > 0.98 * len(places)
    assert counts[0] < 3 + 20


def test_nobody_is_asked_where_the_lost_run_ahead_costs_more_than_any_exit_saves():
    """As predicted for 1B: the host's work on the next step is no longer hidden."""
    counts = Counter(asked(SMALL, (ROWS, ROWS, ROWS), 20 * LOOK))
    assert counts[None] > 0.98 * 20 * LOOK


def test_the_exit_point_changes_with_the_traffic():
    schedule = DecodeSchedule(LEFT, LARGE)
    places = []
    for step in range(12 * LOOK):
        place = schedule.next()
        if place is not None:
            all_leave = place == (0 if step < 6 * LOOK else 2)
            schedule.asked(place, ROWS, ROWS if all_leave else 0)
        places.append(place)
    assert Counter(places[: 6 * LOOK]).most_common(1)[0][0] == 0
    assert Counter(places[10 * LOOK :]).most_common(1)[0][0] == 2


@pytest.mark.parametrize(
    ("left", "rows", "settled", "saved"),
    [
        (16, 64, 64, 16 * 220 - 1200 - 60),  # all leave: nothing hides the host
        (16, 64, 0, -60),  # what is left hides it
        (2, 64, 0, -60),  # no worse than without the question
        (16, 64, 32, -60),  # reading the weights takes as long for half of the rows
        (16, 480, 240, 16 * 220 - 60),
    ],
)
def test_a_question_saves_layers_and_exposes_the_host(left, rows, settled, saved):
    assert LARGE.saved(left, rows, settled) == pytest.approx(saved * 1e-6)


def loop(threshold: float, anywhere: bool) -> tuple[ExitLoop, list[int]]:
    """The loop of the budgets, whose questions wait, and the rows that each wait was about."""
    waits: list[int] = []

    def read(values: torch.Tensor) -> np.ndarray:
        waits.append(len(values))
        return values.numpy()

    made = loop_of(threshold, ROWS, read=read, decode_times=LARGE)
    made.policies.policies[0].any_exit_point = anywhere
    return made, waits


@pytest.mark.parametrize(
    ("anywhere", "expected"), [(True, [1, 1, 1, 0, 0]), (False, 5 * [len(EXIT_POINTS)])]
)
def test_a_decode_step_waits_once_if_the_bound_holds_wherever_it_asks(anywhere, expected):
    """And no more once nobody was settled at any exit point."""
    made, waits = loop(NEVER, anywhere)
    found = []
    for _ in expected:
        before = len(waits)
        made.run(Layers(), torch.zeros(ROWS, dtype=torch.int64), step_of(ROWS))
        found.append(len(waits) - before)
    assert found == expected


def test_steps_with_prompts_ask_at_every_exit_point():
    made, waits = loop(NEVER, True)
    step = step_of(ROWS)
    lens = step.layout.query_lens.copy()
    lens[0] = 2
    layout = type(step.layout)(lens, step.layout.last_positions)
    ids = torch.zeros(ROWS + 1, dtype=torch.int64)
    made.run(Layers(), ids, replace(step, layout=layout))
    assert len(waits) == len(EXIT_POINTS)


def test_all_leave_where_the_step_asks():
    made, _ = loop(ALWAYS, True)
    for _ in range(len(EXIT_POINTS)):
        made.run(Layers(), torch.zeros(ROWS, dtype=torch.int64), step_of(ROWS))
    assert +made.stats.exit_histogram == dict.fromkeys(EXIT_POINTS, ROWS), "each is tried once"
    assert made.stats.layers_run == ROWS * sum(EXIT_POINTS)


def test_the_certified_loss_bounds_that_of_any_choice_of_exit_points():
    generator, layers, depth, rows = np.random.default_rng(0), (2, 4, 6), 8, 200
    exits = [
        scored(torch.tensor(generator.normal(size=rows)).float(), generator.random(rows) < 0.3)
        for _ in layers
    ]
    grid = [np.inf, 1.0, 0.0, -1.0]
    worst = [*threshold_path(layers, exits, depth, grid, any_exit_point=True)]
    losses = [point.losses for point in worst]
    assert (np.diff(losses, axis=0) >= 0).all(), "they never fall along the path"
    some = chain.from_iterable(combinations(range(3), n) for n in (1, 2, 3))
    for places in some:
        own = [layers[place] for place in places], [exits[place] for place in places]
        for served, point in zip(threshold_path(*own, depth, grid), worst, strict=True):
            assert (served.losses <= point.losses).all()


@pytest.mark.parametrize(("device", "anywhere"), [("cpu", False), ("cuda", True)])
def test_texts_that_a_gpu_serves_are_certified_wherever_it_asks(device, anywhere, monkeypatch):
    monkeypatch.setattr(cost, "clock_of", lambda model: Clock(torch.device("cpu")))
    recording = recording_of(labels=False)
    recording = replace(recording, model=replace(recording.model, device=device))
    calibration = calibration_of(recording, "lens", (), max_tokens=8)
    assert calibration.any_exit_point == anywhere
    policy = make_policy(calibration)
    [point] = [one for epsilon, one in policy.points.items() if epsilon == 0.1]
    first = next(
        threshold_path(
            [one.layer for one in policy.exits],
            [one.held_out for one in policy.exits],
            policy.costs.depth,
            [point.threshold],
        )
    )
    assert (point.losses >= first.losses).all()
    assert anywhere or (point.losses == first.losses).all()
