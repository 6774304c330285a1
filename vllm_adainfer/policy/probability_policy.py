"""The policy that promises probabilities: label heads, log-odds, a threshold at each exit point."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.artifact.config import Artifact
from vllm_adainfer.artifact.label_subsets import restrict
from vllm_adainfer.policy.exit_policy import Asked, Decision, ExitPolicy
from vllm_adainfer.policy.label_heads import LabelHeads
from vllm_adainfer.policy.probabilities import (
    answers_of,
    features_of,
    probabilities_of_answers,
    probabilities_of_logits,
)
from vllm_adainfer.policy.reading import Reading


class ProbabilityPolicy(ExitPolicy):
    """Settles a row once its labels' probabilities will hardly move any more.

    Answers are logits, and have one column more than there are labels: that of every other token.
    """

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        """Load the fitted tensors of `artifact`, whose risk is of probabilities, onto `device`."""
        config = artifact.config
        assert config.tolerance is not None
        self.exit_points = config.exit_points
        self.num_tags = config.num_threshold_rows
        self.restricted = True  # answers are for those who leave, never for full depth
        self.tolerance = config.tolerance
        self._with_mass = config.label_mass
        self._vocabulary = config.vocab_size if config.label_mass else None
        self._pool = config.label_pool
        self._heads = LabelHeads(artifact, device)
        self.answer_ids = self._heads.token_ids

    @override
    def decide(self, exit_index: int, asked: Asked) -> Decision:
        scores = self._heads.score(exit_index, asked)
        answers = answers_of(scores, self._vocabulary)
        return self._heads.decide(exit_index, asked, features_of(scores), answers)

    def read(self, exit_index: int, asked: Asked) -> Reading:
        """What `decide` decides by."""
        scores = self._heads.score(exit_index, asked)
        return self._heads.read(exit_index, asked, features_of(scores), scores)

    def compare(self, answers: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Compare early answers with full depth.

        Args:
            answers: [rows, labels + 1], from `decide`.
            logits: [rows, vocabulary] at full depth.

        Returns:
            whether each answer is wrong, bool [rows], and its largest move, fp32 [rows].

        """
        subsets = answers[:, :-1].isfinite() if self._pool else None
        early = probabilities_of_answers(answers, self._vocabulary)
        full = probabilities_of_logits(logits, self.answer_ids, subsets)
        moved = early.largest_move(full, self._with_mass)
        # In ascending order, so that a tie goes to the token that the sampler takes, too.
        order = self.answer_ids.argsort()
        labels = restrict(logits[:, self.answer_ids], subsets)[:, order]
        differs = answers[:, order].argmax(dim=1) != labels.argmax(dim=1)
        if self._with_mass:  # any token may be the answer
            differs |= labels.amax(dim=1) < logits.amax(dim=1)
        return differs | ~(moved <= self.tolerance), moved
