"""Exit points whose probe was trained, a student or branches: judged on rows new to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.artifact.kinds import ClassifierKind
from vllm_adainfer.offline.calibration.fit.classifier import fit_classifier
from vllm_adainfer.offline.calibration.fit.exits import FittedExit, Judged, Scored
from vllm_adainfer.offline.calibration.fit.loss import Loss, disagreement
from vllm_adainfer.offline.calibration.fit.probes import Target, answers_of_scores
from vllm_adainfer.offline.calibration.fit.split import Split
from vllm_adainfer.offline.calibration.record.collect import Recording
from vllm_adainfer.policy.branch import Branch
from vllm_adainfer.policy.student import Student


class TrainedProbe(Protocol):
    """A probe that was trained on most of the rows that fit."""

    @property
    def layer(self) -> int:
        """The layer after which it decides."""

    @property
    def probe(self) -> Student | Branch:
        """The probe, as it is served."""

    @property
    def unseen(self) -> Bools:
        """[rows that fit], those that it was not trained on."""

    def scores(self, prompts: Ints, subsets: Tensor | None) -> tuple[Tensor, Bools]:
        """Scores of the labels for `prompts`, see `LabelHead.score`, and who is asked at all."""


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
    """The candidates with those that were `trained`, all on the rows that these have not seen.

    A student takes the place of a head before the first layer; a branch stands beside its layer's
    head. A probe whose classifier cannot be learned is left out. The last arguments are as for
    `fit_exits`.
    """
    unseen, taken = trained[0].unseen, {0} & {one.layer for one in trained}
    found = [
        replace(head, fitted=head.fitted.of_rows(unseen))
        for head in heads
        if head.layer not in taken
    ]
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
    unseen, held_out = (
        _judge(trained, recording, rows, loss, target)
        for rows in (recording.rows_of(split.fit)[trained.unseen], recording.rows_of(split.certify))
    )
    judged, asked = unseen
    linear: ClassifierKind = "svm" if kind == "crf" else kind
    features = judged.features[torch.from_numpy(asked)]
    settled = target.settled(judged.agrees, judged.loss)[asked]
    classifier = fit_classifier(linear, features, settled, seed, target.features)
    if classifier is None:
        return None
    fitted = classifier

    def scored(answers: Judged, asked: Bools) -> Scored:
        found = answers.scored(fitted).never_at(target.never_settled)
        never = torch.from_numpy(~asked)
        return replace(found, score=found.score.masked_fill(never, -torch.inf))

    return FittedExit(trained.layer, trained.probe, classifier, scored(*unseen), scored(*held_out))


def _judge(
    trained: TrainedProbe, recording: Recording, rows: Ints, loss: Loss, target: Target
) -> tuple[Judged, Bools]:
    """The answers for decision `rows`, and for which of them it is asked."""
    scores, asked = trained.scores(recording.prompts[rows], target.subsets_of(rows))
    early, full = (
        answers_of_scores(trained.probe.head, scores, target.gates),
        recording.tokens[rows],
    )
    return Judged(early.features, early.tokens, full, loss(early, full, rows)), asked
