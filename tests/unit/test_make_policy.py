"""From a recording to an artifact that serves what was certified."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from adainfer_kernels import Head, Norm

from vllm_adainfer.artifact.fields import Label
from vllm_adainfer.artifact.files import load_artifact, save_artifact
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.recording.moments import Moments
from vllm_adainfer.offline.calibration import calibrate as calibrating
from vllm_adainfer.offline.calibration.certify.bound import Bound
from vllm_adainfer.offline.calibration.data.split import Split
from vllm_adainfer.offline.calibration.enough_rows import check_rows
from vllm_adainfer.offline.calibration.fit import cost
from vllm_adainfer.offline.calibration.fit.calibration import Calibration
from vllm_adainfer.offline.calibration.fit.probes import Target
from vllm_adainfer.offline.calibration.fit_policy import FittedPolicy, make_policy
from vllm_adainfer.offline.calibration.options import CalibrationRequest, PolicyOptions
from vllm_adainfer.offline.calibration.record.rows import FOLDS, Rows, ServedModel
from vllm_adainfer.offline.calibration.write.policy_artifact import (
    policy_config,
    policy_details,
    policy_tensors,
)
from vllm_adainfer.policy.exit_policy import UndecidedRows
from vllm_adainfer.policy.policy import Policy
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.promise.kinds import asked_for

HIDDEN, VOCAB, DEPTH, PROMPTS = 16, 40, 8, 900
LAYERS = (2, 4, 6)
LABELS = (Label(name="bad", token_id=7), Label(name="good", token_id=3))
LABEL_IDS = torch.tensor([7, 3])
NORM = Norm("rms", torch.ones(HIDDEN), eps=1e-5)
SPLIT = Split.halves(PROMPTS)
HF_CONFIG = SimpleNamespace(
    architectures=["LlamaForCausalLM"], hidden_size=HIDDEN, vocab_size=VOCAB
)


def recording_of(labels: bool, noise: float = 1.0) -> Rows:
    """States that come nearer to the final one from layer to layer."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    final, head = 2 * normal(PROMPTS, HIDDEN), normal(VOCAB, HIDDEN)
    states = {
        layer: final + noise * (DEPTH - layer) / DEPTH * normal(PROMPTS, HIDDEN) for layer in LAYERS
    }
    moments = {layer: [Moments.zeros(HIDDEN, HIDDEN) for _ in range(FOLDS)] for layer in LAYERS}
    for layer, folds in moments.items():
        for fold, sums in enumerate(folds):
            rows = SPLIT.fit[SPLIT.fit % FOLDS == fold]
            change = final[rows] - states[layer][rows]
            sums.add(states[layer][rows].double(), change.double(), torch.ones(len(rows)))
    model = Probe(
        Head(head[LABEL_IDS] if labels else head),
        token_ids=LABEL_IDS if labels else None,
        norm=NORM,
    )
    return Rows(
        ServedModel(
            DEPTH,
            DEPTH,
            Probe(Head(head), norm=NORM),
            "f" * 16,
            layer_seconds=1e-3,  # so slow that every probe is worth its time
            cut_seconds=1e-6,
        ),
        states=states,
        final=final,
        tokens=model.score(model.readout(final)).top1_id.numpy(),
        prompts=np.arange(PROMPTS),
        computed=np.full(PROMPTS, 20.0),
        moments=moments,
    )


def made(recording: Rows, target: Target, **options) -> FittedPolicy:
    return make_policy(
        Calibration(recording, target, SPLIT, PolicyOptions(epsilon=0.05, **options))
    )


@pytest.mark.parametrize("classifier", ["svm", "logreg", "threshold", "crf"])
@pytest.mark.parametrize(
    ("probe", "with_labels"),
    [("label-head", True), ("lens", True), ("lens", False), ("logit-lens", False)],
)
def test_what_is_served_is_what_was_certified(tmp_path, classifier, probe, with_labels):
    recording = recording_of(with_labels)
    labels = LABELS if with_labels else ()
    target = Target(probe, LABEL_IDS if with_labels else None)
    options = PolicyOptions(classifier=classifier, epsilon=0.05)
    policy = make_policy(Calibration(recording, target, SPLIT, options, labels))
    config = policy_config(policy, "tiny", HF_CONFIG)
    save_artifact(tmp_path / "policy", config, policy_tensors(policy), {}, "card")

    artifact = load_artifact(str(tmp_path / "policy"))
    serving = Policy(artifact, torch.device("cpu"), lambda _: recording.model.logit_lens)
    point = policy.points[0.05]
    tags = torch.full((len(SPLIT.certify),), artifact.config.level_of(None))
    exits = np.full(len(SPLIT.certify), len(policy.exits))
    memory = None
    for index, layer in enumerate(serving.exit_points):
        decision = serving.decide(
            index, UndecidedRows(recording.states[layer][SPLIT.certify], tags, memory)
        )
        exits[(exits == len(policy.exits)) & decision.settled.numpy()] = index
        memory = decision.memory
    assert np.array_equal(exits, point.exits)
    assert len(set(exits.tolist())) > 1


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
    target = Target(probe, LABEL_IDS if probe == "label-head" else None)
    options = {"classifier": classifier, "exit_points": LAYERS}
    first, again = (made(recording_of(probe == "label-head"), target, **options) for _ in range(2))
    assert [one.threshold for one in first.points.values()] == pytest.approx(thresholds, rel=0.01)
    assert [one.layers_saved for one in first.points.values()] == pytest.approx(saved, abs=0.01)
    tensors = policy_tensors(again)
    for name, tensor in policy_tensors(first).items():
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("risk", ["disagreement", "accuracy"])
def test_every_level_is_within_its_epsilon_and_a_looser_one_saves_no_less(risk):
    recording = recording_of(labels=True)
    right = [{int(token)} for token in recording.tokens]
    options = PolicyOptions(epsilon=0.05, risk=risk)
    target = Target("label-head", LABEL_IDS, promise=asked_for(options))
    policy = make_policy(
        Calibration(
            recording, target, SPLIT, options, LABELS, right if risk == "accuracy" else None
        )
    )
    config = policy_config(policy, "tiny", HF_CONFIG)
    assert config.risk == risk
    assert config.bound == ("exact" if risk == "disagreement" else "wsr")
    assert [level.epsilon for level in config.levels] == sorted(policy.points)
    assert all(level.bound <= level.epsilon for level in config.levels)
    saved = [level.layers_saved for level in config.levels]
    assert saved == sorted(saved)
    assert saved[-1] > 0


GROUPS = np.arange(PROMPTS) // 3  # three questions about each state


@pytest.mark.parametrize(("risk", "lowest"), [("disagreement", 0.0), ("accuracy", -1.0)])
def test_prompts_that_came_together_are_certified_by_group(risk, lowest):
    recording = recording_of(labels=True)
    right = [{int(token)} for token in recording.tokens] if risk == "accuracy" else None
    split = Split.of_groups(GROUPS)
    options = PolicyOptions(epsilon=0.05, risk=risk)
    target = Target("label-head", LABEL_IDS, promise=asked_for(options))
    policy = make_policy(Calibration(recording, target, split, options, LABELS, right))
    config, point = policy_config(policy, "tiny", HF_CONFIG), policy.points[0.05]
    by_group = Bound("wsr", 0.1, lowest, GROUPS[split.certify], longest=3)
    assert (config.bound, config.largest_group) == ("wsr", 3)
    assert config.levels[config.level_of(None)].bound == min(0.05, by_group.of(point.losses))
    assert point.layers_saved > 0


@pytest.mark.parametrize(("together", "bound"), [(1, "exact"), (2, "wsr")])
def test_a_question_has_the_bound_of_its_own_groups(together, bound):
    """Of three questions about a state, each comes once, or one of them twice."""
    questions = [f"question {row % 3 // together}" for row in range(PROMPTS)]
    options = PolicyOptions(epsilon=0.1, by_question=True)
    target = Target("label-head", LABEL_IDS)
    calibration = Calibration(
        recording_of(labels=True), target, Split.of_groups(GROUPS), options, LABELS,
        questions=questions, ends={name: ((0,),) for name in questions},
    )  # fmt: skip
    policy = make_policy(calibration)
    assert "question 0" in policy.questions
    config = policy_config(policy, "tiny", HF_CONFIG)
    assert (config.bound, config.largest_group) == (bound, 3), "watched over all questions together"
    names, groups = (np.array(one)[calibration.split.certify] for one in (questions, GROUPS))
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
    recording = recording_of(labels=True)
    generator = np.random.default_rng(0)
    right = [{int(token)} for token in generator.choice(LABEL_IDS.numpy(), PROMPTS)]
    saved = {}
    for risk in ("disagreement", "accuracy"):
        options = PolicyOptions(epsilon=0.1, risk=risk)
        target = Target("label-head", LABEL_IDS, promise=asked_for(options))
        policy = make_policy(
            Calibration(
                recording, target, SPLIT, options, LABELS, right if risk == "accuracy" else None
            )
        )
        saved[risk] = policy.points[0.1].layers_saved
    assert saved["accuracy"] > saved["disagreement"]


def test_layers_asked_for_are_kept_whatever_they_cost(monkeypatch):
    monkeypatch.setattr(cost, "probe_seconds", lambda *_: 1.0)
    recording = recording_of(labels=True)
    policy = made(recording, Target("label-head", LABEL_IDS), exit_points=LAYERS)
    assert [exit.layer for exit in policy.exits] == list(LAYERS)


def test_the_default_chooses_and_expects_to_be_faster_than_full_depth_and_an_even_spread():
    policy = made(recording_of(labels=True), Target("label-head", LABEL_IDS))
    assert 1 <= len(policy.exits) <= len(LAYERS)
    assert policy.expected["chosen"] < policy.expected["full_depth"]
    assert policy.expected["chosen"] <= policy.expected["uniform"]


def test_exit_points_that_are_not_worth_their_probes_leave_no_policy(monkeypatch):
    monkeypatch.setattr(cost, "probe_seconds", lambda *_: 1.0)
    policy = made(recording_of(labels=True), Target("label-head", LABEL_IDS))
    assert policy.exits == []
    assert policy.points == {}


def test_where_nothing_is_certified_nobody_is_sent_to_the_same_held_out_half_again(monkeypatch):
    """Several tries on it would exceed delta."""
    policy = made(recording_of(labels=True), Target("label-head", LABEL_IDS))
    monkeypatch.setattr(calibrating, "calibration_of", lambda *_: policy.calibration)
    monkeypatch.setattr(calibrating, "fit_policy", lambda *_: replace(policy, points={}))
    request = CalibrationRequest("m", Path("rows"), Path("out"))
    with pytest.raises(AdaInferError, match="raise --epsilon, or give new rows") as raised:
        calibrating.fit_and_certify(request, SimpleNamespace(student=None), policy.calibration.rows)
    assert "--probe" not in str(raised.value)


def test_states_that_say_nothing_leave_no_policy():
    recording = recording_of(labels=True)
    recording.tokens[:] = -5  # never the answer of any probe
    policy = made(recording, Target("label-head", LABEL_IDS))
    assert (policy.candidates, policy.exits, policy.points) == ([], [], {})


def test_the_details_say_who_leaves_where_and_what_each_probe_takes():
    recording, target = recording_of(labels=True), Target("label-head", LABEL_IDS)
    options = PolicyOptions(epsilon=0.05)
    policy = make_policy(Calibration(recording, target, SPLIT, options, LABELS))
    details = policy_details(policy)
    point = policy.points[0.05]
    for index, found in enumerate(details["exit_points"]):
        assert found["layer"] == policy.exits[index].layer
        assert found["leaving"] == pytest.approx((point.exits == index).mean())
        assert found["probe_bytes"] == 4 * len(LABELS) * (HIDDEN + 1)
        assert found["probe_cost"] > 0
    counts = np.unique(recording.tokens[SPLIT.certify], return_counts=True)[1]
    assert details["majority_share"] == counts.max() / counts.sum()
    assert details["rows"] == PROMPTS
    assert list(details["agreement"]) == [str(layer) for layer in LAYERS]
