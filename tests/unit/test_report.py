from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_adainfer.decision.monitor import DisagreementMonitor
from vllm_adainfer.models.shadow import watch
from vllm_adainfer.runtime.report import Reporter
from vllm_adainfer.stats import ExitStats

EPSILONS = (0.02, 0.05)
POLICIES = ("a", "b", "full_depth")


class Traffic:
    """Random updates of counters, each tallied a second time in `totals`."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        self.monitors = {name: DisagreementMonitor(EPSILONS, alpha=0.1) for name in ("a", "b")}
        self.stats = ExitStats(shadow=self.monitors)
        self.totals: Counter[Any] = Counter()

    def update(self) -> None:
        run, possible, layer, tokens = (int(number) for number in self.generator.integers(1, 9, 4))
        name = str(self.generator.choice(POLICIES))
        own = self.stats.by_policy[name]
        own.layers_run += run
        own.layers_possible += run + possible
        own.exit_histogram[layer] += tokens
        self.stats.seconds += run
        self.stats.probe_seconds += possible / 8
        self.totals["layers_run", name, ""] += run
        self.totals["layers_skipped", name, ""] += possible
        self.totals["tokens", name, str(layer)] += tokens
        self.totals["seconds", "", ""] += run
        self.totals["probe_seconds", "", ""] += possible / 8
        if name in self.monitors:
            self.compare(name, self.generator.integers(0, 2, tokens))

    def compare(self, name: str, levels: Any) -> None:
        disagreed = self.generator.random(len(levels)) < 0.3
        answers = SimpleNamespace(name=name, tags=levels)
        watch(self.monitors[name], self.stats.by_policy[name], answers, disagreed)
        for level, differs in zip(levels, disagreed, strict=True):
            self.totals["shadow_checked", name, f"{EPSILONS[level]:g}"] += 1
            self.totals["shadow_disagreed", name, f"{EPSILONS[level]:g}"] += int(differs)


@pytest.mark.parametrize("seed", range(5))
def test_increments_of_all_reports_add_up_to_everything_counted(seed):
    traffic, reporter = Traffic(seed), Reporter()
    received: Counter[Any] = Counter()
    for _ in range(50):
        for _ in range(traffic.generator.integers(0, 4)):
            traffic.update()
        for *key, added in reporter.report(traffic.stats)["added"]:
            assert added > 0
            received[tuple(key)] += added
        assert received == +traffic.totals


def test_what_was_sent_is_not_sent_again():
    traffic, reporter = Traffic(0), Reporter()
    traffic.update()
    assert reporter.report(traffic.stats)["added"]
    assert reporter.report(traffic.stats)["added"] == []
    before = Counter(traffic.totals)
    traffic.update()
    added = {tuple(key): count for *key, count in reporter.report(traffic.stats)["added"]}
    assert added == traffic.totals - before


def test_before_anything_ran_a_report_is_empty():
    assert Reporter().report(ExitStats()) == {"added": [], "shadow": {}}


@pytest.mark.parametrize("seed", range(3))
def test_what_shadow_requests_show_is_told_in_all_each_time(seed):
    traffic, reporter = Traffic(seed), Reporter()
    for _ in range(20):
        traffic.update()
        shadow = reporter.report(traffic.stats)["shadow"]
        for name, monitor in traffic.monitors.items():
            assert shadow[name]["alpha"] == 0.1
            assert shadow[name]["levels"] == [
                [
                    epsilon,
                    traffic.totals["shadow_checked", name, f"{epsilon:g}"],
                    traffic.totals["shadow_disagreed", name, f"{epsilon:g}"],
                    bool(monitor.tightened[level]),
                ]
                for level, epsilon in enumerate(EPSILONS)
            ]
    assert any(level[-1] for told in shadow.values() for level in told["levels"])


def test_artifacts_read_again_take_nothing_from_what_was_counted():
    traffic, reporter = Traffic(3), Reporter()
    received: Counter[Any] = Counter()
    for _ in range(10):
        for _ in range(5):
            traffic.update()
        for name in traffic.monitors:
            traffic.monitors[name] = DisagreementMonitor(EPSILONS, alpha=0.1)
        for *key, added in reporter.report(traffic.stats)["added"]:
            assert added > 0
            received[tuple(key)] += added
    assert received == +traffic.totals


def test_a_report_is_made_of_plain_values_which_cross_a_process_border():
    traffic = Traffic(1)
    for _ in range(5):
        traffic.update()
    report = Reporter().report(traffic.stats)
    report["added"] = [list(entry) for entry in report["added"]]
    assert json.loads(json.dumps(report)) == report
