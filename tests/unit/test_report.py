from __future__ import annotations

import json
import pickle
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.readings import Compared, compare
from vllm_adainfer.engine.scheduler.observer import Counters
from vllm_adainfer.exits.accounting.counters import ExitStats
from vllm_adainfer.exits.accounting.layers import LayerAccounting
from vllm_adainfer.exits.accounting.report import StepNote, snapshot_of
from vllm_adainfer.policy.answers import Answers
from vllm_adainfer.settings.engine import NO_POLICY
from vllm_adainfer.watch.watch import Watch

EPSILONS = (0.02, 0.05)
POLICIES = ("a", "b", "full_depth")
DEPTH, EXIT_LAYER = 6, 2


class Traffic:
    """One request a step, tallied a second time in `totals`: its rows wait, rejoin, are dropped."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        self.monitors = {name: Watch(EPSILONS, alpha=0.1) for name in ("a", "b")}
        self.stats = ExitStats(shadow=self.monitors)
        self.accounting = LayerAccounting(self.stats, POLICIES)
        self.totals: Counter[Any] = Counter()
        self.waiting: Counter[str] = Counter()  # tokens of the one request, by policy

    def update(self) -> None:
        rows, tokens = self.generator.integers(1, 9, 2).tolist()
        name = str(self.generator.choice(POLICIES))
        accounting, below = self.accounting, DEPTH - EXIT_LAYER
        tokens_here = self.tokens({name: rows})
        accounting.submitted(tokens_here, DEPTH)
        accounting.ran(tokens_here, EXIT_LAYER)
        self.count("layers_run", {name: rows * EXIT_LAYER})
        left = {name: rows * below}
        match self.generator.integers(4):
            case 0:
                accounting.skipped(tokens_here, below)
                self.count("layers_skipped", left)
            case 1:
                accounting.deferred(tokens_here, below)
                self.count("layers_deferred", left)
                self.waiting[name] += rows
            case 2:
                accounting.ran(self.tokens({name: rows}), below)
                accounting.ran(self.tokens(self.waiting), below, batches=0)
                self.count("layers_run", left)
                self.drop_waiting("layers_run")
            case 3:
                accounting.ran(tokens_here, below)
                self.count("layers_run", left)
                accounting.skipped(self.tokens(self.waiting), below)
                self.drop_waiting("layers_skipped")
        self.stats.seconds += rows
        self.totals["seconds",] += rows
        self.stats.by_policy[name].exit_histogram[DEPTH] += tokens
        self.totals["tokens", name, str(DEPTH)] += tokens
        if name in self.monitors:
            self.compare(name, self.generator.integers(0, 2, tokens))

    def tokens(self, by_name: dict[str, int]) -> Any:
        places = [POLICIES.index(name) for name in by_name]
        return self.accounting.tokens(np.repeat(places, list(by_name.values())).astype(np.int64))

    def count(self, kind: str, amounts: dict[str, int]) -> None:
        for name, amount in amounts.items():
            self.totals[kind, name] += amount

    def drop_waiting(self, kind: str) -> None:
        self.count(kind, {n: rows * (DEPTH - EXIT_LAYER) for n, rows in self.waiting.items()})
        self.waiting.clear()

    def compare(self, name: str, levels: Any) -> None:
        disagreed = self.generator.random(len(levels)) < 0.3
        answers = Answers(torch.tensor([[0.0, 1.0]] * len(levels)), torch.tensor([0, 1]))
        logits = torch.tensor([[float(d), 0.5] for d in disagreed])
        monitor, stats = self.monitors[name], self.stats.by_policy[name]
        compare(monitor, Compared(), answers, logits, levels, stats=stats)
        for level, differs in zip(levels, disagreed, strict=True):
            self.totals["shadow_checked", name, f"{EPSILONS[level]:g}"] += 1
            self.totals["shadow_disagreed", name, f"{EPSILONS[level]:g}"] += int(differs)


def reported(counters: Counters, stats: ExitStats) -> dict[str, Any]:
    """What is told of a step after which a worker sends its counters."""
    counters.stepped(SimpleNamespace(note=StepNote(None, snapshot_of(stats))))
    return dict(counters.report())


@pytest.mark.parametrize("seed", range(5))
def test_reports_at_any_moments_add_up_to_everything_counted_and_take_nothing_back(seed):
    traffic, counters = Traffic(seed), Counters()
    received: Counter[Any] = Counter()
    for _ in range(50):
        for _ in range(traffic.generator.integers(0, 4)):
            traffic.update()
        for *key, added in reported(counters, traffic.stats)["added"]:
            assert added > 0
            received[tuple(key)] += added
        assert received == +traffic.totals
    assert {kind for kind, *_ in received} > {"layers_run", "layers_skipped", "layers_deferred"}


def test_what_was_sent_is_not_sent_again():
    traffic, counters = Traffic(0), Counters()
    traffic.update()
    assert reported(counters, traffic.stats)["added"]
    assert reported(counters, traffic.stats)["added"] == []
    before = Counter(traffic.totals)
    traffic.update()
    report = reported(counters, traffic.stats)
    assert {tuple(key): count for *key, count in report["added"]} == traffic.totals - before


def test_a_snapshot_stays_as_it_was_taken_while_the_worker_goes_on_counting():
    """Another thread may be sending it."""
    traffic = Traffic(2)
    for _ in range(5):
        traffic.update()
    taken = snapshot_of(traffic.stats)
    sent = pickle.dumps(taken)
    for _ in range(20):
        traffic.update()
    assert pickle.dumps(taken) == sent
    assert snapshot_of(traffic.stats) != taken


def test_before_anything_ran_a_report_is_empty():
    assert reported(Counters(), ExitStats()) == {
        "added": [],
        "serving": [NO_POLICY],
        "shadow": {},
        "changed_at_most": {},
        "all_changed_at_most": None,
        "weights_differ": False,
        "failed_parts": [],
        "not_tested": "",
    }


@pytest.mark.parametrize("seed", range(3))
def test_what_shadow_requests_show_is_told_in_all_each_time(seed):
    traffic, counters = Traffic(seed), Counters()
    for _ in range(20):
        traffic.update()
        shadow = reported(counters, traffic.stats)["shadow"]
        for name, monitor in traffic.monitors.items():
            for told, reading in zip(shadow[name], monitor.as_dict().values(), strict=True):
                key = name, f"{told['epsilon']:g}"
                counts = [
                    traffic.totals[(kind, *key)] for kind in ("shadow_checked", "shadow_disagreed")
                ]
                assert [told["checked"], told["disagreed"]] == counts
                ends = "low", "high", "tightened"
                assert [told[end] for end in ends] == [reading[end] for end in ends]
    assert any(one["tightened"] for told in shadow.values() for one in told)


def test_artifacts_read_again_take_nothing_from_what_was_counted():
    traffic, counters = Traffic(3), Counters()
    received: Counter[Any] = Counter()
    for _ in range(10):
        for _ in range(5):
            traffic.update()
        for name in traffic.monitors:
            traffic.monitors[name] = Watch(EPSILONS, alpha=0.1)
        for *key, added in reported(counters, traffic.stats)["added"]:
            assert added > 0
            received[tuple(key)] += added
    assert received == +traffic.totals


def test_a_report_is_made_of_plain_values_which_cross_a_process_border():
    traffic = Traffic(1)
    for _ in range(5):
        traffic.update()
    report = reported(Counters(), traffic.stats)
    report["added"] = [list(entry) for entry in report["added"]]
    assert json.loads(json.dumps(report)) == report
