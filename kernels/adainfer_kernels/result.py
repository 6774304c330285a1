"""The result of a probe, and how to merge the results of vocabulary shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NO_ID = torch.iinfo(torch.int32).max  # greater than any vocabulary id, so it loses every tie


@dataclass(frozen=True)
class ProbeResult:
    """The best two scores of each row and their log-sum-exp; tensors are [rows] unless noted.

    A row with a score of NaN or +inf, or with only -inf, has NaN features, which no threshold
    accepts.

    Attributes:
        top1_id: int64, vocabulary id of the best score; the lowest id wins a tie. It means nothing
            in a row with a NaN score, where it may be -1.
        top1: fp32, the best score.
        top2: fp32, the second best score; equals ``top1`` on a tie, -inf where all others are.
        lse: fp32, log of the sum of the exponentials of all scores.
        settled: bool, whether the linear classifier accepts the row; None without a classifier.
        scores: fp32 [rows, candidates], all scores; None unless requested.

    """

    top1_id: Tensor
    top1: Tensor
    top2: Tensor
    lse: Tensor
    settled: Tensor | None = None
    scores: Tensor | None = None

    @property
    def top_prob(self) -> Tensor:
        """Probability of the best token, fp32 [rows]."""
        return (self.top1 - self.lse).exp()

    @property
    def gap(self) -> Tensor:
        """Lead of the best token's probability over the second's, fp32 [rows]."""
        return self.top_prob - (self.top2 - self.lse).exp()

    @property
    def features(self) -> Tensor:
        """``top_prob`` and ``gap``, fp32 [rows, 2]."""
        best, second = (torch.stack([self.top1, self.top2]) - self.lse).exp().unbind()
        return torch.stack([best, best - second], dim=-1)


def linear_score(features: Tensor, classifier: Tensor) -> Tensor:
    """Score of a linear classifier (SVM, logistic regression), fp32 [rows].

    `features` are fp32 [rows, n]; `classifier` has their weights, then the bias, fp32 [n + 1].
    """
    return torch.addmv(classifier[-1], features, classifier[:-1])


def merge(parts: Sequence[ProbeResult]) -> ProbeResult:
    """Merge results for the same rows over disjoint parts of the vocabulary, in any order.

    `settled` and `scores` describe a single part, so the merged result has neither: decide after
    the merge, with `linear_score`. A ValueError if there are no parts.
    """
    if not parts:
        raise ValueError("merge needs at least one part")
    if len(parts) == 1:
        [only] = parts
        return ProbeResult(only.top1_id, only.top1, only.top2, only.lse)
    firsts = torch.stack([part.top1 for part in parts])
    best = firsts.amax(dim=0)
    ids = torch.stack([part.top1_id for part in parts])
    ids = ids.masked_fill(firsts != best, NO_ID).amin(dim=0)
    seconds = torch.stack([part.top2 for part in parts])
    lses = torch.stack([part.lse for part in parts])
    return ProbeResult(
        top1_id=ids.masked_fill(ids == NO_ID, -1),
        top1=best,
        top2=torch.cat([firsts, seconds]).topk(2, dim=0).values[1],
        # A part whose scores are all -inf adds nothing.
        lse=torch.where(firsts == float("-inf"), firsts, lses).logsumexp(dim=0),
    )
