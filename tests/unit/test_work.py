"""Rows x layers are run, skipped, or wait; whatever comes next, no counter falls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import EXIT_POINTS, LAYERS
from vllm_adainfer.exits.counters import ExitStats
from vllm_adainfer.exits.work import Work
from vllm_adainfer.settings.engine import NO_POLICY

DEPTH, EXIT_LAYERS, NAMES = LAYERS, EXIT_POINTS, ("a", "b", NO_POLICY)
COUNTERS = ("layers_run", "layers_skipped", "layers_deferred", "layers_possible")


def counted(stats: ExitStats) -> dict[tuple[str, str], int]:
    return {
        (name, counter): getattr(own, counter)
        for name, own in stats.by_policy.items()
        for counter in COUNTERS
    }


def work() -> Work:
    return Work(ExitStats(), NAMES, EXIT_LAYERS, DEPTH)


def step(engine: Work, *requests: tuple[str, str, int]) -> Any:
    """Of each request: its name, the policy it comes under, its rows."""
    owners = np.array([NAMES.index(policy) for _, policy, _ in requests])
    lens = np.array([rows for _, _, rows in requests])
    return engine.step(owners, [name for name, _, _ in requests], lens)


FIRST = np.array([0])


def waiting_of(work: Work) -> dict[str, int]:
    """Rows x layers that wait, by policy."""
    found = dict.fromkeys(work.names, 0)
    for below in work._waiting.values():
        for exit_index, rows in below.items():
            for name, count in zip(work.names, rows.tolist(), strict=True):
                found[name] += count * (DEPTH - EXIT_LAYERS[exit_index])
    return found


def test_a_row_that_waited_is_counted_for_the_policy_it_came_under_whatever_its_request_has_now():
    engine = work()
    early = step(engine, ("x", "a", 3))
    early.ran(2)
    early.defer(0, FIRST)
    later = step(engine, ("x", "full_depth", 1))
    later.ran(2)
    later.join(0, FIRST)
    later.ran(4)
    run = {name: own.layers_run for name, own in engine.stats.by_policy.items()}
    assert run == {"a": 3 * DEPTH, "full_depth": DEPTH}
    possible = {name: own.layers_possible for name, own in engine.stats.by_policy.items()}
    assert possible == run
    assert engine.stats.passes_run == 2 + 2 + 4


def test_rows_that_wait_again_further_down_stay_those_of_their_policies():
    engine = work()
    early = step(engine, ("x", "a", 3))
    early.defer(0, FIRST)
    later = step(engine, ("x", "b", 1))
    later.join(0, FIRST)
    later.defer(1, FIRST)
    assert waiting_of(engine) == {"a": 3 * 3, "b": 1 * 3, "full_depth": 0}
    engine.forget("x")
    assert waiting_of(engine) == dict.fromkeys(NAMES, 0)
    assert engine.stats.by_policy["a"].layers_skipped == 3 * 3
    assert engine.stats.by_policy["b"].layers_skipped == 1 * 3


@pytest.mark.parametrize("request_id", ["x", "never seen"])
def test_a_request_without_rows_that_wait_is_forgotten_without_a_trace(request_id):
    engine = work()
    step(engine, ("x", "a", 3)).leave(0, FIRST)
    before = counted(engine.stats)
    engine.forget(request_id)
    assert counted(engine.stats) == before


@settings(deadline=None)
@given(st.data())
def test_no_counter_falls_and_run_skipped_and_waiting_are_all_that_came(data):
    """Requests come with rows; at each exit point some go for good, some wait, some are fetched."""
    engine, last = work(), {}
    waiting: dict[tuple[str, int], int] = {}  # by request and exit point, rows
    came = {name: 0 for name in NAMES}
    for _ in range(data.draw(st.integers(1, 12))):
        names = data.draw(st.lists(st.sampled_from("uvwxyz"), min_size=1, max_size=4, unique=True))
        for name in data.draw(st.lists(st.sampled_from("uvwxyz"), max_size=2)):
            engine.forget(name)
            waiting = {key: rows for key, rows in waiting.items() if key[0] != name}
        requests = [
            (name, data.draw(st.sampled_from(NAMES)), data.draw(st.integers(1, 5)))
            for name in names
        ]
        for _, policy, rows in requests:
            came[policy] += rows * DEPTH
        now, here, layer = step(engine, *requests), set(range(len(names))), 0
        for index, exit_layer in enumerate(EXIT_LAYERS):
            now.ran(exit_layer - layer)
            layer = exit_layer
            for place in sorted(here):
                fate = data.draw(st.sampled_from(["stays", "stays", "leaves", "waits"]))
                if fate == "leaves":
                    now.leave(index, np.array([place]))
                elif fate == "waits":
                    now.defer(index, np.array([place]))
                    key = names[place], index
                    waiting[key] = 1 + waiting.get(key, 0)
                elif (names[place], index) in waiting:
                    del waiting[names[place], index]
                    if data.draw(st.booleans()):
                        now.join(index, np.array([place]))
                    else:
                        taken, spared = now.take(index, np.array([place])), index % 2
                        now.ran_apart(taken, DEPTH - exit_layer - spared, 2, spared)
                if fate in ("leaves", "waits"):
                    here.remove(place)
        if here and data.draw(st.booleans()):
            now.keep_last_rows(np.array(sorted(here)), DEPTH - layer)
        now.ran(DEPTH - layer)
        found = counted(engine.stats)
        assert all(found[key] >= amount for key, amount in last.items())
        last = found
        for name in NAMES:
            own = engine.stats.by_policy[name]
            assert own.layers_possible == came[name]
            assert own.layers_run + own.layers_skipped + waiting_of(engine)[name] == came[name]
    assert {name for name, _ in waiting} == set(engine._waiting)


@pytest.mark.parametrize(
    "names",
    [
        ("a", "b", "c", NO_POLICY),
        ("b", NO_POLICY),
        ("a", NO_POLICY),
        ("c", NO_POLICY),
    ],
    ids=["one comes", "another goes", "its own goes", "another takes its place"],
)
def test_rows_that_wait_keep_their_policy_whichever_come_and_go(names):
    engine = work()
    requests = [("r1", "b", 3), ("r2", NO_POLICY, 2)]
    step(engine, *requests).defer(0, np.array([0, 1]))
    engine.use_names(names)
    owners = np.array([names.index(NO_POLICY)] * 2)
    later = engine.step(owners, ["r1", "r2"], np.array([1, 1]))
    later.ran(EXIT_LAYERS[0])
    later.join(0, FIRST)
    later.ran(DEPTH - EXIT_LAYERS[0])
    engine.forget("r2")
    below = DEPTH - EXIT_LAYERS[0]
    found = counted(engine.stats)
    assert found["b", "layers_run"] == 3 * below
    assert found[NO_POLICY, "layers_run"] == 2 * DEPTH
    assert found[NO_POLICY, "layers_skipped"] == 2 * below
    assert {name for name, own in engine.stats.by_policy.items() if own.layers_possible} == {
        "b",
        NO_POLICY,
    }
    engine.use_names(("a", NO_POLICY))  # no row of another waits any more
    assert engine.names == ("a", NO_POLICY)
