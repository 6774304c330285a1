"""The loss of an early answer, whose mean the policy's bound controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.arrays import Floats, Ints
from vllm_adainfer.artifact.label_subsets import restrict
from vllm_adainfer.offline.calibration.record.rows import Rows
from vllm_adainfer.promise.gates import Gates
from vllm_adainfer.promise.links import SOFTMAX, Link
from vllm_adainfer.promise.probabilities import LabelProbabilities
from vllm_adainfer.promise.promise import Outcome

RightTokens = Sequence[set[int]]  # by prompt


@dataclass(frozen=True)
class ProbeAnswers:
    """A probe's output for some rows.

    Attributes:
        features: fp32 [rows, n], the classifier's input.
        tokens: int64 [rows], the answers.
        probabilities: the labels' probabilities; None if the probe gives the answer alone.

    """

    features: Tensor
    tokens: Ints
    probabilities: LabelProbabilities | None = None


# (a probe's answers, the full model's answers int64 [rows], the rows of the recording int64 [rows])
# -> the loss of each answer [rows].
Loss = Callable[[ProbeAnswers, Ints, Ints], Floats]


def disagreement(early: ProbeAnswers, full: Ints, rows: Ints) -> Floats:
    """1 where the answer differs from the full model's, else 0."""
    return (early.tokens != full).astype(np.float64)


def accuracy_lost(right: RightTokens) -> Loss:
    """1 where the full model is right and the answer is not, -1 in the opposite case, else 0.

    The mean holds in service only if no answer that makes up for others is taken back, see
    `ArtifactConfig.answers_stand`. `right` holds the right tokens of each row of the recording.
    """
    return lambda early, full, rows: (
        is_right(full, right, rows) - is_right(early.tokens, right, rows)
    )


def is_right(tokens: Ints, right: RightTokens, rows: Ints) -> Floats:
    """[rows], 1 where the token is one of the right ones for its row, else 0."""
    pairs = zip(tokens.tolist(), rows.tolist(), strict=True)
    return np.array([float(token in right[row]) for token, row in pairs])


@dataclass(frozen=True)
class FullDepthLabels:
    """The labels at full depth, for each row of a recording.

    Attributes:
        scores: fp32 [rows, labels], their logits, computed in fp32: the targets of the heads.
        probabilities: their probabilities as vLLM returns them, from logits in the model's dtype.
        link: how scores become probabilities.
        label_is_best: bool [rows], whether the best token of the whole vocabulary is a label.

    """

    scores: Tensor
    probabilities: LabelProbabilities
    label_is_best: Tensor
    link: Link = SOFTMAX

    def loss(self, tolerance: float, with_mass: bool) -> Loss:
        """1 where the answer differs or a probability moves by more than `tolerance`, else 0.

        `with_mass`: probabilities in the whole vocabulary count, too, and an answer is also wrong
        if the best token of the vocabulary is no label.
        """
        return partial(self._wrong, tolerance, with_mass)

    def loss_of_order(self, margin: float) -> Loss:
        """1 where a score moves by more than half of `margin`, else 0.

        Two documents that move by less do not pass each other if they lie the margin apart.
        """

        def loss(early: ProbeAnswers, full: Ints, rows: Ints) -> Floats:
            assert early.probabilities is not None
            moved = (early.probabilities.among - self.probabilities.among[rows]).abs().amax(dim=1)
            return (moved > margin / 2).numpy().astype(np.float64)

        return loss

    def loss_of_gates(self, gates: Gates) -> Loss:
        """1 where an answer is on the wrong side of one of `gates`, else 0."""

        def loss(early: ProbeAnswers, full: Ints, rows: Ints) -> Floats:
            assert early.probabilities is not None
            best = torch.from_numpy(full)
            there = self.probabilities.of_rows(torch.from_numpy(rows))
            wrong = gates.wrong(
                Outcome(best, labels=early.probabilities), Outcome(best, labels=there)
            )
            return wrong.numpy().astype(np.float64)

        return loss

    def _wrong(
        self, tolerance: float, with_mass: bool, early: ProbeAnswers, full: Ints, rows: Ints
    ) -> Floats:
        assert early.probabilities is not None
        full_depth = self.probabilities
        reference = LabelProbabilities(full_depth.among[rows], full_depth.mass[rows])
        moved = early.probabilities.largest_move(reference, with_mass)
        wrong = ~(moved <= tolerance).numpy()
        if self.link.one_holds:
            wrong |= early.tokens != full
        if with_mass:
            wrong |= ~self.label_is_best[rows].numpy()
        return wrong.astype(np.float64)


def full_depth_labels(
    rows: Rows,
    label_ids: Tensor,
    subsets: Tensor | None = None,
    link: Link = SOFTMAX,
) -> FullDepthLabels:
    """Compute the labels' scores, int64 [labels], from the recorded final states.

    `subsets`, bool [rows, labels], are the labels that each row is about; None for all.
    """
    lens = rows.model.as_served(rows.model.logit_lens)
    whole = lens.score(lens.readout(rows.final))
    labels = lens.of_tokens(label_ids)
    scores = labels.score(labels.readout(rows.final), return_scores=True).scores
    exact = replace(labels, head=replace(labels.head, weight=labels.head.weight.float()))
    exact_scores = exact.score(exact.readout(rows.final), return_scores=True).scores
    assert scores is not None
    assert exact_scores is not None
    own = restrict(scores, subsets)
    mass = (own.logsumexp(dim=1) - whole.lse).exp().clamp(max=1)
    is_best = whole.top1_id.unsqueeze(1) == label_ids
    if subsets is not None:
        is_best &= subsets
    probabilities = LabelProbabilities(link.probabilities(own), mass)
    return FullDepthLabels(exact_scores, probabilities, is_best.any(dim=1), link)
