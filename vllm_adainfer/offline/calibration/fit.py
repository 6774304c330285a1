"""Fit: a probe and a classifier at every candidate exit point.

Prompts are split in two. The first half fits probes and classifiers; the classifier learns from
out-of-fold probe scores, because a ridge is surer of the rows it has seen than of new ones. The
second half is touched by nothing but the bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vllm_adainfer.offline.calibration.collect import FOLDS, Ints, Recording
from vllm_adainfer.offline.calibration.probes import Target, fit_probes
from vllm_adainfer.policy.bound import FloatArray
from vllm_adainfer.policy.classifier import Kind, fit_classifier
from vllm_adainfer.policy.crf import fit_crf
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.policy.score import score

Bools = npt.NDArray[np.bool_]
RightTokens = Sequence[set[int]]


@dataclass(frozen=True)
class Judged:
    """What a probe says of decision rows.

    Attributes:
        features: fp32 [rows, 2], what the classifier reads.
        tokens: int64 [rows], the probe's answers.
        agrees: [rows], whether that is the full model's answer.
        loss: [rows], what leaving here costs. For disagreement: 1 where it does not agree, else
            0. For accuracy: 1 where full depth is right and this is not, -1 the other way round.

    """

    features: Tensor
    tokens: Ints
    agrees: Bools
    loss: FloatArray

    def scored(self, classifier: Tensor, memory: Tensor | None = None) -> Scored:
        """With the classifier's settled score."""
        settled = score(self.features, classifier, memory)
        return Scored(self.features, self.tokens, self.agrees, self.loss, settled)


@dataclass(frozen=True)
class Scored(Judged):
    """And what the classifier makes of it.

    Attributes:
        score: fp32 [rows], the settled score.

    """

    score: Tensor


@dataclass(frozen=True)
class FittedExit:
    """A candidate exit point: what serving needs of it, and how it did."""

    layer: int
    probe: Probe
    classifier: Tensor
    fitted: Scored
    held_out: Scored


def split(prompts: int, seed: int) -> tuple[Ints, Ints]:
    """Two random halves of the prompts: to fit on, and to certify on.

    They stay in random order, which the bound of Waudby-Smith and Ramdas needs.
    """
    order = np.random.default_rng(seed).permutation(prompts)
    return order[: prompts // 2], order[prompts // 2 :]


def fit_exits(
    recording: Recording,
    target: Target,
    halves: tuple[Ints, Ints],
    kind: Kind,
    seed: int,
    layers: Iterable[int],
    right: RightTokens | None = None,
) -> list[FittedExit]:
    """Fit every layer in `layers`; those that cannot be learned are left out.

    Args:
        recording: of all prompts.
        target: what the probes are to predict.
        halves: decision rows of `recording` to fit on, and to certify on.
        kind: of classifier; a CRF is fitted later on the chosen exit points, see `chain`.
        seed: for solvers and folds.
        layers: candidates; a progress bar may be around them.
        right: tokens that are right, by row: losses are of accuracy then, not disagreement.

    """
    fit_rows, held_out = halves
    folds = recording.prompts[fit_rows] % FOLDS
    exits = []
    for layer in layers:
        probe, without_fold = fit_probes(recording, target, fit_rows, layer)
        # Out of fold: each decision row is judged by a probe that has not seen its prompt.
        features = torch.empty(len(fit_rows), 2)
        tokens = np.empty(len(fit_rows), dtype=np.int64)
        for fold, unseeing in enumerate(without_fold):
            where = np.flatnonzero(folds == fold)
            result = judge(unseeing, layer, recording, fit_rows[where])
            features[where], tokens[where] = result.features, result.tokens
        unseen = _judged(features, tokens, recording, fit_rows, right)
        classifier = fit_classifier(
            "svm" if kind == "crf" else kind, unseen.features, unseen.agrees, seed
        )
        if classifier is not None:
            held = judge(probe, layer, recording, held_out, right)
            fitted = unseen.scored(classifier)
            exits.append(FittedExit(layer, probe, classifier, fitted, held.scored(classifier)))
    return exits


def judge(
    probe: Probe,
    layer: int,
    recording: Recording,
    rows: Ints,
    right: RightTokens | None = None,
) -> Judged:
    """What `probe` says of decision `rows` of a recording after `layer`."""
    result = probe.score(probe.readout(recording.states[layer][rows]))
    return _judged(result.features, result.top1_id.numpy(), recording, rows, right)


def _judged(
    features: Tensor, tokens: Ints, recording: Recording, rows: Ints, right: RightTokens | None
) -> Judged:
    full = recording.tokens[rows]
    agrees = tokens == full
    if right is None:
        return Judged(features, tokens, agrees, (~agrees).astype(np.float64))
    loss = is_right(full, right, rows) - is_right(tokens, right, rows)
    return Judged(features, tokens, agrees, loss)


def is_right(tokens: Ints, right: RightTokens, rows: Ints) -> FloatArray:
    """1 where the token is one of those that are right for its row, else 0."""
    pairs = zip(tokens.tolist(), rows.tolist(), strict=True)
    return np.array([float(token in right[row]) for token, row in pairs])


def chain(exits: Sequence[FittedExit]) -> list[FittedExit]:
    """The chosen exit points (ascending, at least one) with a CRF over them for classifiers."""
    steps = fit_crf(
        torch.stack([fitted.fitted.features for fitted in exits], dim=1),
        np.stack([fitted.fitted.agrees for fitted in exits], axis=1),
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
                fitted=replace(fitted.fitted, score=fitted_score),
                held_out=replace(fitted.held_out, score=held_out_score),
            )
        )
    return chained


def candidate_layers(depth: int, asked: Sequence[int] | None) -> list[int]:
    """Layers to record: those asked for, or about fifteen spread over the stack."""
    if asked is not None:
        return list(asked)
    step = max(1, round(depth / 16))
    return list(range(step, depth, step))
