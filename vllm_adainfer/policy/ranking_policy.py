"""The policy that promises which documents of a query come first."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.policy.answers import Answers, LabelLogits
from vllm_adainfer.policy.label_heads import LabelHeadPolicy
from vllm_adainfer.policy.probabilities import answers_of, features_of

RELEVANT = 1  # the column of a reranker's "yes"


class RankingPolicy(LabelHeadPolicy):
    """Settles a document once its score will hardly move any more.

    How far it may move depends on the scores of the query's other documents, which no row knows.
    The thresholds are those that lose few documents in calibration.
    """

    @override
    def _features(self, scores: Tensor) -> Tensor:
        return features_of(scores)

    @override
    def _answers(self, scores: Tensor) -> Answers:
        return LabelLogits(answers_of(scores, None), self.answer_ids)

    def relevance(self, answers: Answers | None, settled: Tensor, logits: Tensor) -> Tensor:
        """fp32 [2, rows], the scores of documents, early and at full depth.

        Args:
            answers: those of the settled rows; None if no row is settled.
            settled: bool [rows]; the other rows have full depth's score both times.
            logits: [rows, vocabulary] at full depth.

        """
        full = logits[:, self.answer_ids].float().softmax(dim=1)[:, RELEVANT]
        early = full.clone()
        if answers is not None:
            assert isinstance(answers, LabelLogits)
            early[settled] = answers.scores.softmax(dim=1)[:, RELEVANT]
        return torch.stack([early, full])
