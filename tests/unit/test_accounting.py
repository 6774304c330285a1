"""Token-layers are run, skipped, or wait; whatever comes next, no counter falls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import FROM_ZERO, LAYERS
from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.exits.accounting.layers import LayerAccounting
from vllm_adainfer.exits.batch.batch import StackShape
from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.batch.layout import RowLayout
from vllm_adainfer.exits.kv.policies import ExactKV
from vllm_adainfer.exits.loop.exit_loop import ExitLoop
from vllm_adainfer.exits.loop.step import StepContext
from vllm_adainfer.policy.answers import Answers
from vllm_adainfer.policy.exit_policy import Decision, ExitPolicy, UndecidedRows
from vllm_adainfer.policy.policy_set import PolicySet
from vllm_adainfer.settings.engine import NO_POLICY

NAMES = ("a", "b", NO_POLICY)
COUNTERS = ("layers_run", "layers_skipped", "layers_deferred", "layers_possible")
STRETCHES = np.diff([0, *FROM_ZERO, LAYERS]).tolist()
FULL_DEPTH = -1


class ExitByRow(ExitPolicy):
    """Settles a request at the exit point that is its threshold row."""

    exit_points, num_threshold_rows = FROM_ZERO, len(FROM_ZERO)
    probe_inputs = (ProbeInput.LAST_TOKEN,) * len(FROM_ZERO)

    def decide(self, exit_index: int, rows: UndecidedRows) -> Decision:
        return Decision(rows.threshold_rows == exit_index, Answers(rows.hidden))


class EmptyBatch:
    """Computes nothing."""

    def __init__(self, layout: RowLayout) -> None:
        self.layout = layout

    def run(self, segment: int, states: HiddenStates) -> HiddenStates:
        assert states.num_rows == self.layout.num_rows
        return HiddenStates(states.hidden.reshape(-1, 1).float())

    def write_last_kv(self, states: HiddenStates) -> None:
        pass

    def compact(self, layout: RowLayout) -> EmptyBatch:
        return EmptyBatch(layout)

    def side_batch(self, layout: RowLayout, last_layer_only: bool = False) -> EmptyBatch:
        return EmptyBatch(layout)


class Engine:
    """An exit loop over a stack that computes nothing."""

    def __init__(self, own_kv_layers: int | None = None, **settings: int) -> None:
        shape = StackShape(STRETCHES, 1, own_kv_layers)
        self.positions: Counter[str] = Counter()
        settings = {"max_rows": 1 << 30, "min_rows_saved": 1, **settings}
        self.loop = ExitLoop(shape, policies(NAMES), ExactKV(), {}, **settings)

    def step(
        self, *requests: tuple[str, str, int, int], continues: bool | Sequence[bool] = True
    ) -> None:
        """Of each request: its name, the policy it comes under, its rows, its exit point."""
        names = [name for name, *_ in requests]
        lens = np.array([rows for _, _, rows, _ in requests])
        for name, rows in zip(names, lens.tolist(), strict=True):
            self.positions[name] += rows
        known = self.loop.policies.names
        rows = [
            FULL_DEPTH
            if policy == NO_POLICY or exit_index == FULL_DEPTH
            else known.index(policy) * len(FROM_ZERO) + exit_index
            for _, policy, _, exit_index in requests
        ]
        layout = RowLayout(lens, np.array([self.positions[name] for name in names]) - 1)
        step = StepContext(
            names,
            layout,
            yields_token=np.ones(len(names), dtype=np.bool_),
            threshold_rows=np.array(rows),
            continues=np.broadcast_to(continues, len(names)),
        )
        self.loop.run(EmptyBatch(layout), torch.zeros(layout.num_rows, dtype=torch.int64), step)

    def counted(self, counter: str) -> dict[str, int]:
        """A counter by policy, where it is not 0."""
        found = {name: getattr(own, counter) for name, own in self.loop.stats.by_policy.items()}
        return {name: count for name, count in found.items() if count}


def policies(names: Sequence[str]) -> PolicySet:
    return PolicySet({name: ExitByRow() for name in names if name != NO_POLICY})


def waiting_of(loop: Any) -> dict[str, int]:
    """Token-layers that wait, by policy."""
    names, depth = loop.accounting._names, loop._shape.depth
    found = dict.fromkeys(names, 0)
    for below in loop.kv._waiting.values():
        for exit_index, chunks in below.items():
            for policy in np.concatenate(chunks, axis=1)[1].tolist():
                found[names[policy]] += depth - loop._shape.depth_after(exit_index)
    return found


def test_a_row_that_waited_counts_for_the_policy_it_came_under_whatever_its_request_has_now():
    engine = Engine()
    engine.step(("x", "a", 3, 0))
    assert engine.counted("layers_deferred") == {"a": 3 * (LAYERS - FROM_ZERO[0])}
    engine.step(("x", NO_POLICY, 1, FULL_DEPTH))
    assert engine.counted("layers_run") == {"a": 3 * LAYERS, NO_POLICY: LAYERS}
    assert engine.counted("layers_possible") == engine.counted("layers_run")
    assert engine.loop.stats.passes_run == FROM_ZERO[0] + LAYERS


def test_rows_that_wait_again_further_down_stay_those_of_their_policies():
    engine, below = Engine(), LAYERS - FROM_ZERO[1]
    engine.step(("x", "a", 3, 0))
    engine.step(("x", "b", 1, 1))
    assert waiting_of(engine.loop) == {"a": 3 * below, "b": below, NO_POLICY: 0}
    engine.loop.forget("x")
    assert waiting_of(engine.loop) == dict.fromkeys(NAMES, 0)
    assert engine.counted("layers_skipped") == {"a": 3 * below, "b": below}


@pytest.mark.parametrize("request_id", ["x", "never seen"])
def test_a_request_without_rows_that_wait_is_forgotten_without_a_trace(request_id):
    engine = Engine()
    engine.step(("x", "a", 3, 0), continues=False)
    before = {counter: engine.counted(counter) for counter in COUNTERS}
    engine.loop.forget(request_id)
    assert {counter: engine.counted(counter) for counter in COUNTERS} == before


@pytest.mark.parametrize("own_kv_layers", [None, FROM_ZERO[1]], ids=["own", "shared"])
@pytest.mark.parametrize("seed", range(20))
def test_no_counter_falls_and_run_skipped_and_waiting_are_all_that_came(seed, own_kv_layers):
    """Requests draw policies and exit points; some are forgotten, some rows catch up apart."""
    generator = np.random.default_rng(seed)
    cost, max_rows = int(generator.choice([1, 64])), int(generator.integers(5, 40))
    engine = Engine(own_kv_layers, max_rows=max_rows, compaction_cost=cost)
    came, last = dict.fromkeys(NAMES, 0), {key: {} for key in COUNTERS}
    for _ in range(25):
        for name in generator.choice(list("uvwxyz"), generator.integers(0, 2), replace=False):
            engine.loop.forget(name)
        requests = [
            (
                str(name),
                str(generator.choice(NAMES)),
                int(generator.integers(1, 5)),
                int(generator.integers(FULL_DEPTH, len(FROM_ZERO))),
            )
            for name in sorted(generator.choice(list("uvwxyz"), 4, replace=False))
        ]
        for _, policy, rows, exit_index in requests:
            came[NO_POLICY if exit_index == FULL_DEPTH else policy] += rows * LAYERS
        engine.step(*requests, continues=generator.random(4) < 0.8)
        found = {counter: engine.counted(counter) for counter in COUNTERS}
        for counter, before in last.items():
            assert all(found[counter][name] >= amount for name, amount in before.items())
        last, waiting = found, waiting_of(engine.loop)
        for name in NAMES:
            run, skipped = (found[kind].get(name, 0) for kind in ("layers_run", "layers_skipped"))
            assert found["layers_possible"].get(name, 0) == came[name]
            assert run + skipped + waiting[name] == came[name]
    assert sum(found["layers_deferred"].values()) > 0


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
    engine, below = Engine(), LAYERS - FROM_ZERO[0]
    engine.step(("r1", "b", 3, 0), ("r2", "a", 2, 0))
    engine.loop.use_policies(policies(names), {})
    engine.step(("r1", NO_POLICY, 1, FULL_DEPTH), ("r2", names[0], 1, 0))
    engine.loop.forget("r2")
    expected_run = Counter({"b": 3 * LAYERS, "a": 2 * FROM_ZERO[0], NO_POLICY: LAYERS})
    expected_run[names[0]] += FROM_ZERO[0]
    assert engine.counted("layers_run") == +expected_run
    expected_skipped = Counter({"a": 2 * below})
    expected_skipped[names[0]] += below
    assert engine.counted("layers_skipped") == expected_skipped


def test_policies_keep_their_numbers_for_as_long_as_the_engine_runs():
    accounting = LayerAccounting(SimpleNamespace(), ("a", "b", NO_POLICY))
    accounting.use_names(("c", "a", NO_POLICY))
    assert accounting.numbers(np.array([0, 1, 2])).tolist() == [3, 0, 2]
