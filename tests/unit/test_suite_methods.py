"""Other methods are judged on the same prompts by the same rules as ours."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.common.intervals import mean_interval
from benchmarks.suite import methods
from benchmarks.suite.report import METHODS, markdown, suite_report
from tests.calibrations import DEPTH, LABEL_IDS, LAYERS, PROMPTS, SPLIT, recording_of
from vllm_adainfer.offline.calibration.certify.bound import Bound
from vllm_adainfer.offline.calibration.certify.certify import certify
from vllm_adainfer.offline.calibration.certify.path import held_out_path, threshold_grid
from vllm_adainfer.offline.calibration.fit.calibration import Calibration
from vllm_adainfer.offline.calibration.fit.cost import Costs
from vllm_adainfer.offline.calibration.fit.exits import fit_exits
from vllm_adainfer.offline.calibration.fit.probes import Target, logit_lens
from vllm_adainfer.offline.calibration.fit_policy import make_policy
from vllm_adainfer.offline.calibration.options import PolicyOptions

TESTS = SPLIT.certify[:200]
RIGHT = [{int(LABEL_IDS[prompt % 2])} for prompt in range(PROMPTS)]
TARGET = Target("label-head", LABEL_IDS)
EPSILON = 0.05


@pytest.fixture(scope="module")
def recording() -> Any:
    return recording_of(labels=True)


@pytest.fixture(scope="module")
def test(recording) -> methods.TestPart:
    return methods.TestPart(recording, TESTS, RIGHT)


@pytest.fixture(scope="module")
def policy(recording) -> Any:
    return make_policy(Calibration(recording, TARGET, SPLIT, PolicyOptions(epsilon=EPSILON)))


def accuracy(tokens, prompts=TESTS) -> float:
    return float(np.mean([int(t) in RIGHT[p] for t, p in zip(tokens, prompts, strict=True)]))


def by_prompt(recording, exits, classifiers, threshold, costs) -> Any:
    """What leaving at the first exit point whose score passes comes to, a prompt at a time."""
    limit = torch.tensor([threshold])
    tokens, run, seconds = [], [], 0.0
    for prompt in TESTS:
        token, layers = int(recording.tokens[prompt]), DEPTH
        seconds += len(exits) * costs.cut * recording.computed[prompt]
        for exit, classifier in zip(exits, classifiers, strict=True):
            seconds += costs.probe[exit.layer]
            state = recording.states[exit.layer][prompt].unsqueeze(0)
            result = exit.probe.score(exit.probe.readout(state), classifier, limit)
            if bool(result.settled):
                token, layers = int(result.top1_id), exit.layer
                break
        tokens.append(token)
        run.append(layers)
        seconds += costs.layer * layers * recording.computed[prompt]
    assert len(set(run)) > 1
    full = costs.layer * DEPTH * recording.computed[TESTS].sum()
    return pytest.approx(
        {
            "accuracy": accuracy(tokens),
            "disagreement": np.mean(tokens != recording.tokens[TESTS]),
            "layers_run": np.mean(run),
            "layers_saved": 1 - np.mean(run) / DEPTH,
            "least_saved": mean_interval(1 - np.array(run) / DEPTH)[0],
            "most_saved": mean_interval(1 - np.array(run) / DEPTH)[1],
            "expected_speedup": full / seconds,
        }
    )


def flat(outcome: methods.Outcome) -> dict[str, float]:
    """Its fields, with both ends of the interval."""
    found = asdict(outcome)
    least, most = found.pop("layers_saved_95")
    return {**found, "least_saved": least, "most_saved": most}


def test_our_outcome_is_that_of_the_certified_threshold_a_prompt_at_a_time(recording, test, policy):
    threshold = policy.points[EPSILON].threshold
    classifiers = [exit.classifier for exit in policy.exits]
    expected = by_prompt(recording, policy.exits, classifiers, threshold, policy.costs)
    assert flat(methods.ours(policy, EPSILON, test)) == expected


@pytest.mark.parametrize(("layers_run", "layer"), [(1.0, 2), (3.2, 4), (DEPTH, 6)])
def test_static_truncation_stops_everyone_at_the_nearest_layer(recording, test, layers_run, layer):
    costs = Costs(DEPTH, 1e-3, 1e-5, {}, DEPTH)
    found = methods.static_truncation(layers_run, TARGET, test, costs)
    lens = logit_lens(recording, TARGET)
    tokens = lens.score(lens.readout(recording.states[layer][TESTS])).top1_id.numpy()
    assert (found.layers_run, found.accuracy) == (layer, accuracy(tokens))
    assert found.expected_speedup == pytest.approx(DEPTH / layer)


def test_adainfer_leaves_by_its_rules_and_pays_for_a_head_at_every_layer(monkeypatch):
    recording, options = recording_of(labels=False, noise=0.5), PolicyOptions(epsilon=EPSILON)
    test = methods.TestPart(recording, TESTS, RIGHT)
    costs = Costs(DEPTH, 1e-3, 1e-6, {}, DEPTH)
    monkeypatch.setattr(methods, "probe_seconds", lambda *_: 5e-3)
    found = methods.adainfer(SPLIT, options, costs, test, None)
    assert found.keys() == {"adainfer", "adainfer_labels", "adainfer_certified", "calm"}
    assert found["adainfer_labels"] is None

    paid = replace(costs, probe=dict.fromkeys(LAYERS, 5e-3))
    head = Target("logit-lens", None)
    by_svm = fit_exits(Calibration(recording, head, SPLIT, PolicyOptions()), LAYERS)
    svms = [exit.classifier for exit in by_svm]
    assert flat(found["adainfer"]) == by_prompt(recording, by_svm, svms, 0.0, paid)
    # The gap alone, which a policy of this kind scores by.
    by_gap = fit_exits(
        Calibration(recording, head, SPLIT, PolicyOptions(classifier="threshold")), LAYERS
    )
    for name, exits in (("adainfer_certified", by_svm), ("calm", by_gap)):
        point = certify(
            held_out_path(exits, DEPTH, threshold_grid(exits)), [EPSILON], Bound.promised(options)
        )[EPSILON]
        classifiers = [exit.classifier for exit in exits]
        expected = by_prompt(recording, exits, classifiers, point.threshold, paid)
        assert flat(found[name]) == expected


def test_other_methods_answer_among_the_labels_too(recording, test):
    costs = Costs(DEPTH, 1e-3, 1e-6, {}, DEPTH)
    options = PolicyOptions(epsilon=EPSILON)
    of_any = methods.adainfer(SPLIT, options, costs, test, None)
    of_labels = methods.adainfer(SPLIT, options, costs, test, LABEL_IDS)
    assert of_labels["adainfer"].accuracy == of_any["adainfer"].accuracy
    assert of_labels["adainfer_labels"].accuracy >= of_any["adainfer"].accuracy
    assert of_labels["calm"] is not None


def test_means_are_over_tasks_above_chance_that_have_an_outcome():
    def row(accuracy: float, at_chance: bool, saved: float | None, ours: float = 0.0) -> Any:
        outcome = {"accuracy": ours, "disagreement": 0.01, "layers_run": 5, "expected_speedup": 1.5}
        methods = dict.fromkeys(METHODS)
        if saved is not None:
            methods["ours"] = {**outcome, "layers_saved": saved}
        facts = {"title": f"task of {accuracy}", "shots": 0, "test": 10, "chance": 0.5}
        more = {"prompt_tokens_mean": 20.0, "exit_points": [2], "measured": None}
        full = {"full_depth": {"accuracy": accuracy}, "at_chance": at_chance}
        return {**facts, **more, **full, "methods": methods}

    rows = [row(0.9, False, 0.4, 0.88), row(0.8, False, 0.2, 0.8), row(0.7, False, None)]
    report = suite_report("models/tiny", PolicyOptions(), DEPTH, [*rows, row(0.5, True, 0.9, 0.4)])
    mean = report["averages"]["ours"]
    assert (report["averages"].keys(), mean["tasks"]) == ({"ours"}, 2)
    assert mean["layers_saved"] == pytest.approx(0.3)
    assert mean["accuracy_lost"] == pytest.approx(0.01)
    table = " ".join(markdown(report).split())
    assert "task of 0.5 (at chance)" in table
    assert "no exit point is worth its cost" in table
    assert "| mean of 2 | vllm-adainfer | | -1.0 | 1.0% | | 30.0% |" in table
