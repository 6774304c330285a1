"""Policies that promise probabilities: fitted, certified, and served as certified."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from adainfer_kernels import Head

from tests.unit.readings import views_as_it_decides, wrong_of
from tests.unit.test_make_policy import (
    DEPTH,
    HF_CONFIG,
    LABEL_IDS,
    LABELS,
    NORM,
    SPLIT,
    VOCAB,
    recording_of,
)
from vllm_adainfer.artifact.fields import Gate
from vllm_adainfer.artifact.files import load_artifact, save_artifact
from vllm_adainfer.offline.calibration.certify.bound import Bound
from vllm_adainfer.offline.calibration.certify.certify import certify
from vllm_adainfer.offline.calibration.certify.path import threshold_grid, threshold_path
from vllm_adainfer.offline.calibration.fit.calibration import Calibration
from vllm_adainfer.offline.calibration.fit.probes import Target, full_depth_labels
from vllm_adainfer.offline.calibration.fit_policy import (
    FittedPolicy,
    make_policy,
    with_mass_if_it_pays,
)
from vllm_adainfer.offline.calibration.options import PolicyOptions
from vllm_adainfer.offline.calibration.record.rows import Rows
from vllm_adainfer.offline.calibration.write.policy_artifact import policy_config, policy_tensors
from vllm_adainfer.policy.exit_policy import UndecidedRows
from vllm_adainfer.policy.policy import Policy
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.promise.kinds import asked_for

TOLERANCE, EPSILON, DELTA = 0.1, 0.05, 0.1
FIRST, BEST = Gate(label=LABELS[0].name, probability=0.3), Gate(probability=0.6)
NO_MASS, SOME_MASS, ALL_MASS = -30.0, 0.0, 12.0  # added to the labels' scores


def recorded(labels_lead: float = ALL_MASS) -> Rows:
    """A recording in which the labels' scores are that much higher, so that they have the mass."""
    recording = recording_of(labels=True, noise=0.4)
    bias = torch.zeros(VOCAB).index_fill(0, LABEL_IDS, labels_lead)
    head = Head(recording.model.logit_lens.head.weight / 4, bias)
    return replace(recording, model=replace(recording.model, logit_lens=Probe(head, norm=NORM)))


def made(recording: Rows, with_mass: bool = True, **options: object) -> FittedPolicy:
    reads = full_depth_labels(recording, LABEL_IDS)
    tolerance = None if options.get("gates") else TOLERANCE
    asked = PolicyOptions(
        **{"epsilon": EPSILON, "risk": "probability", "tolerance": tolerance, **options}
    )
    promise = asked_for(asked, LABELS, label_mass=with_mass)
    target = Target("label-head", LABEL_IDS, reads, promise=promise)
    return make_policy(Calibration(recording, target, SPLIT, asked, LABELS))


def logits_of(recording: Rows) -> torch.Tensor:
    lens = recording.model.logit_lens
    return lens.readout(recording.final) @ lens.head.weight.T + lens.head.bias


@pytest.mark.parametrize("classifier", ["svm", "logreg", "threshold", "crf"])
@pytest.mark.parametrize(
    ("with_mass", "gates"),
    [(True, ()), (False, ()), (False, (FIRST,)), (False, (BEST,)), (False, (FIRST, BEST))],
    ids=["mass", "among labels", "gate", "gate on the best", "two gates"],
)
def test_what_is_served_is_what_was_certified(tmp_path, classifier, with_mass, gates):
    recording = recorded()
    policy = made(recording, with_mass, classifier=classifier, gates=gates)
    config = policy_config(policy, "tiny", HF_CONFIG)
    assert (config.risk, config.label_mass) == ("probability", with_mass)
    assert (config.tolerance, config.gates) == (None if gates else 0.1, gates)
    assert config.bound == "exact"
    save_artifact(tmp_path / "policy", config, policy_tensors(policy), {}, "card")

    artifact = load_artifact(str(tmp_path / "policy"))
    serving = Policy(artifact, torch.device("cpu"))
    point = policy.points[EPSILON]
    rows = SPLIT.certify
    tags = torch.full((len(rows),), artifact.config.level_of(None))
    exits, wrong = np.full(len(rows), len(policy.exits)), np.zeros(len(rows))
    memory, logits = None, logits_of(recording)[rows]
    for index, layer in enumerate(serving.exit_points):
        undecided = UndecidedRows(recording.states[layer][rows], tags, memory)
        decision = serving.decide(index, undecided)
        assert views_as_it_decides(serving, index, undecided, decision)
        leaves = (exits == len(policy.exits)) & decision.settled.numpy()
        exits[leaves] = index
        wrong[leaves] = wrong_of(serving, decision.answers, logits).numpy()[leaves]
        memory = decision.memory
    assert np.array_equal(exits, point.exits)
    assert np.array_equal(wrong, point.losses)
    assert len(set(exits.tolist())) > 1
    assert 0 < wrong.mean() < EPSILON


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
    without = made(recorded(lead), with_mass=False)
    kept = with_mass_if_it_pays(without)
    assert kept.calibration.target.promise.covers_mass == with_mass
    assert EPSILON in kept.points


RESAMPLES, DRAWN = 300, 200


@pytest.mark.parametrize("gates", [(), (FIRST,), (BEST,)], ids=["tolerance", "gate", "best"])
def test_the_bound_holds_on_all_but_delta_of_the_calibrations(gates):
    """Certified on rows drawn again and again from a population whose risk is known."""
    recording = recorded()
    policy = made(recording, not gates, exit_points=(2, 4, 6), gates=gates)
    layers = [exit.layer for exit in policy.candidates]
    grid = threshold_grid(policy.candidates)
    everyone = [exit.held_out for exit in policy.candidates]
    true = {point.threshold: point.risk for point in threshold_path(layers, everyone, DEPTH, grid)}
    generator = np.random.default_rng(0)
    exceeded, saved = 0, 0.0
    for _ in range(RESAMPLES):
        drawn = generator.integers(0, len(SPLIT.certify), DRAWN)
        sample = [exit.of_rows(drawn) for exit in everyone]
        path = threshold_path(layers, sample, DEPTH, grid)
        point = certify(path, [EPSILON], Bound("exact", DELTA, 0.0))[EPSILON]
        exceeded += true[point.threshold] > EPSILON
        saved += point.layers_saved
    assert saved / RESAMPLES > 0.1, "a bound that lets nobody leave would prove nothing"
    assert exceeded / RESAMPLES <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / RESAMPLES)
    assert exceeded > 0, "the rows are enough to exceed it now and then"
