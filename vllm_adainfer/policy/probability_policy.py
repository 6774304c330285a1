"""The policy that promises probabilities: label heads, log-odds, a threshold at each exit point."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.policy.artifact import Artifact
from vllm_adainfer.policy.exit_policy import Decision, ExitPolicy
from vllm_adainfer.policy.label_subsets import mask_of, only
from vllm_adainfer.policy.probabilities import (
    ProbabilityHead,
    answers_of,
    features_of,
    probabilities_of_answers,
    probabilities_of_logits,
)
from vllm_adainfer.policy.score import is_chain, score


class ProbabilityPolicy(ExitPolicy):
    """Settles a row once its labels' probabilities will hardly move any more.

    Answers are logits, and have one column more than there are labels: that of every other token.
    """

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        """Load the fitted tensors of `artifact`, whose risk is of probabilities, onto `device`."""
        config = artifact.config
        assert config.tolerance is not None
        self.exit_points = config.exit_points
        self.num_tags = len(config.levels)
        self.restricted = True  # answers are for those who leave, never for full depth
        self.answer_ids = torch.tensor(config.label_ids, device=device)
        self.tolerance = config.tolerance
        self._with_mass = config.label_mass
        self._vocabulary = config.vocab_size if config.label_mass else None
        self._pool = config.label_pool
        tensors = {name: tensor.float().to(device) for name, tensor in artifact.tensors.items()}
        self._thresholds = tensors["thresholds"].T.contiguous()  # [exit points, levels]
        self._exits = [
            (
                ProbabilityHead(
                    tensors[f"exit.{layer}.head_weight"],
                    tensors[f"exit.{layer}.head_bias"],
                    self.answer_ids,
                ),
                tensors[f"exit.{layer}.classifier"],
            )
            for layer in self.exit_points
        ]

    @override
    def decide(
        self,
        exit_index: int,
        hidden: Tensor,
        tags: Tensor,
        memory: Tensor | None,
        subsets: Tensor | None = None,
    ) -> Decision:
        head, classifier = self._exits[exit_index]
        scores = head.score(hidden)
        if self._pool:
            assert subsets is not None
            scores = only(scores, mask_of(subsets, len(head.token_ids)))
        features = features_of(scores)
        odds = score(features, classifier, memory)
        return Decision(
            odds >= self._thresholds[exit_index][tags],
            answers_of(scores, self._vocabulary),
            memory=odds if is_chain(classifier, features) else None,
        )

    def compare(self, answers: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Compare early answers with full depth.

        Args:
            answers: [rows, labels + 1], from `decide`.
            logits: [rows, vocabulary] at full depth.

        Returns:
            whether each answer is wrong, bool [rows], and its largest move, fp32 [rows].

        """
        assert self.answer_ids is not None
        subsets = answers[:, :-1].isfinite() if self._pool else None
        early = probabilities_of_answers(answers, self._vocabulary)
        full = probabilities_of_logits(logits, self.answer_ids, subsets)
        moved = early.largest_move(full, self._with_mass)
        # In ascending order, so that a tie goes to the token that the sampler takes, too.
        order = self.answer_ids.argsort()
        labels = only(logits[:, self.answer_ids], subsets)[:, order]
        differs = answers[:, order].argmax(dim=1) != labels.argmax(dim=1)
        if self._with_mass:  # any token may be the answer
            differs |= labels.amax(dim=1) < logits.amax(dim=1)
        return differs | ~(moved <= self.tolerance), moved
