"""Fit: a probe and a classifier at every candidate exit point.

One part of the prompts fits probes and classifiers. A classifier learns from out-of-fold probe
scores, because a regression is surer of the rows it has seen than of new ones. Nothing but
the bound reads the other part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.arrays import Bools, Floats, Ints
from vllm_adainfer.artifact.kinds import ClassifierKind
from vllm_adainfer.offline.calibration.fit.calibration import Calibration, TrainedProbe
from vllm_adainfer.offline.calibration.fit.classifier import fit_classifier
from vllm_adainfer.offline.calibration.fit.probes import (
    ProbeAnswers,
    Target,
    answers_of_probe,
    answers_of_scores,
    fit_probes,
)
from vllm_adainfer.offline.calibration.fit.side_by_side import side_by_side
from vllm_adainfer.offline.calibration.record.rows import FOLDS, Rows
from vllm_adainfer.policy.encoders import StateEncoder
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.policy.score import score
from vllm_adainfer.promise.accuracy import RightTokens
from vllm_adainfer.promise.first_documents import relevance
from vllm_adainfer.promise.label_subsets import restrict

# Log odds by which a student may be surer than its classifier says, or less sure. Exit points share
# one threshold, and a student's errors are not those of heads: where both are as sure, a per cent
# of errors buys other shares of the layers. So the rows that fit choose the line along which
# both thresholds fall.
HANDICAPS = (-3.0, -2.0, -1.0, 1.0, 2.0, 3.0)
PLAIN = Target("logit-lens", None)  # any token may be the answer


@dataclass(frozen=True)
class Scored:
    """A probe's answers for decision rows, compared with the full model's.

    Attributes:
        features: fp32 [rows, n], the classifier's input.
        tokens: int64 [rows], the probe's answers.
        full: int64 [rows], the full model's answers.
        loss: [rows], the loss of exiting here, see `Promise.loss`.
        score: fp32 [rows], the classifier's: log odds that the answer is final; 0 without one.
        relevance: [rows], the probability of the last label, by which a reranker orders documents;
            None if the probe gives the answer alone.

    """

    features: Tensor
    tokens: Ints
    full: Ints
    loss: Floats
    score: Tensor
    relevance: Floats | None = field(default=None, kw_only=True)

    @classmethod
    def of(
        cls,
        early: ProbeAnswers,
        target: Target,
        rows: Rows,
        where: Ints,
        right: RightTokens | None = None,
    ) -> Scored:
        """A probe's answers for the decision rows `where`, with their loss and no score.

        `right` holds the right tokens of each row, if accuracy is promised.
        """
        features, outcome = early
        full = target.full_depth_of(rows, where)
        rights = None if right is None else [right[row] for row in where.tolist()]
        loss = target.promise.loss(outcome, full, rights)
        shown = None if outcome.labels is None else relevance(outcome).double().numpy()
        tokens, unscored = outcome.best.numpy(), torch.zeros(len(where))
        return cls(features, tokens, full.best.numpy(), loss, unscored, relevance=shown)

    @property
    def agrees(self) -> Bools:
        """[rows], whether the full model gives the same answer."""
        agrees: Bools = self.tokens == self.full
        return agrees

    def scored(self, classifier: Tensor) -> Scored:
        """The same with the score of a linear classifier."""
        return replace(self, score=score(self.features, classifier, None))

    def never_at(self, never: Bools) -> Scored:
        """The same, but never settled where `never` says so, [rows]."""
        return replace(self, score=self.score.masked_fill(torch.from_numpy(never), -torch.inf))

    def of_rows(self, rows: Bools | Ints) -> Scored:
        """The same for those of `rows` alone, a mask or indices."""
        kept = torch.from_numpy(rows)
        return Scored(
            self.features[kept],
            self.tokens[rows],
            self.full[rows],
            self.loss[rows],
            self.score[kept],
            relevance=None if self.relevance is None else self.relevance[rows],
        )


@dataclass(frozen=True)
class FittedExit:
    """A candidate exit point: the parts that serve, and their results on both halves.

    `handicap` has been added to the score that its classifier was fitted to, see `HANDICAPS`.
    """

    layer: int
    probe: Probe
    classifier: Tensor
    fitted: Scored
    held_out: Scored
    handicap: float = 0.0

    @property
    def is_branch(self) -> bool:
        """Whether a branch decides, not a head."""
        return isinstance(self.probe.encoder, StateEncoder)

    @property
    def is_alternative(self) -> bool:
        """Whether it stands beside another candidate after the same layer, which comes first."""
        return self.is_branch or self.handicap != 0

    def with_handicap(self, odds: float) -> FittedExit:
        """The same, surer by `odds`, log odds, of every row; its classifier must be linear."""
        classifier = self.classifier.clone()
        classifier[-1] += odds  # the bias
        return replace(
            self,
            classifier=classifier,
            fitted=replace(self.fitted, score=self.fitted.score + odds),
            held_out=replace(self.held_out, score=self.held_out.score + odds),
            handicap=self.handicap + odds,
        )


def fit_exits(
    calibration: Calibration,
    layers: Sequence[int],
    shown: Callable[[Iterator[FittedExit | None]], Iterable[FittedExit | None]] = iter,
) -> list[FittedExit]:
    """Fit an exit point after each of `layers`; leave out those that cannot be learned.

    `shown` passes them on as they come, see `progress`.
    """
    pieces = [partial(fit_head, calibration, layer) for layer in layers]
    return [exit for exit in shown(side_by_side(pieces)) if exit is not None]


def fit_head(calibration: Calibration, layer: int) -> FittedExit | None:
    """Fit an exit point after a layer that a head decides; None if it cannot be learned."""
    rows, target, right = calibration.rows, calibration.target, calibration.right
    prompts = rows.prompts[calibration.fitted]
    # The sums that tuned lenses learn from are by prompt; else no group of prompts is torn.
    folds = (prompts if rows.moments else calibration.split.units[prompts]) % FOLDS
    # Out of fold: a probe that has not seen a prompt judges its decision rows.
    places = [np.flatnonzero(folds == fold) for fold in range(FOLDS)]
    probe, without_fold = fit_probes(rows, target, calibration.fitted, layer, folds)
    unseen = _in_order(
        places,
        [
            judge(unseeing, layer, rows, calibration.fitted[where], target, right)
            for unseeing, where in zip(without_fold, places, strict=True)
        ],
    )
    held_out = judge(probe, layer, rows, calibration.held_out, target, right)
    return fit_exit(calibration, layer, probe, unseen, held_out)


def fit_exit(
    calibration: Calibration,
    layer: int,
    probe: Probe,
    unseen: Scored,
    held_out: Scored,
    asked: Callable[[Ints], Bools] = lambda prompts: np.ones(len(prompts), dtype=np.bool_),
) -> FittedExit | None:
    """Fit the classifier of an exit point after a layer; None if it cannot be learned.

    `unseen` are the answers for the rows that fit, of probes that have not seen them; `held_out`
    those of `probe` for the held-out rows. It settles no prompt that it is not `asked` about.
    """
    target, prompts = calibration.target, calibration.rows.prompts
    learned = asked(prompts[calibration.fitted])
    features = unseen.features[torch.from_numpy(learned)]
    settled = target.settled(unseen.agrees, unseen.loss)[learned]
    options, names = calibration.options, target.promise.feature_names
    # A CRF is over several exit points, see `fit_crf_chain`.
    kind: ClassifierKind = "svm" if options.classifier == "crf" else options.classifier
    classifier = fit_classifier(kind, features, settled, options.seed, names)
    if classifier is None:
        return None
    fitted, certifying = (
        one.scored(classifier).never_at(target.are_never_early(one.tokens) | ~asked(prompts[rows]))
        for one, rows in ((unseen, calibration.fitted), (held_out, calibration.held_out))
    )
    return FittedExit(layer, probe, classifier, fitted, certifying)


def with_trained(calibration: Calibration, heads: Sequence[FittedExit]) -> list[FittedExit]:
    """The candidates: `heads` with what was trained for a calibration.

    A student takes the place of a head before the first layer, with each of the `HANDICAPS`; a
    branch stands beside its layer's head. A probe whose classifier cannot be learned is left out.
    """
    taken = {0} & {one.layer for one in calibration.trained}
    found = [head for head in heads if head.layer not in taken]
    is_linear = calibration.options.classifier != "crf"  # which sees all exit points together
    for trained in calibration.trained:
        exit = fit_trained(calibration, trained)
        if exit is None:
            continue
        found.append(exit)
        if is_linear and not exit.is_branch:
            found += [exit.with_handicap(odds) for odds in HANDICAPS]
    return sorted(found, key=lambda exit: exit.layer)


def fit_trained(calibration: Calibration, trained: TrainedProbe) -> FittedExit | None:
    """An exit point of what was trained, judged on the rows that fit by what has not seen them."""
    rows, target, held_out = calibration.rows, calibration.target, calibration.held_out

    def judged(scores: Tensor, where: Ints) -> Scored:
        early = answers_of_scores(trained.probe, scores, target.promise)
        return Scored.of(early, target, rows, where, calibration.right)

    unseen = restrict(trained.unseen, target.subsets_of(calibration.fitted))
    scores = trained.scores(rows.prompts[held_out], target.subsets_of(held_out))
    return fit_exit(
        calibration,
        trained.layer,
        trained.probe,
        judged(unseen, calibration.fitted),
        judged(scores, held_out),
        trained.asked,
    )


def judge(
    probe: Probe,
    layer: int,
    rows: Rows,
    where: Ints,
    target: Target = PLAIN,
    right: RightTokens | None = None,
) -> Scored:
    """The answers of `probe` after `layer` for the decision rows `where`, see `Scored.of`."""
    read = rows.read_by_probe(layer, where, target.is_pooled)
    early = answers_of_probe(probe, read, target.subsets_of(where), target.promise)
    return Scored.of(early, target, rows, where, right)


def _in_order(places: Sequence[Ints], parts: Sequence[Scored]) -> Scored:
    """The parts as one, in the order of their places."""
    shown = [part.relevance for part in parts if part.relevance is not None]
    whole = Scored(
        torch.cat([part.features for part in parts]),
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.full for part in parts]),
        np.concatenate([part.loss for part in parts]),
        torch.cat([part.score for part in parts]),
        relevance=np.concatenate(shown) if shown else None,
    )
    return whole.of_rows(np.argsort(np.concatenate(places)))
