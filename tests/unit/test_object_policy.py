"""Policies for objects: what is certified, and that the loaded artifact decides as it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.calibrations import (
    EPSILON,
    HF_CONFIG,
    LAYERS,
    OBJECTS,
    PROMPTS,
    base_of,
    cheap_probes_that_learn_fast,
    of_objects,
    recording_of_objects,
)
from vllm_adainfer.artifact.fields import LabelBound, SharedTokens
from vllm_adainfer.artifact.files import load_artifact, load_details
from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.calibrate import check_spares_rows
from vllm_adainfer.offline.calibration.fit import students
from vllm_adainfer.offline.calibration.fit.probes import taught_by_full_depth
from vllm_adainfer.offline.calibration.fit_policy import FittedPolicy, fit_policy, make_policy
from vllm_adainfer.offline.calibration.write.policy_artifact import write_artifact
from vllm_adainfer.policy.exit_policy import UndecidedRows
from vllm_adainfer.policy.guesser import Guesser
from vllm_adainfer.policy.policy import Policy
from vllm_adainfer.promise.gates import Gate, Gates
from vllm_adainfer.promise.tolerance import Tolerance

LINK = OBJECTS.link
SCHEMA = '{"title": "as requests send it"}'
SEEN = 2  # the field, and the place of its value that is true
TRUE = 1


def decided(serving: Policy, policy: FittedPolicy, level: int) -> tuple[Any, Any]:
    """Where the held-out rows leave the loaded policy, and with which objects."""
    recording, rows = policy.calibration.rows, policy.calibration.held_out
    full = len(serving.exit_points)
    exits, codes, memory = np.full(len(rows), full), recording.tokens[rows].copy(), None
    for index, layer in enumerate(serving.exit_points):
        hidden, texts, may_leave = torch.empty(0), (), exits == full
        if serving.probe_inputs[index] is ProbeInput.TEXT:
            [student] = policy.calibration.trained
            may_leave &= student.asked(rows)
            texts = student.inputs(rows)
        else:
            hidden = recording.read_by_probe(layer, rows, policy.calibration.target.is_pooled)
        levels = torch.full((len(rows),), level)
        decision = serving.decide(index, UndecidedRows(hidden, levels, memory, texts=texts))
        assert decision.codes is not None
        leaves = may_leave & decision.settled.numpy()
        exits[leaves], codes[leaves] = index, decision.codes.numpy()[leaves]
        memory = decision.memory
    return exits, codes


def assert_decided_as_certified(policy: FittedPolicy, path: Path) -> list[tuple[Any, Any]]:
    write_artifact(policy, "tiny", HF_CONFIG, None, path, schema=SCHEMA)
    assert load_details(str(path))["schema"] == SCHEMA
    parts = load_artifact(str(path)).parts("").values()
    fitted = [policy] if policy.last_token is None else [policy, policy.last_token]
    found = []
    for part, own in zip(parts, fitted, strict=True):
        assert part.config.objects == OBJECTS
        serving = Policy(part, torch.device("cpu"))
        assert serving.decides_objects
        exits, codes = decided(serving, own, part.config.level_of(EPSILON))
        point = own.points[EPSILON]
        full = policy.calibration.rows.tokens[policy.calibration.held_out]
        assert np.array_equal(exits, point.exits)
        assert np.array_equal(codes, point.answers)
        assert np.array_equal(codes != full, point.losses == 1)
        assert 0 < (codes != full).mean() <= EPSILON
        assert len(set(exits.tolist())) > 1
        found.append((exits < len(own.exits), codes))
    return found


@pytest.mark.parametrize("classifier", ["svm", "crf", "threshold"])
def test_objects_are_decided_by_the_loaded_artifact_as_the_certificate_counted_them(
    tmp_path, classifier
):
    [(early, _)] = assert_decided_as_certified(
        make_policy(of_objects(classifier=classifier)), tmp_path / "policy"
    )
    assert early.mean() > 0.2


def test_heads_that_read_the_prompts_mean_beside_each_fields_row(tmp_path):
    policy = fit_policy(of_objects(kind="pooled-label-head"), "pooled-label-head")
    assert policy.last_token is not None
    assert_decided_as_certified(policy, tmp_path / "policy")


@pytest.mark.full
def test_a_student_reads_the_text_for_all_fields(tmp_path, monkeypatch):
    cheap_probes_that_learn_fast(monkeypatch)
    monkeypatch.setattr(students, "STUDENT_EPOCHS", 15)  # six answers, not two
    rows = recording_of_objects()
    base = base_of(rows, unreadable=4, answers=range(6))
    policy = fit_policy(of_objects(rows), "label-head", base)
    assert policy.student is not None
    [(early, _)] = assert_decided_as_certified(policy, tmp_path / "policy")
    assert (policy.points[EPSILON].exits == 0).mean() > 0.2
    assert not early[-4:].all()


def test_an_object_with_a_value_that_is_never_early_runs_to_the_end(tmp_path):
    policy = make_policy(of_objects(never_early=("part.seen=true",)))
    [(early, codes)] = assert_decided_as_certified(policy, tmp_path / "policy")
    assert early.any()
    assert not (LINK.place_in(SEEN, codes[early]) == TRUE).any()
    full = policy.calibration.rows.tokens[policy.calibration.held_out]
    assert (LINK.place_in(SEEN, full) == TRUE).mean() > 0.3


@pytest.mark.parametrize("kind", ["recall", "precision"])
def test_a_promise_about_a_value_is_kept_for_the_objects_that_have_it(tmp_path, kind):
    asked = LabelBound(kind=kind, label='mood="bad"', epsilon=0.04)
    policy = make_policy(of_objects(label_bounds=(asked,)))
    [(_, codes)] = assert_decided_as_certified(policy, tmp_path / "policy")
    full = policy.calibration.rows.tokens[policy.calibration.held_out]
    moods, of_full = (LINK.place_in(0, one) for one in (codes, full))
    about = (of_full if kind == "recall" else moods) == 0
    level = load_artifact(str(tmp_path / "policy")).config.levels[-1]
    [risk] = level.label_risks
    assert risk.rows == about.sum() > 50
    assert risk.risk == np.mean(moods[about] != of_full[about])
    assert risk.risk <= risk.bound <= 0.04
    loose = make_policy(of_objects())
    assert policy.points[EPSILON].layers_saved < loose.points[EPSILON].layers_saved


SEEN_GATE = Gates(gates=(Gate(label="part.seen=true", probability=0.8),))


@pytest.mark.parametrize("promise", [Tolerance(tolerance=0.2), SEEN_GATE])
def test_probabilities_of_values_are_served_as_they_were_certified(tmp_path, promise):
    """An early object is wrong if it differs, or one of its probabilities moved too far."""
    rows = recording_of_objects()
    rows = replace(rows, states={LAYERS[-1]: rows.states[LAYERS[-1]]})
    policy = make_policy(of_objects(rows, promise=promise))
    point, held_out = policy.points[EPSILON], policy.calibration.held_out
    write_artifact(policy, "tiny", HF_CONFIG, None, tmp_path / "policy", schema=SCHEMA)
    artifact = load_artifact(str(tmp_path / "policy"))
    serving = Policy(artifact, torch.device("cpu"))
    hidden = rows.read_by_probe(LAYERS[-1], held_out, pooled=False)
    levels = torch.full((len(held_out),), artifact.config.level_of(EPSILON))
    decision = serving.decide(0, UndecidedRows(hidden, levels, None))
    leaves = decision.settled.numpy()
    assert np.array_equal(leaves, point.exits == 0)
    assert 0.1 < leaves.mean() < 1

    weight, bias = (artifact.tensors[f"exit.{LAYERS[-1]}.head_{one}"] for one in ("weight", "bias"))
    heads = weight[:-1].split(LINK.sizes), bias[:-1].split(LINK.sizes)  # the last is of the mass
    parts = zip(hidden.unbind(1), *heads, strict=True)
    early = torch.cat([(row @ own.T + at).softmax(1) for row, own, at in parts], dim=1)
    full = rows.values[held_out]
    torch.testing.assert_close(decision.answers.scores.exp(), early, atol=1e-4, rtol=1e-4)
    codes = decision.codes.numpy()
    changed = codes != rows.tokens[held_out]
    moved = ((early - full).abs() > 0.2).any(dim=1)
    if promise is SEEN_GATE:
        moved = (early[:, -1] >= 0.8) != (full[:, -1] >= 0.8)
    wrong = changed | moved.numpy()
    assert changed.sum() < wrong.sum()
    assert np.array_equal(wrong, policy.exits[0].held_out.loss == 1)
    assert np.array_equal(wrong & leaves, point.losses == 1)
    assert 0 < point.losses.mean() <= EPSILON


def test_heads_of_a_field_are_as_they_would_be_alone():
    """So a field whose row says nothing spoils no other."""
    rows = recording_of_objects()
    lost = {layer: state.clone() for layer, state in rows.states.items()}
    for state in lost.values():
        state[:, SEEN] = torch.randn(PROMPTS, state.shape[2])
    heads, spoilt = (
        make_policy(of_objects(one)).candidates for one in (rows, replace(rows, states=lost))
    )
    own, other = heads[-1], spoilt[-1]
    columns = slice(0, LINK.sizes[0] + LINK.sizes[1])
    torch.testing.assert_close(own.probe.head.weight[columns], other.probe.head.weight[columns])
    assert other.fitted.agrees.mean() < own.fitted.agrees.mean() - 0.2


def test_heads_learn_how_probable_full_depth_finds_each_value_as_it_writes_it():
    """So after a wrong guess, too, where the row before the field tells of another object."""
    calibration = of_objects()
    rows, where = calibration.rows, calibration.held_out
    taught = taught_by_full_depth(rows, calibration.target, where, torch.empty(len(where), 3, 0))
    assert torch.equal(taught.labels, rows.values[where])
    assert taught.link == LINK
    codes = LINK.best(taught.labels).numpy()
    assert np.array_equal(codes, rows.tokens[where])
    assert 0.05 < (taught.labels > 0.95).float().mean() < 0.5


def test_codes_are_known_before_an_object_is_settled():
    """They are the draft of what the model goes on to write."""
    policy = make_policy(of_objects())
    rows = policy.calibration.held_out
    exit = policy.exits[0]
    states = policy.calibration.rows.states[exit.layer][rows]
    scores = exit.probe.label_scores(states)
    by_field = [one.argmax(1).tolist() for one in scores.split(LINK.sizes, dim=1)]
    assert [LINK.places(code) for code in exit.held_out.tokens] == [*zip(*by_field, strict=True)]


@pytest.mark.parametrize("computed", [30, 2])
def test_a_policy_whose_wrong_guesses_waste_more_rows_than_early_objects_spare_is_refused(computed):
    """Eight in ten objects differ from the commonest, which is guessed for all."""
    rows = replace(recording_of_objects(), computed=np.full(PROMPTS, float(computed)))
    guesser = Guesser.of_commonest(OBJECTS, SharedTokens())
    policy = make_policy(replace(of_objects(rows), guesser=guesser))
    prompts = [[5]] * PROMPTS
    if computed == 30:
        check_spares_rows(policy, prompts)
        return
    with pytest.raises(AdaInferError, match="drafts alone answer these requests faster"):
        check_spares_rows(policy, prompts)
