"""Probes are fitted as planted, from sums alone, and never see the prompts they are judged on."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from adainfer_kernels import Head, Norm
from torch import Tensor

from vllm_adainfer.exits.recording.moments import Moments
from vllm_adainfer.offline.calibration.data.split import Split, numbered, random_order
from vllm_adainfer.offline.calibration.fit import exits as fit
from vllm_adainfer.offline.calibration.fit import probes
from vllm_adainfer.offline.calibration.fit.calibration import Calibration
from vllm_adainfer.offline.calibration.fit.exits import FittedExit, fit_exits, judge
from vllm_adainfer.offline.calibration.fit.probes import Target
from vllm_adainfer.offline.calibration.options import PolicyOptions
from vllm_adainfer.offline.calibration.record.rows import FOLDS, Rows, ServedModel
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.promise.accuracy import Accuracy, is_right

HIDDEN, VOCAB, LAYER = 32, 50, 4
PROMPTS, ROWS_PER_PROMPT = 100, 10
NORM = Norm("rms", torch.ones(HIDDEN), eps=1e-5)
SPLIT = Split.halves(PROMPTS)
LABELS = torch.tensor([7, 3, 20])


def recording_of(rank: int, noise: float = 0.0) -> Rows:
    """A final state that is an affine map of the layer's state, of a given rank, plus noise."""
    generator = torch.Generator().manual_seed(rank)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    planted = normal(HIDDEN, rank) @ normal(rank, HIDDEN) / rank**0.5
    head = normal(VOCAB, HIDDEN)

    def final_of(state: Tensor) -> Tensor:
        return state + state @ planted + 1 + noise * normal(*state.shape)

    decisions = normal(PROMPTS, HIDDEN)
    folds = [Moments.zeros(HIDDEN, HIDDEN) for _ in range(FOLDS)]
    for prompt in SPLIT.fit:
        rows = normal(ROWS_PER_PROMPT, HIDDEN)
        folds[prompt % FOLDS].add(rows, final_of(rows) - rows, torch.ones(ROWS_PER_PROMPT))
    final = final_of(decisions)
    model = Probe(Head(head), norm=NORM)
    return Rows(
        ServedModel(2 * LAYER, 2 * LAYER, Probe(Head(head), norm=NORM), "", 1e-4, 1e-5),
        states={LAYER: decisions},
        final=final,
        tokens=model.score(model.readout(final)).top1_id.numpy(),
        prompts=np.arange(PROMPTS),
        computed=np.full(PROMPTS, float(ROWS_PER_PROMPT)),
        moments={LAYER: folds},
    )


def fitted_on(
    recording: Rows, kind: str, labels: Tensor | None = None, split: Split = SPLIT
) -> FittedExit:
    options = PolicyOptions(classifier="threshold")
    [fitted] = fit_exits(Calibration(recording, Target(kind, labels), split, options), [LAYER])
    return fitted


def test_the_halves_share_no_prompt_miss_none_and_are_in_random_order():
    split = Split.halves(101)
    order = random_order(split.groups, seed=3)
    first, second = order[split.fit], order[split.certify]
    assert (len(first), len(second)) == (50, 51)
    assert sorted([*first, *second]) == list(range(101))
    assert all((half != np.sort(half)).any() for half in (first, second))
    assert np.array_equal(order, random_order(split.groups, seed=3))
    assert not np.array_equal(order, random_order(split.groups, seed=4))


def test_prompts_that_came_together_stay_in_one_half_and_in_one_fold():
    given = np.random.default_rng(1).integers(0, 40, 200).tolist()  # in no order
    order = random_order(numbered(given), seed=3)
    kept = [given[place] for place in order]
    split = Split.of_groups(numbered(kept))
    halves = [{kept[place] for place in half} for half in (split.fit, split.certify)]
    assert not halves[0] & halves[1]
    assert [len(half) for half in halves] == [20, 20]
    assert sorted(order) == list(range(200))
    assert sum(a != b for a, b in pairwise(kept)) == 39, "each group in one piece"


def test_prompts_that_come_alone_are_split_as_if_there_were_no_groups():
    alone = numbered([f"line {number}" for number in range(101)])
    assert np.array_equal(random_order(alone, 3), np.random.default_rng(3).permutation(101))
    split, halves = Split.of_groups(alone), Split.halves(101)
    assert np.array_equal(split.fit, np.arange(50))
    assert np.array_equal(split.certify, halves.certify)


def test_a_probe_has_seen_no_prompt_of_the_group_that_it_judges_for_the_classifier(monkeypatch):
    """Prompts with the same state in one fold: what a probe learns from one helps no other."""
    groups = np.repeat(np.arange(PROMPTS // 5), 5)
    recording = replace(recording_of(rank=1), moments={})
    seen: list[tuple[set[int], set[int]]] = []

    def spy(probe, layer, recording, rows, *rest):
        seen.append((probe, set(groups[recording.prompts[rows]].tolist())))
        return judge(probe, layer, recording, rows, *rest)

    monkeypatch.setattr(fit, "judge", spy)
    fitted_on(recording, "label-head", torch.tensor([3, 7]), Split.of_groups(groups))
    *by_fold, _ = [own for _, own in seen]
    assert len(by_fold) == FOLDS
    assert sum(map(len, by_fold)) == len(set().union(*by_fold)), "no group is in two folds"


def test_the_rows_of_a_half_are_all_those_of_its_prompts_in_the_prompts_order():
    recording = replace(recording_of(rank=1), prompts=np.array([0, 0, 1, 2, 2, 3]))
    split = Split(fit=np.array([2, 0]), certify=np.array([1, 3]), groups=np.arange(4))
    assert recording.of(split.fit).tolist() == [3, 4, 0, 1]
    assert recording.of(split.certify).tolist() == [2, 5]


def test_a_lens_that_is_exact_is_recovered(monkeypatch):
    monkeypatch.setattr(probes, "RIDGE_PENALTIES", (1e-6, 1.0))
    recording = recording_of(rank=4)
    fitted = fitted_on(recording, "lens")
    model = Probe(recording.model.logit_lens.head, norm=NORM)
    found = fitted.probe.readout(recording.states[LAYER])
    torch.testing.assert_close(found, model.readout(recording.final), rtol=1e-3, atol=1e-3)
    assert fitted.fitted.agrees.all()
    assert fitted.held_out.agrees.all()


@pytest.mark.parametrize(("kind", "labels"), [("lens", None), ("label-head", LABELS)])
def test_features_to_learn_from_are_of_probes_that_have_not_seen_the_prompt(
    monkeypatch, kind, labels
):
    """With targets of pure noise and no penalty to speak of, a probe knows what it has seen."""
    monkeypatch.setattr(probes, "RIDGE_PENALTIES" if labels is None else "PENALTIES", (1e-3,))
    recording = recording_of(rank=4, noise=100.0)
    if labels is not None:
        model = fitted_on(recording, "logit-lens", labels).probe
        final = model.score(model.readout(recording.final))
        recording.tokens[:] = final.top1_id.numpy()
    else:
        for fold, moments in enumerate(recording.moments[LAYER]):
            rows = torch.from_numpy(SPLIT.fit[SPLIT.fit % FOLDS == fold])
            state = recording.states[LAYER][rows]
            moments.add(state, recording.final[rows] - state, torch.full((len(rows),), 1000.0))
    fitted = fitted_on(recording, kind, labels)
    seen = SPLIT.fit
    probe = fitted.probe
    result = probe.score(probe.readout(recording.states[LAYER][seen]))
    in_sample = (result.top1_id.numpy() == recording.tokens[seen]).mean()
    assert in_sample > fitted.fitted.agrees.mean() + 0.1
    assert abs(fitted.fitted.agrees.mean() - fitted.held_out.agrees.mean()) < 0.2


def test_the_loss_of_accuracy_is_signed_by_who_is_right():
    recording = recording_of(rank=4, noise=3.0)
    generator = np.random.default_rng(0)
    choices = LABELS.tolist()
    right = [{choices[n]} for n in generator.integers(0, 3, PROMPTS)]
    plain = fitted_on(recording, "logit-lens", LABELS).probe
    recording.tokens[:] = plain.score(plain.readout(recording.final)).top1_id.numpy()
    target = Target("label-head", LABELS, promise=Accuracy())
    [exit] = fit_exits(Calibration(recording, target, SPLIT, PolicyOptions(), right=right), [LAYER])
    for half, prompts in zip((exit.fitted, exit.held_out), (SPLIT.fit, SPLIT.certify), strict=True):
        full = recording.tokens[prompts]
        found = set()
        for row, prompt in enumerate(prompts):
            lost = int(full[row] in right[prompt]) - int(half.tokens[row] in right[prompt])
            assert half.loss[row] == lost
            found.add(lost)
        assert np.array_equal(half.agrees, half.tokens == full)
        assert found == {-1, 0, 1}
    assert np.array_equal(is_right(np.array([7, 3, 9]), [{7}, {1}, {9, 8}]), [1, 0, 1])
