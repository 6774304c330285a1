"""The policy that promises probabilities: label heads, log-odds, a threshold at each exit point."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.label_subsets import restrict
from vllm_adainfer.policy.answers import Answers, LabelLogits
from vllm_adainfer.policy.label_heads import LabelHeadPolicy
from vllm_adainfer.policy.probabilities import (
    answers_of,
    features_of,
    probabilities_of_answers,
    probabilities_of_logits,
)


class ProbabilityPolicy(LabelHeadPolicy):
    """Settles a row once the probabilities of its labels will hardly move any more."""

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        """Load the fitted tensors of `artifact`, whose risk is `probability`, onto `device`."""
        super().__init__(artifact, device)
        config = artifact.config
        assert config.tolerance is not None
        self.tolerance = config.tolerance
        self._with_mass = config.label_mass
        self._vocabulary = config.vocab_size if config.label_mass else None

    @override
    def _features(self, scores: Tensor) -> Tensor:
        return features_of(scores, self._link)

    @override
    def _answers(self, scores: Tensor) -> Answers:
        return LabelLogits(answers_of(scores, self._vocabulary, self._link), self.answer_ids)

    @override
    def disagrees(
        self, answers: Answers, logits: Tensor, head: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """An answer is wrong, too, if a probability moves further than the tolerance."""
        assert isinstance(answers, LabelLogits)
        subsets = answers.scores.isfinite() if self._pool else None
        early = probabilities_of_answers(answers.values, self._vocabulary, self._link)
        full = probabilities_of_logits(logits, self.answer_ids, subsets, self._link)
        moved = early.largest_move(full, self._with_mass)
        too_far = ~(moved <= self.tolerance)
        if not self._link.one_holds:  # no label is the answer
            return too_far, moved
        differs = answers.disagree(logits, head)
        if self._with_mass:  # any token may be the answer
            labels = restrict(logits[:, self.answer_ids], subsets)
            differs |= labels.amax(dim=1) < logits.amax(dim=1)
        return differs | too_far, moved
