"""Label probabilities: how an exit point reads them, and how far they are from full depth's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_adainfer.promise.label_subsets import restrict
from vllm_adainfer.promise.links import SOFTMAX, Link

# A classifier's input: columns of `adainfer_kernels.ProbeResult.features`, and of `features_of`.
FEATURES = ("top_prob", "gap")
PROBABILITY_FEATURES = ("top_logit", "gap", "mass_logit")
# How far a probability has moved, as buckets of a histogram.
MOVES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class LabelProbabilities:
    """The probabilities of the labels in a distribution over the vocabulary.

    Attributes:
        among: fp32 [rows, labels], their probabilities among themselves, which sum to 1; or where
            any number of labels may hold, that of each.
        mass: fp32 [rows], the sum of their probabilities in the whole vocabulary.
        known: fp32 [rows, labels], those in the whole vocabulary, where they are known by
            themselves; None where they are the product of both.

    """

    among: Tensor
    mass: Tensor
    known: Tensor | None = None

    @property
    def in_vocabulary(self) -> Tensor:
        """fp32 [rows, labels], their probabilities in the whole vocabulary."""
        return self.among * self.mass.unsqueeze(1) if self.known is None else self.known

    def of_rows(self, rows: Tensor | Sequence[int]) -> LabelProbabilities:
        """Those of some of the rows, int64."""
        known = None if self.known is None else self.known[rows]
        return LabelProbabilities(self.among[rows], self.mass[rows], known)

    def largest_move(self, other: LabelProbabilities, with_mass: bool) -> Tensor:
        """[rows], the furthest that a probability of `other` is from this one.

        Among the labels; `with_mass` also in the whole vocabulary, and the mass itself.
        """
        moved = (self.among - other.among).abs().amax(dim=1)
        if not with_mass:
            return moved
        moved = torch.maximum(moved, (self.mass - other.mass).abs())
        in_vocabulary = (self.in_vocabulary - other.in_vocabulary).abs().amax(dim=1)
        return torch.maximum(moved, in_vocabulary)


def probabilities_of_logits(
    logits: Tensor, label_ids: Tensor, subsets: Tensor | None = None, link: Link = SOFTMAX
) -> LabelProbabilities:
    """The probabilities of the labels, int64 [labels], by logits [rows, vocabulary].

    `subsets`, bool [rows, labels], are the labels that each row is about; None for all.
    """
    logits = logits.float()
    labels = restrict(logits[:, label_ids], subsets)
    mass = (labels.logsumexp(dim=1) - logits.logsumexp(dim=1)).exp()
    return LabelProbabilities(link.probabilities(labels), mass.clamp(max=1))


def probabilities_of_scores(scores: Tensor, link: Link = SOFTMAX) -> LabelProbabilities:
    """What a head's scores [rows, labels + 1] say of the labels; -inf is for one not asked for."""
    return LabelProbabilities(link.probabilities(scores[:, :-1]), scores[:, -1].sigmoid())


def features_among(scores: Tensor, link: Link = SOFTMAX) -> Tensor:
    """``top_prob`` and ``gap`` among the tokens with finite `scores` [rows, tokens]: [rows, 2]."""
    return link.top_prob_and_gap(scores)


def features_of(scores: Tensor, link: Link = SOFTMAX) -> Tensor:
    """The classifier's features of a head's scores [rows, labels + 1]: fp32 [rows, 3].

    ``top_logit`` is the log-odds of the best label among the labels, ``gap`` the lead of its
    probability over the second, ``mass_logit`` the log-odds of the label mass. Near 1, where
    answers leave, a probability hardly changes, but its log-odds do. Where any number of labels may
    hold, the first two are about the label that is least sure: whether it holds, or does not; of an
    object, about the field that is least sure.
    """
    top_logit, gap = link.top_logit_and_gap(scores[:, :-1]).unbind(dim=1)
    return torch.stack([top_logit, gap, scores[:, -1]], dim=1)


def answers_of(scores: Tensor, vocabulary: int | None, link: Link = SOFTMAX) -> Tensor:
    """The logits that give a head's probabilities, fp32 [rows, labels + 1].

    The last column is the logit of every token that is none of the row's labels.

    Args:
        scores: [rows, labels + 1]; -inf for labels that a row is not about, also in the result.
        vocabulary: its size: the tokens that share what the label mass leaves; None if they get
            nothing.
        link: how scores become probabilities.

    """
    labels = link.normalised(scores[:, :-1])
    if vocabulary is None:
        rest = torch.full_like(scores[:, -1:], -torch.inf)
    else:  # the labels' exponentials sum to 1, so the others' must sum to (1 - mass) / mass
        rest = -scores[:, -1:] - _others(scores[:, :-1], vocabulary).log().unsqueeze(1)
    return torch.cat([labels, rest], dim=1)


def _others(labels: Tensor, vocabulary: int) -> Tensor:
    """fp32 [rows], how many tokens of the vocabulary are none of each row's labels."""
    return vocabulary - labels.isfinite().sum(dim=1, dtype=torch.float32)


def probabilities_of_answers(
    answers: Tensor, vocabulary: int | None, link: Link = SOFTMAX
) -> LabelProbabilities:
    """The probabilities in `answers_of`, as vLLM's log-softmax over the vocabulary gives them."""
    labels, rest = answers[:, :-1], answers[:, -1]
    mass = torch.ones_like(rest)
    if vocabulary is not None:
        mass = (-rest - _others(labels, vocabulary).log()).sigmoid()
    return LabelProbabilities(link.probabilities(labels), mass)
