"""Exit points whose probe was trained, a student or branches: judged by what it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.artifact.kinds import ClassifierKind
from vllm_adainfer.artifact.label_subsets import restrict
from vllm_adainfer.offline.calibration.fit.classifier import fit_classifier
from vllm_adainfer.offline.calibration.fit.exits import FittedExit, Judged, Scored
from vllm_adainfer.offline.calibration.fit.loss import Loss, disagreement
from vllm_adainfer.offline.calibration.fit.probes import Target, answers_of_scores
from vllm_adainfer.offline.calibration.fit.split import Split
from vllm_adainfer.offline.calibration.record.recording import Recording
from vllm_adainfer.policy.branch import Branch
from vllm_adainfer.policy.student import Student


class TrainedProbe(Protocol):
    """A probe that was trained on the rows that fit."""

    @property
    def layer(self) -> int:
        """The layer after which it decides."""

    @property
    def probe(self) -> Student | Branch:
        """The probe, as it is served."""

    @property
    def unseen(self) -> Tensor:
        """What a probe that has not seen them says of the rows that fit, see `Trained.unseen`."""

    def asked(self, prompts: Ints) -> Bools:
        """[prompts], whether it is asked about each."""

    def scores(self, prompts: Ints, subsets: Tensor | None) -> Tensor:
        """Scores of the labels for `prompts`, see `LabelHead.score`."""


def with_trained(
    trained: Sequence[TrainedProbe],
    heads: Sequence[FittedExit],
    recording: Recording,
    target: Target,
    split: Split,
    kind: ClassifierKind,
    seed: int,
    loss: Loss = disagreement,
) -> list[FittedExit]:
    """The candidates with those that were `trained`.

    A student takes the place of a head before the first layer; a branch stands beside its layer's
    head. A probe whose classifier cannot be learned is left out. The last arguments are as for
    `fit_exits`.
    """
    taken = {0} & {one.layer for one in trained}
    found = [head for head in heads if head.layer not in taken]
    for one in trained:
        exit = _fit_exit(one, recording, target, split, kind, seed, loss)
        if exit is not None:
            found.append(exit)
    return sorted(found, key=lambda exit: exit.layer)


def _fit_exit(
    trained: TrainedProbe,
    recording: Recording,
    target: Target,
    split: Split,
    kind: ClassifierKind,
    seed: int,
    loss: Loss,
) -> FittedExit | None:
    fit, held_out = recording.rows_of(split.fit), recording.rows_of(split.certify)
    unseen = restrict(trained.unseen, target.subsets_of(fit))
    judged = _judged(trained, unseen, recording, fit, loss, target)
    asked = trained.asked(recording.prompts[fit])
    linear: ClassifierKind = "svm" if kind == "crf" else kind
    features = judged.features[torch.from_numpy(asked)]
    settled = target.settled(judged.agrees, judged.loss)[asked]
    classifier = fit_classifier(linear, features, settled, seed, target.features)
    if classifier is None:
        return None
    fitted = classifier

    def scored(answers: Judged, rows: Ints) -> Scored:
        found = answers.scored(fitted).never_at(target.never_settled)
        never = torch.from_numpy(~trained.asked(recording.prompts[rows]))
        return replace(found, score=found.score.masked_fill(never, -torch.inf))

    scores = trained.scores(recording.prompts[held_out], target.subsets_of(held_out))
    certifying = _judged(trained, scores, recording, held_out, loss, target)
    return FittedExit(
        trained.layer, trained.probe, classifier, scored(judged, fit), scored(certifying, held_out)
    )


def _judged(
    trained: TrainedProbe,
    scores: Tensor,
    recording: Recording,
    rows: Ints,
    loss: Loss,
    target: Target,
) -> Judged:
    """The answers that `scores` give decision `rows`."""
    early = answers_of_scores(trained.probe.head, scores, target.gates)
    full = recording.tokens[rows]
    return Judged.of(early, full, loss(early, full, rows))
