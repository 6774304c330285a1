from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from prometheus_client import REGISTRY
from prometheus_client.values import MutexValue

from tests.tiny import tiny_config
from tests.unit import reported
from tests.unit.reported import reading
from vllm_adainfer.artifact.fields import Adapter
from vllm_adainfer.engine.self_test.parts import PARTS
from vllm_adainfer.frontend.metrics import EngineMetrics
from vllm_adainfer.frontend.series import register_series
from vllm_adainfer.promise.probabilities import MOVES
from vllm_adainfer.settings.engine import NO_POLICY

BUCKETS = (0, 3, 5, 6)
POLICIES = ("a", "b")
# By the report's kind, the series.
WORK = {
    "layers_run": "adainfer:layer_rows_executed_total",
    "layers_skipped": "adainfer:layer_rows_skipped_total",
    "layers_deferred": "adainfer:layer_rows_deferred_total",
}
TIME = {
    "seconds": "adainfer:forward_seconds_total",
    "probe_seconds": "adainfer:probe_seconds_total",
}
BOUND = {"policy": "a", "epsilon": "0.02"}
LABEL = {**BOUND, "promise": "recall", "label": "bad"}
# What is reported, beside its count, and the series of it.
COUNTED: list[tuple[tuple[str, ...], str, dict[str, str]]] = [
    *(((kind, "a"), name, {"policy": "a"}) for kind, name in WORK.items()),
    *(((kind,), name, {}) for kind, name in TIME.items()),
    (("shadow_checked", "a", "0.02"), "adainfer:shadow_checked_total", BOUND),
    (("shadow_disagreed", "a", "0.02"), "adainfer:shadow_disagreed_total", BOUND),
    (
        ("labels_checked", "a", "0.02", "recall", "bad"),
        "adainfer:shadow_label_checked_total",
        LABEL,
    ),
    (
        ("labels_changed", "a", "0.02", "recall", "bad"),
        "adainfer:shadow_label_changed_total",
        LABEL,
    ),
]


@pytest.fixture
def configs(tiny_model) -> Any:
    return {name: tiny_config(tiny_model) for name in POLICIES}


def value(name: str, engine: int, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"model_name": "tiny", "engine": str(engine), **labels})


@pytest.fixture
def engines(configs) -> list[EngineMetrics]:
    """Two engines of a server."""
    series = register_series(BUCKETS)
    return [EngineMetrics(series, "tiny", number, configs) for number in range(2)]


def report(*added: Any, serving: Any = (*POLICIES, "later"), **state: Any) -> dict[str, Any]:
    return reported.report(*added, serving=(*serving, NO_POLICY), **state)


def series_of(policy: str) -> set[tuple[str, str]]:
    """The series of a policy: their names and engines."""
    samples = [one for metric in REGISTRY.collect() for one in metric.samples]
    return {
        (one.name, one.labels["engine"]) for one in samples if one.labels.get("policy") == policy
    }


@pytest.mark.parametrize(("kind", "name", "labels"), COUNTED)
def test_what_an_engine_reports_is_added_to_its_own_series(engines, kind, name, labels):
    for engine, counts in ((0, (3, 4)), (1, (5, 2.5))):
        for count in counts:
            engines[engine].add(report((*kind, count)))
    engines[0].add(report(*((*kind[:1], "b", *kind[2:], 100) for _ in kind[1:2])))
    assert [value(name, engine, **labels) for engine in range(2)] == [7, 7.5]


@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_in_the_bucket_of_the_layers_they_ran(engines, seed):
    engine = engines[0]
    generator = np.random.default_rng(seed)
    tokens = {layer: int(generator.integers(1, 20)) for layer in BUCKETS}
    engine.add(report(*(("tokens", "a", str(layer), count) for layer, count in tokens.items())))
    for layer in BUCKETS:
        expected = sum(count for other, count in tokens.items() if other <= layer)
        assert value("adainfer:exit_layer_bucket", 0, policy="a", le=f"{layer}.0") == expected
    assert value("adainfer:exit_layer_count", 0, policy="a") == sum(tokens.values())
    weighted = sum(layer * count for layer, count in tokens.items())
    assert value("adainfer:exit_layer_sum", 0, policy="a") == weighted


@pytest.mark.parametrize(("kind", "detail"), [("tokens", "3"), ("shadow_moves", "0.01")])
def test_a_report_costs_as_many_updates_however_much_it_counts(engines, monkeypatch, kind, detail):
    """The API server's event loop waits for them."""
    engine = engines[0]
    updates, inc = [], MutexValue.inc
    monkeypatch.setattr(MutexValue, "inc", lambda *args: (updates.append(args), inc(*args)))
    engine.add(report((kind, "a", detail, 1)))
    for_one = len(updates)
    engine.add(report((kind, "a", detail, 1000)))
    assert len(updates) == 2 * for_one


def test_moves_of_probabilities_are_a_histogram_of_the_policies_that_promise_them(
    configs, tiny_model
):
    configs["a"] = tiny_config(tiny_model, risk="probability", tolerance=0.05)
    engine = EngineMetrics(register_series(BUCKETS), "tiny", 0, configs)
    name = "adainfer:shadow_largest_move"
    assert value(f"{name}_count", 0, policy="a") == 0
    assert value(f"{name}_count", 0, policy="b") is None
    engine.add(report(("shadow_moves", "a", "0.01", 3), ("shadow_moves", "a", "0.5", 1)))
    within = {bound: value(f"{name}_bucket", 0, policy="a", le=f"{bound}") for bound in MOVES}
    assert within == {bound: 3 * (bound >= 0.01) + (bound >= 0.5) for bound in MOVES}
    assert value(f"{name}_count", 0, policy="a") == 4


@pytest.mark.usefixtures("engines")
def test_before_the_first_request_rates_begin_at_0_and_all_may_exit():
    for name in WORK.values():
        assert [value(name, 0, policy=policy) for policy in ("a", "b", NO_POLICY)] == [0, 0, 0]
    assert [value(name, 0) for name in TIME.values()] == [0, 0]
    for epsilon in ("0.02", "0.05"):
        allowed = "adainfer:policy_exits_allowed"
        assert value(allowed, 0, policy="b", epsilon=epsilon) == 1
        assert value(allowed, 0, policy=NO_POLICY, epsilon=epsilon) is None


@pytest.mark.parametrize("tightened", [False, True])
@pytest.mark.parametrize(
    ("checked", "disagreed", "low", "high"), [(1, 0, 0, 0.9), (40, 1, 0.001, 0.1)]
)
def test_gauges_show_what_shadow_requests_show(engines, checked, disagreed, low, high, tightened):
    seen = reading(0.02, checked, disagreed, low=low, high=high, tightened=tightened)
    engines[0].add(report(a=[seen, reading(0.05, 0, 0)]))
    shown = {"": disagreed / checked, "_low": low, "_high": high}
    for suffix, expected in shown.items():
        assert value(f"adainfer:shadow_disagreement{suffix}", 0, **BOUND) == expected
    assert value("adainfer:policy_exits_allowed", 0, **BOUND) == (not tightened)
    unchecked = {"policy": "a", "epsilon": "0.05"}
    assert value("adainfer:shadow_disagreement", 0, **unchecked) is None
    assert value("adainfer:policy_exits_allowed", 0, **unchecked) == 1


def test_gauges_show_what_ledgers_claim_for_each_kind_and_for_all(engines):
    claims = {"changed_at_most": {"a": 12.5, "gone": 3.0}, "all_changed_at_most": 20.0}
    engines[0].add(report(**claims))
    assert value("adainfer:policy_changed_at_most", 0, policy="a") == 12.5
    assert value("adainfer:policy_changed_at_most", 0, policy="gone") is None
    assert value("adainfer:changed_at_most", 0) == 20.0


def test_what_has_stopped_exits_shows_in_gauges_of_each_engine(engines):
    """Weights that policies are not for, and parts that the self-test has switched off."""
    for differ, failed in ((False, None), (True, "segment_graphs"), (False, "segment_graphs")):
        engines[1].add(report(weights_differ=differ, failed_parts=(failed,) if failed else ()))
        assert [value("adainfer:weights_differ", number) for number in range(2)] == [0, differ]
        for part in PARTS:
            found = [value("adainfer:self_test_failed", number, part=part) for number in range(2)]
            assert found == [0, part == failed]


def test_parts_that_could_not_be_tested_are_shown_neither_as_right_nor_as_wrong(engines):
    engines[0].add(report(not_tested="there is no room", failed_parts=("kernels",)))
    shown = {part: value("adainfer:self_test_failed", 0, part=part) for part in PARTS}
    assert shown.pop("kernels") == 1
    assert all(map(math.isnan, shown.values()))


def test_the_series_of_a_second_server_in_the_process_replace_those_of_the_first(configs):
    first = EngineMetrics(register_series(BUCKETS), "tiny", 0, configs)
    first.add(report(("layers_run", "a", 7), a=[reading(0.02, 1, 1, tightened=True)]))
    second = EngineMetrics(register_series((4, 6)), "tiny", 0, configs)
    second.add(report(("layers_run", "a", 2), ("tokens", "a", "4", 1)))
    first.add(report(("layers_run", "a", 7)))
    assert value(WORK["layers_run"], 0, policy="a") == 2
    assert value("adainfer:shadow_disagreement", 0, policy="a", epsilon="0.02") is None
    assert value("adainfer:policy_exits_allowed", 0, policy="a", epsilon="0.02") == 1
    assert value("adainfer:exit_layer_bucket", 0, policy="a", le="4.0") == 1
    assert value("adainfer:exit_layer_bucket", 0, policy="a", le="2.0") is None


def test_series_of_others_stay(configs):
    others = [metric.name for metric in REGISTRY.collect() if "adainfer" not in metric.name]
    register_series(BUCKETS)
    register_series(BUCKETS)
    assert [metric.name for metric in REGISTRY.collect() if "adainfer" not in metric.name] == others


def test_each_policy_is_described_by_its_adapter_also_one_that_came_with_it(tiny_model):
    mood = Adapter(name="mood", fingerprint="1")
    configs = {"a": tiny_config(tiny_model), "b": tiny_config(tiny_model, adapter=mood)}
    engine = EngineMetrics(register_series(BUCKETS), "tiny", 0, configs)
    engine.add(report(("layers_run", "later", 5), ("layers_run", NO_POLICY, 5)))
    described = {"a": "", "b": "mood", "later": "later"}
    for policy, adapter in described.items():
        assert value("adainfer:policy_info", 0, policy=policy, adapter=adapter) == 1
    assert value("adainfer:policy_info", 0, policy=NO_POLICY, adapter=NO_POLICY) is None


def test_the_series_of_a_policy_that_has_gone_with_its_adapter_go_and_all_others_stay(engines):
    """Rows of its requests that had waited are still counted by the worker."""
    work = [(kind, "later", 5) for kind in WORK]
    seen = {"later": [reading(0.02, 4, 1)]}
    shown = [("tokens", "later", "3", 2), ("shadow_checked", "later", "0.02", 4)]
    for engine in engines:
        engine.add(report(*work, *shown, ("layers_run", "a", 3), **seen))
    before = {policy: series_of(policy) for policy in (*POLICIES, "later", NO_POLICY)}
    assert len({name for name, _ in before["later"]}) > len(WORK) + 2
    engines[0].add(report(("layers_skipped", "later", 5), serving=POLICIES))
    assert series_of("later") == {key for key in before.pop("later") if key[1] == "1"}
    assert {policy: series_of(policy) for policy in before} == before
    assert value(WORK["layers_run"], 0, policy="a") == 3
    engines[0].add(report(later=[reading(0.02, 0, 0)]))  # it has come again, without a request
    engines[0].add(report(serving=POLICIES))
    assert series_of("later") == {key for key in series_of("later") if key[1] == "1"}
    engines[0].add(report(("layers_run", "later", 7)))  # and once more
    assert value(WORK["layers_run"], 0, policy="later") == 7
    assert value("adainfer:policy_info", 0, policy="later", adapter="later") == 1


def test_kinds_and_choices_are_counted_by_engine_also_without_a_policy():
    """Both may be asked for where the engine otherwise runs stock vLLM."""
    series = register_series(None, choices=True, kinds=True)
    engines = [EngineMetrics(series, "tiny", number, {}) for number in range(2)]
    names = "adainfer:kind_requests_total", "adainfer:kind_tokens_total"
    ended = "adainfer:choices_finished_total", "adainfer:choice_tokens_appended_total"
    assert [value(name, 1, kind="none") for name in names] == [0, 0]
    assert [value(name, 1) for name in ended] == [0, 0]
    for requests, tokens in ((3, 40), (2, 10)):
        kinds = [("kind_requests", "kind-a", requests), ("kind_tokens", "kind-a", tokens)]
        choices = [("choices_finished", requests), ("choice_tokens_appended", tokens)]
        engines[1].add({"added": [*kinds, *choices], "reads": {"kind-a": "label among 2"}})
    assert [value(name, 1, kind="kind-a") for name in names] == [5, 50]
    assert [value(name, 0, kind="kind-a") for name in names] == [None, None]
    assert [[value(name, engine) for name in ended] for engine in range(2)] == [[0, 0], [5, 50]]


def test_drafts_are_counted_by_engine_and_grammar_also_without_a_policy():
    series = register_series(None, drafts=True)
    engines = [EngineMetrics(series, "tiny", number, {}) for number in range(2)]
    names = "adainfer:structure_tokens_drafted_total", "adainfer:structure_tokens_kept_total"
    for grammar, drafted, kept in (("a", 20, 18), ("b", 5, 0), ("a", 10, 9)):
        counts = [("structure_drafted", grammar, drafted), ("structure_kept", grammar, kept)]
        engines[1].add({"added": counts})
    assert [value(name, 1, grammar="a") for name in names] == [30, 27]
    assert [value(name, 1, grammar="b") for name in names] == [5, 0]
    assert [value(name, 0, grammar="a") for name in names] == [None, None]
