"""The policy that promises probabilities: label heads, log-odds, a threshold at each exit point."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.artifact.config import Artifact
from vllm_adainfer.artifact.label_subsets import restrict
from vllm_adainfer.policy.answers import Answers, LabelLogits
from vllm_adainfer.policy.exit_policy import Decision, Disagreement, ExitPolicy, UndecidedRows
from vllm_adainfer.policy.label_heads import LabelHeads
from vllm_adainfer.policy.probabilities import (
    answers_of,
    features_of,
    probabilities_of_answers,
    probabilities_of_logits,
)
from vllm_adainfer.policy.reading import ProbeView


class ProbabilityPolicy(ExitPolicy):
    """Settles a row once the probabilities of its labels will hardly move any more."""

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        """Load the fitted tensors of `artifact`, whose risk is `probability`, onto `device`."""
        config = artifact.config
        assert config.tolerance is not None
        self.exit_points = config.exit_points
        self.num_threshold_rows = config.num_threshold_rows
        self.tolerance = config.tolerance
        self._with_mass = config.label_mass
        self._vocabulary = config.vocab_size if config.label_mass else None
        self._pool = config.label_pool
        self._heads = LabelHeads(artifact, device)
        self.answer_ids = self._heads.token_ids

    @override
    def decide(self, exit_index: int, rows: UndecidedRows) -> Decision:
        scores = self._heads.score(exit_index, rows)
        answers = LabelLogits(answers_of(scores, self._vocabulary), self.answer_ids)
        return self._heads.decide(exit_index, rows, features_of(scores), answers)

    def view(self, exit_index: int, rows: UndecidedRows) -> ProbeView:
        """What `decide` bases its decision on."""
        scores = self._heads.score(exit_index, rows)
        return self._heads.view(exit_index, rows, features_of(scores), scores)

    @override
    def disagrees(
        self, answers: Answers, logits: Tensor, head: Callable[[Tensor], Tensor]
    ) -> Disagreement:
        """An answer is wrong, too, if a probability moves further than the tolerance."""
        assert isinstance(answers, LabelLogits)
        subsets = answers.scores.isfinite() if self._pool else None
        early = probabilities_of_answers(answers.values, self._vocabulary)
        full = probabilities_of_logits(logits, self.answer_ids, subsets)
        moved = early.largest_move(full, self._with_mass)
        differs = answers.disagree(logits, head)
        if self._with_mass:  # any token may be the answer
            labels = restrict(logits[:, self.answer_ids], subsets)
            differs |= labels.amax(dim=1) < logits.amax(dim=1)
        return Disagreement(differs | ~(moved <= self.tolerance), moved)
