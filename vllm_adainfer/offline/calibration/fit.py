"""Fit: a probe and a classifier at every candidate exit point.

One half of the prompts fits probes and classifiers. A classifier learns from out-of-fold probe
scores, because a ridge regression is surer of the rows it has seen than of new ones. Nothing but
the bound reads the other half.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vllm_adainfer.artifact.kinds import ClassifierKind
from vllm_adainfer.offline.calibration.bound import FloatArray
from vllm_adainfer.offline.calibration.classifier import fit_classifier
from vllm_adainfer.offline.calibration.collect import FOLDS, Ints, Recording
from vllm_adainfer.offline.calibration.crf import fit_crf
from vllm_adainfer.offline.calibration.loss import Disagreement, Loss
from vllm_adainfer.offline.calibration.probes import AnyProbe, Target, fit_probes, read
from vllm_adainfer.offline.calibration.split import Split
from vllm_adainfer.policy.score import score

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Judged:
    """What a probe says about decision rows.

    Attributes:
        features: fp32 [rows, n], the classifier's input.
        tokens: int64 [rows], the probe's answers.
        agrees: [rows], whether the full model gives the same answer.
        loss: [rows], what leaving here costs, see `vllm_adainfer.offline.calibration.loss`.

    """

    features: Tensor
    tokens: Ints
    agrees: Bools
    loss: FloatArray

    @property
    def settled(self) -> Bools:
        """[rows], whether the answer is as good as the full model's."""
        settled: Bools = self.agrees & (self.loss == 0)
        return settled

    def scored(self, classifier: Tensor, memory: Tensor | None = None) -> Scored:
        """Add the classifier's settled score."""
        settled = score(self.features, classifier, memory)
        return Scored(self.features, self.tokens, self.agrees, self.loss, settled)


@dataclass(frozen=True)
class Scored(Judged):
    """What a probe and its classifier say about decision rows.

    Attributes:
        score: fp32 [rows], the settled score: log odds that the answer is final.

    """

    score: Tensor

    def never_at(self, token: int | None) -> Scored:
        """The same, but rows whose answer is `token` are never settled; None settles all alike."""
        if token is None:
            return self
        there = torch.from_numpy(self.tokens == token)
        return replace(self, score=self.score.masked_fill(there, -torch.inf))

    def of_rows(self, rows: Bools) -> Scored:
        """Those of `rows` alone."""
        kept = torch.from_numpy(rows)
        return Scored(
            self.features[kept],
            self.tokens[rows],
            self.agrees[rows],
            self.loss[rows],
            self.score[kept],
        )


@dataclass(frozen=True)
class FittedExit:
    """A candidate exit point: the parts that serve, and how it did on both halves."""

    layer: int
    probe: AnyProbe
    classifier: Tensor
    fitted: Scored
    held_out: Scored


def fit_exits(
    recording: Recording,
    target: Target,
    split: Split,
    kind: ClassifierKind,
    seed: int,
    layers: Iterable[int],
    loss: Loss | None = None,
) -> list[FittedExit]:
    """Fit an exit point after each of `layers`; leave out those that cannot be learned.

    Args:
        recording: of all prompts.
        target: what the probes predict.
        split: the prompts to fit on, and those to certify on.
        kind: of the classifier; `chain` fits a CRF later, on the chosen exit points.
        seed: for solvers and folds.
        layers: candidates; possibly wrapped in a progress bar.
        loss: of an answer; None: it differs from the full model's.

    """
    loss = loss or Disagreement()
    fit_rows, held_out = split.fit_rows(recording), split.certify_rows(recording)
    folds = recording.folds_of(fit_rows)
    exits = []
    for layer in layers:
        probe, without_fold = fit_probes(recording, target, fit_rows, layer)
        # Out of fold: a probe that has not seen a prompt judges its decision rows.
        places = [np.flatnonzero(folds == fold) for fold in range(FOLDS)]
        unseen = _joined(
            places,
            [
                judge(unseeing, layer, recording, fit_rows[where], loss, target)
                for unseeing, where in zip(without_fold, places, strict=True)
            ],
        )
        classifier = fit_classifier(
            "svm" if kind == "crf" else kind,
            unseen.features,
            unseen.settled,
            seed,
            target.features,
        )
        if classifier is not None:
            held = judge(probe, layer, recording, held_out, loss, target)
            fitted, held_scored = (
                one.scored(classifier).never_at(target.undecided) for one in (unseen, held)
            )
            exits.append(FittedExit(layer, probe, classifier, fitted, held_scored))
    return exits


def judge(
    probe: AnyProbe,
    layer: int,
    recording: Recording,
    rows: Ints,
    loss: Loss | None = None,
    target: Target | None = None,
) -> Judged:
    """What `probe` says about decision `rows` of a recording after `layer`; see `fit_exits`."""
    subsets = None if target is None else target.subsets_of(rows)
    said = read(probe, recording.states[layer][rows], subsets)
    agrees = said.tokens == recording.tokens[rows]
    losses = (loss or Disagreement()).of(said, recording.tokens[rows], rows)
    return Judged(said.features, said.tokens, agrees, losses)


def _joined(places: Sequence[Ints], parts: Sequence[Judged]) -> Judged:
    """The parts as one, in the order of their places."""
    order = np.argsort(np.concatenate(places))
    return Judged(
        torch.cat([part.features for part in parts])[order],
        np.concatenate([part.tokens for part in parts])[order],
        np.concatenate([part.agrees for part in parts])[order],
        np.concatenate([part.loss for part in parts])[order],
    )


def chain(exits: Sequence[FittedExit]) -> list[FittedExit]:
    """Give the chosen exit points (ascending, at least one) a CRF over all of them."""
    steps = fit_crf(
        torch.stack([fitted.fitted.features for fitted in exits], dim=1),
        np.stack([fitted.fitted.settled for fitted in exits], axis=1),
    )
    chained: list[FittedExit] = []
    fitted_score: Tensor | None = None
    held_out_score: Tensor | None = None
    for fitted, step in zip(exits, steps, strict=True):
        fitted_score = score(fitted.fitted.features, step, fitted_score)
        held_out_score = score(fitted.held_out.features, step, held_out_score)
        chained.append(
            replace(
                fitted,
                classifier=step,
                fitted=replace(fitted.fitted, score=_chained(fitted.fitted, fitted_score)),
                held_out=replace(fitted.held_out, score=_chained(fitted.held_out, held_out_score)),
            )
        )
    return chained


def _chained(before: Scored, score: Tensor) -> Tensor:
    """The score of a chain; rows that are never settled stay so."""
    return score.masked_fill(before.score.isneginf(), -torch.inf)


def candidate_layers(depth: int, asked: Sequence[int] | None) -> list[int]:
    """The layers to record: those asked for, or about fifteen spread over the model."""
    if asked is not None:
        return list(asked)
    step = max(1, round(depth / 16))
    return list(range(step, depth, step))
