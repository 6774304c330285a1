"""From a recording to a policy, its config and its details."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.calibrations import (
    ALL_MASS,
    EPSILON,
    HF_CONFIG,
    HIDDEN,
    LABEL_IDS,
    LABELS,
    LAYERS,
    PROMPTS,
    SPLIT,
    calibration_of,
    logits_of,
    recorded,
    recording_of,
)
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration import calibrate as calibrating
from vllm_adainfer.offline.calibration.certify.bound import Bound
from vllm_adainfer.offline.calibration.data.split import Split
from vllm_adainfer.offline.calibration.enough_rows import check_rows
from vllm_adainfer.offline.calibration.fit import cost
from vllm_adainfer.offline.calibration.fit.probes import full_depth_labels
from vllm_adainfer.offline.calibration.fit_policy import (
    FittedPolicy,
    make_policy,
    with_mass_if_it_pays,
)
from vllm_adainfer.offline.calibration.options import CalibrationRequest, PolicyOptions
from vllm_adainfer.offline.calibration.write.policy_artifact import (
    policy_config,
    policy_details,
    policy_tensors,
)
from vllm_adainfer.promise.accuracy import Accuracy
from vllm_adainfer.promise.changed import Changed
from vllm_adainfer.promise.promise import Promise
from vllm_adainfer.promise.tolerance import Tolerance


def made(**options: Any) -> FittedPolicy:
    """A policy for two labels."""
    return make_policy(calibration_of(recording_of(labels=True), **options))


@pytest.mark.parametrize(
    ("probe", "classifier", "thresholds", "saved"),
    [
        ("label-head", "svm", [3.781, 2.783, 1.425, 0.353], [0.39, 0.494, 0.639, 0.72]),
        ("label-head", "crf", [3.815, 2.789, 1.446, 0.370], [0.389, 0.497, 0.632, 0.715]),
        ("lens", "logreg", [2.862, 2.779, 2.254, 1.705], [0.17, 0.177, 0.261, 0.353]),
    ],
)
def test_the_same_rows_and_seed_give_the_policy_of_november_2026(
    probe, classifier, thresholds, saved
):
    """To the last bit on one machine, and to within rounding on another."""
    labels = LABELS if probe == "label-head" else ()
    first, again = (
        make_policy(
            calibration_of(
                recording_of(bool(labels)), probe, labels, classifier=classifier, exit_points=LAYERS
            )
        )
        for _ in range(2)
    )
    assert [one.threshold for one in first.points.values()] == pytest.approx(thresholds, rel=0.01)
    assert [one.layers_saved for one in first.points.values()] == pytest.approx(saved, abs=0.01)
    tensors = policy_tensors(again)
    for name, tensor in policy_tensors(first).items():
        assert torch.equal(tensor, tensors[name]), name


def right_if(promise: Promise, tokens: Any) -> dict[str, Any]:
    """The right tokens, if the risk is of accuracy."""
    return {"right": [{int(token)} for token in tokens]} if promise.reads_right else {}


@pytest.mark.parametrize("promise", [Changed(), Accuracy()])
def test_every_level_is_within_its_epsilon_and_a_looser_one_saves_no_less(promise):
    policy = made(promise=promise, given=right_if(promise, recording_of(labels=True).tokens))
    config = policy_config(policy, "tiny", HF_CONFIG)
    assert config.promise.kind == promise.kind
    assert config.bound == ("wsr" if promise.reads_right else "exact")
    assert [level.epsilon for level in config.levels] == sorted(policy.points)
    assert all(level.bound <= level.epsilon for level in config.levels)
    saved = [level.layers_saved for level in config.levels]
    assert saved == sorted(saved)
    assert saved[-1] > 0


GROUPS = np.arange(PROMPTS) // 3  # three questions about each state


@pytest.mark.parametrize(("promise", "lowest"), [(Changed(), 0.0), (Accuracy(), -1.0)])
def test_prompts_that_came_together_are_certified_by_group(promise, lowest):
    split = Split.of_groups(GROUPS)
    given = right_if(promise, recording_of(labels=True).tokens)
    policy = made(promise=promise, split=split, given=given)
    config, point = policy_config(policy, "tiny", HF_CONFIG), policy.points[0.05]
    by_group = Bound("wsr", 0.1, lowest, GROUPS[split.certify], longest=3)
    assert (config.bound, config.largest_group) == ("wsr", 3)
    assert config.levels[config.level_of(None)].bound == min(0.05, by_group.of(point.losses))
    assert point.layers_saved > 0


@pytest.mark.parametrize(("together", "bound"), [(1, "exact"), (2, "wsr")])
def test_a_question_has_the_bound_of_its_own_groups(together, bound):
    """Of three questions about a state, each comes once, or one of them twice."""
    questions = [f"question {row % 3 // together}" for row in range(PROMPTS)]
    given = {"questions": questions, "ends": {name: ((0,),) for name in questions}}
    split = Split.of_groups(GROUPS)
    policy = made(epsilon=0.1, by_question=True, split=split, given=given)
    assert "question 0" in policy.questions
    config = policy_config(policy, "tiny", HF_CONFIG)
    assert (config.bound, config.largest_group) == (bound, 3), "watched over all questions together"
    names, groups = (np.array(one)[split.certify] for one in (questions, GROUPS))
    for name, points in policy.questions.items():
        own = Bound(bound, 0.1, 0.0, groups[names == name], together)
        assert own.holds(points[0.1].losses, 0.1)


def test_the_exact_bound_is_refused_for_prompts_that_came_together():
    options = PolicyOptions(bound="exact")
    with pytest.raises(AdaInferError, match="those to requests that came together are not: use"):
        check_rows(Split.of_groups(GROUPS), options, "rows")


def test_too_few_groups_are_refused_however_many_rows_they_have():
    options = PolicyOptions(epsilon=0.05)
    groups = np.repeat(np.arange(40), 20)
    with pytest.raises(AdaInferError, match=r"at least 95 groups of requests .* but rows has 40"):
        check_rows(Split.of_groups(groups), options, "rows")
    check_rows(Split.of_groups(np.arange(len(groups))), options, "rows")
    check_rows(Split.of_groups(np.repeat(np.arange(95), 20)), options, "rows")


def test_accuracy_that_is_not_lost_lets_more_leave_than_answers_that_do_not_change():
    """Where full depth is right half of the time, a changed answer is as often for the better."""
    right = np.random.default_rng(0).choice(LABEL_IDS.numpy(), PROMPTS)
    changed, lost = (
        made(epsilon=0.1, promise=promise, given=right_if(promise, right)).points[0.1].layers_saved
        for promise in (Changed(), Accuracy())
    )
    assert lost > changed


def test_layers_asked_for_are_kept_whatever_they_cost(monkeypatch):
    monkeypatch.setattr(cost, "probe_seconds", lambda *_: 1.0)
    policy = made(exit_points=LAYERS)
    assert [exit.layer for exit in policy.exits] == list(LAYERS)


def test_the_default_chooses_and_expects_to_be_faster_than_full_depth_and_an_even_spread():
    policy = made()
    assert 1 <= len(policy.exits) <= len(LAYERS)
    assert policy.expected["chosen"] < policy.expected["full_depth"]
    assert policy.expected["chosen"] <= policy.expected["uniform"]


def test_exit_points_that_are_not_worth_their_probes_leave_no_policy(monkeypatch):
    monkeypatch.setattr(cost, "probe_seconds", lambda *_: 1.0)
    policy = made()
    assert policy.exits == []
    assert policy.points == {}


def test_where_nothing_is_certified_nobody_is_sent_to_the_same_held_out_half_again(monkeypatch):
    """Several tries on it would exceed delta."""
    policy = made()
    monkeypatch.setattr(calibrating, "calibration_of", lambda *_: policy.calibration)
    monkeypatch.setattr(calibrating, "fit_policy", lambda *_: replace(policy, points={}))
    request = CalibrationRequest("m", Path("rows"), Path("out"))
    prompts = SimpleNamespace(student=None, schema=None)
    with pytest.raises(AdaInferError, match="raise --epsilon, or give new rows") as raised:
        calibrating.fit_and_certify(request, prompts, policy.calibration.rows)
    assert "--probe" not in str(raised.value)


def test_states_that_say_nothing_leave_no_policy():
    recording = recording_of(labels=True)
    recording.tokens[:] = -5  # never the answer of any probe
    policy = make_policy(calibration_of(recording))
    assert (policy.candidates, policy.exits, policy.points) == ([], [], {})


def test_the_details_say_who_leaves_where_and_what_each_probe_takes():
    policy = made()
    details = policy_details(policy)
    point = policy.points[0.05]
    for index, found in enumerate(details["exit_points"]):
        assert found["layer"] == policy.exits[index].layer
        assert found["leaving"] == pytest.approx((point.exits == index).mean())
        assert found["probe_bytes"] == 4 * len(LABELS) * (HIDDEN + 1)
        assert found["probe_cost"] > 0
    counts = np.unique(policy.calibration.rows.tokens[SPLIT.certify], return_counts=True)[1]
    assert details["majority_share"] == counts.max() / counts.sum()
    assert details["rows"] == PROMPTS
    assert list(details["agreement"]) == [str(layer) for layer in LAYERS]


NO_MASS, SOME_MASS = -30.0, 0.0  # added to the labels' scores


def test_full_depth_is_read_as_vllm_returns_it():
    recording = recorded(SOME_MASS)
    reads, logits = full_depth_labels(recording, LABEL_IDS), logits_of(recording).double()
    probabilities = logits.softmax(dim=1)[:, LABEL_IDS]
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(reads.labels.mass.double(), probabilities.sum(1), **close)
    among = probabilities / probabilities.sum(1, keepdim=True)
    torch.testing.assert_close(reads.labels.among.double(), among, **close)
    is_label = torch.isin(logits.argmax(dim=1), LABEL_IDS)
    assert torch.equal(reads.is_label, is_label)
    assert 0 < is_label.float().mean() < 1


@pytest.mark.parametrize(("soft_cap", "scale"), [(3.0, 1.0), (None, 0.25), (2.0, 0.5)])
def test_a_cap_and_a_scale_of_the_logits_change_their_probabilities(soft_cap, scale):
    recording = recorded(SOME_MASS)
    recording = replace(recording, model=replace(recording.model, soft_cap=soft_cap, scale=scale))
    logits = logits_of(recording)
    capped = logits if soft_cap is None else torch.tanh(logits / soft_cap) * soft_cap
    expected = (capped * scale)[:, LABEL_IDS].softmax(dim=1)
    torch.testing.assert_close(full_depth_labels(recording, LABEL_IDS).labels.among, expected)


@pytest.mark.parametrize(
    ("lead", "with_mass"), [(ALL_MASS, True), (NO_MASS, False), (SOME_MASS, False)]
)
def test_the_mass_is_promised_where_it_does_not_cost_most_of_the_layers(lead, with_mass):
    """Where no label is the best token, every early answer in the vocabulary is wrong."""
    without = make_policy(calibration_of(recorded(lead), promise=Tolerance(tolerance=0.1)))
    kept = with_mass_if_it_pays(without)
    assert kept.calibration.target.promise.covers_mass == with_mass
    assert EPSILON in kept.points
