"""The requests that a certificate counted are decided by the loaded artifact as it counted them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.calibrations import (
    CHOICES,
    EPSILON,
    HF_CONFIG,
    LABELS,
    base_of,
    calibration_of,
    cheap_probes_that_learn_fast,
    logits_of,
    of_choices,
    of_pool,
    of_prompts,
    recorded,
    recording_of,
    recording_of_prompts,
    states_that_tell,
)
from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.artifact.outputs import Choices
from vllm_adainfer.offline.calibration.fit import branches
from vllm_adainfer.offline.calibration.fit_policy import FittedPolicy, fit_policy, make_policy
from vllm_adainfer.offline.calibration.write.policy_artifact import write_artifact
from vllm_adainfer.policy.exit_policy import UndecidedRows
from vllm_adainfer.policy.policy import Policy
from vllm_adainfer.promise.gates import Gate, Gates
from vllm_adainfer.promise.label_subsets import bits_of
from vllm_adainfer.promise.tolerance import Tolerance

TOLERANCE = {"promise": Tolerance(tolerance=0.1)}
WITH_MASS = {"promise": Tolerance(tolerance=0.1, label_mass=True)}
FIRST, BEST = Gate(label=LABELS[0].name, probability=0.3), Gate(probability=0.6)
OF_POOL = {"promise": Gates(gates=(Gate(label="label 9", probability=0.4), BEST))}
NEVER = {"never_early": ("label 17", "label 2")}
ALL_DECIDE = Choices(choices=CHOICES.choices)
ENDS = {f"question {place}": ((place,),) for place in range(2)}  # the third is not recognised


def of_labels(**options: Any) -> Any:
    return calibration_of(recording_of(labels=True), **options)


def of_lens(kind: Any, labels: Any) -> Callable[..., Any]:
    return lambda **options: calibration_of(recording_of(bool(labels)), kind, labels, **options)


def of_probabilities(**options: Any) -> Any:
    return calibration_of(recorded(), **options)


def of_questions(**options: Any) -> Any:
    return replace(of_pool(by_question=True, **options), ends=ENDS)


LAST_TOKEN: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "labels": (of_labels, {}),
    "labels by a lens": (of_lens("lens", LABELS), {}),
    "tokens by a lens": (of_lens("lens", ()), {}),
    "tokens by the head": (of_lens("logit-lens", ()), {}),
    "tolerance with mass": (of_probabilities, WITH_MASS),
    "tolerance": (of_probabilities, TOLERANCE),
    "gate": (of_probabilities, {"promise": Gates(gates=(FIRST,))}),
    "gates": (of_probabilities, {"promise": Gates(gates=(FIRST, BEST))}),
    "pool": (of_pool, {}),
    "pool, never early": (of_pool, NEVER),
    "tolerance of a pool": (of_pool, TOLERANCE),
    "mass of a pool, never early": (of_pool, {**WITH_MASS, **NEVER}),
    "gates of a pool": (of_pool, OF_POOL),
    "choices": (lambda **options: of_choices(ALL_DECIDE, **options), {}),
    "choices or none": (of_choices, {}),
    "choices, never early": (of_choices, {"never_early": ("a",)}),
    "questions": (of_questions, {}),
}
"""Calibrations of heads that read the state of the last token, and their options."""


def assert_decided_as_certified(policy: FittedPolicy, path: Path, most: float = 0.0) -> None:
    """`most` is the share of requests that batches of another size may round otherwise."""
    config = write_artifact(policy, "tiny", HF_CONFIG, None, path)
    parts = load_artifact(str(path)).parts("").values()
    fitted = [policy] if policy.last_token is None else [policy, policy.last_token]
    asked = np.array(policy.calibration.questions or [""] * len(policy.calibration.rows.tokens))
    for part, own in zip(parts, fitted, strict=True):
        lens = policy.calibration.rows.model.logit_lens
        serving = Policy(part, torch.device("cpu"), lambda _, lens=lens: lens)
        level = part.config.level_of(EPSILON)
        certified = {name: points[EPSILON] for name, points in own.questions.items()}
        for place, (name, point) in enumerate((certified or {"": own.points[EPSILON]}).items()):
            rows = policy.calibration.held_out
            if certified:
                rows, level = rows[asked[rows] == name], config.threshold_row(level, place)
            exits, wrong = decided(serving, own, rows, level)
            same = exits == point.exits
            assert 1 - same.mean() <= most
            assert np.array_equal(wrong[same], point.losses[same])
            assert len(set(exits.tolist())) > 1


def decided(serving: Policy, policy: FittedPolicy, rows: Any, level: int) -> tuple[Any, Any]:
    """Where each row leaves, and whether its answer is wrong, by definition."""
    calibration, target = policy.calibration, policy.calibration.target
    recording, full = calibration.rows, len(serving.exit_points)
    names = {*calibration.options.never_early, "undecided"}
    never = np.array([label.name in names for label in calibration.labels])
    bits, subsets = None, target.subsets_of(rows)
    if subsets is not None:
        ids = target.label_ids
        bits = torch.tensor([bits_of(ids[one].tolist(), ids.tolist()) for one in subsets])
    exits, wrong, memory = np.full(len(rows), full), np.zeros(len(rows)), None
    logits, head = logits_of(recording)[rows], recording.model.logit_lens.head
    for index, (layer, read) in enumerate(
        zip(serving.exit_points, serving.probe_inputs, strict=True)
    ):
        texts, lens, hidden = (), np.arange(0), torch.empty(0)
        may_leave = exits == full
        if read in (ProbeInput.TEXT, ProbeInput.OWN_STATES):
            [trained] = [one for one in calibration.trained if one.layer == layer]
            may_leave &= trained.asked(rows)
            texts = own = trained.inputs(rows)
            if read is ProbeInput.OWN_STATES:
                hidden, texts = serving.probes[index].project(torch.cat(own)), ()
                lens = np.array([len(states) for states in own])
        else:
            hidden = recording.read_by_probe(layer, rows, read is ProbeInput.PROMPT)
        asked = UndecidedRows(hidden, torch.full((len(rows),), level), memory, bits, texts, lens)
        decision, view = serving.decide(index, asked), serving.view(index, asked)
        leaves = may_leave & decision.settled.numpy()
        exits[leaves] = index
        answers = decision.answers
        outcomes = (
            serving.early(answers, lambda h: h @ head.weight.T),
            serving.full_depth(logits, answers),
        )
        wrong[leaves] = serving.promise.wrong(*outcomes).numpy()[leaves]
        memory = decision.memory
        assert not (decision.settled & (view.odds < view.threshold)).any()
        assert not (view.gap > view.top_prob).any()
        if serving.answer_ids is not None:
            best = answers.scores.argmax(dim=1)
            assert torch.equal(view.tokens, serving.answer_ids[best])
            assert not calibration.labels or not never[best[leaves]].any()
        if subsets is not None:
            assert not answers.scores.isfinite()[~subsets].any()
    return exits, wrong


@pytest.mark.parametrize("classifier", ["svm", "crf"])
@pytest.mark.parametrize(("calibration", "options"), LAST_TOKEN.values(), ids=LAST_TOKEN)
def test_heads_that_read_the_last_token(tmp_path, calibration, options, classifier):
    made = calibration(classifier=classifier, **options)
    assert_decided_as_certified(make_policy(made), tmp_path / "policy")


@pytest.mark.parametrize("classifier", ["logreg", "threshold"])
def test_other_classifiers(tmp_path, classifier):
    assert_decided_as_certified(make_policy(of_labels(classifier=classifier)), tmp_path / "policy")


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(branches, "EPOCHS", 2)
    cheap_probes_that_learn_fast(monkeypatch)


@pytest.mark.parametrize("trained", ["", "branch", "student"])
def test_heads_that_read_prompts_and_what_is_trained(tmp_path, quick, trained):
    """Each part is decided as certified: that of whole prompts, and that of the last token."""
    recording = recording_of_prompts({"": 0.6, "branch": 1.0, "student": 1.5}[trained])
    student = base_of(recording, unreadable=4) if trained == "student" else None
    kind = "branch" if trained == "branch" else "pooled-label-head"
    found = fit_policy(
        of_prompts(recording), kind, student, lambda layers: states_that_tell(recording, layers)
    )
    assert bool(found.branches) == (trained == "branch")
    assert (found.student is not None) == (trained == "student")
    assert found.last_token is not None
    assert_decided_as_certified(found, tmp_path / "policy", most=0.01 if trained else 0.0)
