"""The policy of a label pool: requests name any of its labels, and only those are compared."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.policy.artifact import Artifact
from vllm_adainfer.policy.exit_policy import Decision, ExitPolicy
from vllm_adainfer.policy.label_subsets import mask_of, only
from vllm_adainfer.policy.score import is_chain, score


class PoolPolicy(ExitPolicy):
    """Settles a row once the best of its own labels is decided.

    Answers are the scores of all labels of the pool, -inf for those that a row is not about.
    """

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        """Load the fitted tensors of `artifact`, which has a label pool, onto `device`."""
        config = artifact.config
        self.exit_points = config.exit_points
        self.num_tags = len(config.levels)
        self.restricted = True
        self.answer_ids = torch.tensor(config.label_ids, device=device)
        tensors = {name: tensor.float().to(device) for name, tensor in artifact.tensors.items()}
        self._thresholds = tensors["thresholds"].T.contiguous()  # [exit points, levels]
        self._exits = [
            tuple(tensors[f"exit.{layer}.{part}"] for part in ("head_weight", "head_bias"))
            for layer in self.exit_points
        ]
        self._classifiers = [tensors[f"exit.{layer}.classifier"] for layer in self.exit_points]

    @override
    def decide(
        self,
        exit_index: int,
        hidden: Tensor,
        tags: Tensor,
        memory: Tensor | None,
        subsets: Tensor | None = None,
    ) -> Decision:
        assert subsets is not None
        weight, bias = self._exits[exit_index]
        scores = torch.addmm(bias, hidden.float(), weight.T)
        scores = only(scores, mask_of(subsets, len(bias)))
        features, classifier = features_among(scores), self._classifiers[exit_index]
        odds = score(features, classifier, memory)
        return Decision(
            odds >= self._thresholds[exit_index][tags],
            scores,
            memory=odds if is_chain(classifier, features) else None,
        )


def features_among(scores: Tensor) -> Tensor:
    """``top_prob`` and ``gap`` among the labels with finite `scores` [rows, labels]: [rows, 2]."""
    first, second = scores.softmax(dim=1).topk(2).values.unbind(dim=1)
    return torch.stack([first, first - second], dim=1)
