from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from prometheus_client import REGISTRY
from prometheus_client.values import MutexValue

from tests.tiny import tiny_config
from vllm_adainfer.artifact.fields import Adapter
from vllm_adainfer.engine.self_test.parts import PARTS
from vllm_adainfer.frontend.metrics import EngineMetrics
from vllm_adainfer.frontend.series import register_series
from vllm_adainfer.promise.probabilities import MOVES, PROBABILITY_FEATURES
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
SHADOW = {
    "shadow_checked": "adainfer:shadow_checked_total",
    "shadow_disagreed": "adainfer:shadow_disagreed_total",
}


@pytest.fixture
def configs(tiny_model) -> Any:
    return {name: tiny_config(tiny_model) for name in POLICIES}


def value(name: str, engine: int, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"model_name": "tiny", "engine": str(engine), **labels})


def report(
    *added: Any,
    serving: Any = (*POLICIES, "later"),
    weights_differ: bool = False,
    failed_parts: Any = (),
    **shadow: Any,
) -> dict[str, Any]:
    return {
        "added": list(added),
        "serving": [*serving, NO_POLICY],
        "shadow": shadow,
        "weights_differ": weights_differ,
        "failed_parts": failed_parts,
    }


def series_of(policy: str) -> set[tuple[str, str]]:
    """The series of a policy: their names and engines."""
    samples = [one for metric in REGISTRY.collect() for one in metric.samples]
    return {
        (one.name, one.labels["engine"]) for one in samples if one.labels.get("policy") == policy
    }


def reading(epsilon: float, checked: int, disagreed: int, **more: Any) -> dict[str, Any]:
    rate = disagreed / max(checked, 1)
    rest = {"rate": rate, "low": 0.0, "high": 1.0, "tightened": False, **more}
    return {"epsilon": epsilon, "checked": checked, "disagreed": disagreed, **rest}


@pytest.mark.parametrize("seed", range(3))
def test_reports_of_two_engines_add_up_by_engine_and_policy(configs, seed):
    series = register_series(BUCKETS)
    engines = [EngineMetrics(series, "tiny", number, configs) for number in range(2)]
    generator = np.random.default_rng(seed)
    totals: Counter[Any] = Counter()
    for _ in range(100):
        engine, amount = int(generator.integers(2)), int(generator.integers(1, 9))
        policy = str(generator.choice(["a", "b", NO_POLICY]))
        kind = str(generator.choice([*WORK, *TIME]))
        if kind in TIME:
            policy = ""
        engines[engine].add(report((kind, *filter(None, [policy]), amount)))
        totals[kind, engine, policy] += amount
    for (kind, engine, policy), total in totals.items():
        labels = {"policy": policy} if policy else {}
        assert value({**WORK, **TIME}[kind], engine, **labels) == total


def test_promises_about_labels_have_series_of_their_own(configs):
    engine = EngineMetrics(register_series(BUCKETS), "tiny", 0, configs)
    for count in (3, 4):
        engine.add(report(("labels_checked", "a", "0.02", "recall", "bad", count)))
    engine.add(report(("labels_changed", "a", "0.02", "recall", "bad", 2)))
    labels = {"policy": "a", "epsilon": "0.02", "promise": "recall", "label": "bad"}
    assert value("adainfer:shadow_label_checked_total", 0, **labels) == 7
    assert value("adainfer:shadow_label_changed_total", 0, **labels) == 2


@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_in_the_bucket_of_the_layers_they_ran(configs, seed):
    engine = EngineMetrics(register_series(BUCKETS), "tiny", 0, configs)
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
def test_a_report_costs_as_many_updates_however_much_it_counts(configs, monkeypatch, kind, detail):
    """The API server's event loop waits for them."""
    engine = EngineMetrics(register_series(BUCKETS), "tiny", 0, configs)
    updates, inc = [], MutexValue.inc
    monkeypatch.setattr(MutexValue, "inc", lambda *args: (updates.append(args), inc(*args)))
    engine.add(report((kind, "a", detail, 1)))
    for_one = len(updates)
    engine.add(report((kind, "a", detail, 1000)))
    assert len(updates) == 2 * for_one


def test_moves_of_probabilities_are_a_histogram_of_the_policies_that_promise_them(configs):
    promises = {"risk": "probability", "tolerance": 0.05, "features": PROBABILITY_FEATURES}
    configs["a"] = configs["a"].model_copy(update=promises)
    engine = EngineMetrics(register_series(BUCKETS), "tiny", 0, configs)
    name = "adainfer:shadow_largest_move"
    assert value(f"{name}_count", 0, policy="a") == 0
    assert value(f"{name}_count", 0, policy="b") is None
    engine.add(report(("shadow_moves", "a", "0.01", 3), ("shadow_moves", "a", "0.5", 1)))
    within = {bound: value(f"{name}_bucket", 0, policy="a", le=f"{bound}") for bound in MOVES}
    assert within == {bound: 3 * (bound >= 0.01) + (bound >= 0.5) for bound in MOVES}
    assert value(f"{name}_count", 0, policy="a") == 4


def test_before_the_first_request_rates_begin_at_0_and_all_may_exit(configs):
    EngineMetrics(register_series(BUCKETS), "tiny", 0, configs)
    for name in WORK.values():
        assert [value(name, 0, policy=policy) for policy in ("a", "b", NO_POLICY)] == [0, 0, 0]
    assert [value(name, 0) for name in TIME.values()] == [0, 0]
    for epsilon in ("0.02", "0.05"):
        allowed = "adainfer:policy_exits_allowed"
        assert value(allowed, 0, policy="b", epsilon=epsilon) == 1
        assert value(allowed, 0, policy=NO_POLICY, epsilon=epsilon) is None


@pytest.mark.parametrize("tightened", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("checked", "disagreed", "low", "high"), [(1, 0, 0, 0.9), (40, 1, 0.001, 0.1)]
)
def test_gauges_show_what_shadow_requests_show(
    configs, policy, checked, disagreed, low, high, tightened
):
    engine = EngineMetrics(register_series(BUCKETS), "tiny", 0, configs)
    seen = reading(0.02, checked, disagreed, low=low, high=high, tightened=tightened)
    engine.add(report(**{policy: [seen, reading(0.05, 0, 0)]}))
    shown = {"": disagreed / checked, "_low": low, "_high": high}
    labels = {"policy": policy, "epsilon": "0.02"}
    for suffix, expected in shown.items():
        assert value(f"adainfer:shadow_disagreement{suffix}", 0, **labels) == expected
    assert value("adainfer:policy_exits_allowed", 0, **labels) == (not tightened)
    unchecked = {"policy": policy, "epsilon": "0.05"}
    assert value("adainfer:shadow_disagreement", 0, **unchecked) is None
    assert value("adainfer:policy_exits_allowed", 0, **unchecked) == 1


def test_weights_that_policies_are_not_for_show_in_their_own_gauge_of_each_engine(configs):
    series = register_series(BUCKETS)
    engines = [EngineMetrics(series, "tiny", number, configs) for number in range(2)]
    name = "adainfer:weights_differ"
    assert [value(name, number) for number in range(2)] == [0, 0]
    for differ in (True, False):
        engines[1].add(report(weights_differ=differ))
        assert [value(name, number) for number in range(2)] == [0, differ]


def test_parts_that_the_self_test_has_switched_off_show_in_a_gauge_of_each_engine(configs):
    series = register_series(BUCKETS)
    engines = [EngineMetrics(series, "tiny", number, configs) for number in range(2)]
    engines[1].add(report(failed_parts=["segment_graphs"]))
    for part in PARTS:
        found = [value("adainfer:self_test_failed", number, part=part) for number in range(2)]
        assert found == [0, part == "segment_graphs"]


@pytest.mark.parametrize(("kind", "name"), SHADOW.items())
def test_shadow_answers_are_counted_for_each_bound(configs, kind, name):
    engine = EngineMetrics(register_series(BUCKETS), "tiny", 0, configs)
    for epsilon, added in ("0.02", 3), ("0.05", 1), ("0.02", 2):
        engine.add(report((kind, "a", epsilon, added)))
    assert value(name, 0, policy="a", epsilon="0.02") == 5
    assert value(name, 0, policy="a", epsilon="0.05") == 1


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


def test_the_series_of_a_policy_that_has_gone_with_its_adapter_go_and_all_others_stay(configs):
    """Rows of its requests that had waited are still counted by the worker."""
    series = register_series(BUCKETS)
    engines = [EngineMetrics(series, "tiny", number, configs) for number in range(2)]
    work = [(kind, "later", 5) for kind in WORK]
    seen = {"later": [reading(0.02, 4, 1)]}
    shown = [("tokens", "later", "3", 2), ("shadow_checked", "later", "0.02", 4)]
    for engine in engines:
        engine.add(report(*work, *shown, ("layers_run", "a", 3), **seen))
    before = {policy: series_of(policy) for policy in (*POLICIES, "later", NO_POLICY)}
    assert len({name for name, _ in before["later"]}) > len(WORK) + len(SHADOW)
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
