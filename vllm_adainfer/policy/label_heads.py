"""Label heads that score all labels of a policy, of which each row may be about some alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_adainfer.artifact.config import Artifact
from vllm_adainfer.artifact.label_subsets import mask_of, restrict
from vllm_adainfer.policy.exit_policy import Asked, Decision
from vllm_adainfer.policy.reading import Reading, features_among
from vllm_adainfer.policy.score import score


@dataclass(frozen=True)
class LabelHead:
    """Scores the labels from a state; calibration and serving both use it.

    If it reads probabilities it has one row more, for the log-odds of the label mass (the labels'
    share of the whole vocabulary).

    Attributes:
        weight: fp32 [labels or labels + 1, hidden size].
        bias: fp32 [labels or labels + 1].
        token_ids: int64 [labels].

    """

    weight: Tensor
    bias: Tensor
    token_ids: Tensor

    @property
    def reads_mass(self) -> bool:
        """Whether the last score is for the label mass."""
        return len(self.bias) > len(self.token_ids)

    @property
    def fitted_tensors(self) -> dict[str, Tensor]:
        """What calibration has fitted, by the names that an artifact stores it under."""
        return {"head_weight": self.weight, "head_bias": self.bias}

    @property
    def bytes(self) -> int:
        """What the head stores."""
        return self.weight.nbytes + self.bias.nbytes

    def score(self, hidden: Tensor, subsets: Tensor | None = None) -> Tensor:
        """Scores fp32 [rows, labels or labels + 1] of states [rows, hidden size].

        `subsets`, bool [rows, labels], are the labels that each row is about, others get -inf; None
        for all.
        """
        return restrict(torch.addmm(self.bias, hidden.float(), self.weight.T), subsets)


class LabelHeads:
    """The heads, classifiers and thresholds of an artifact, one of each for an exit point."""

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        """Load the fitted tensors of `artifact` onto `device`."""
        config = artifact.config
        self.token_ids = torch.tensor(config.label_ids, device=device)
        self._columns = torch.arange(len(config.labels), device=device)
        self._pool = config.label_pool
        tensors = {name: tensor.float().to(device) for name, tensor in artifact.tensors.items()}
        self._thresholds = tensors["thresholds"].T.contiguous()  # [exit points, tags]
        self._classifiers = [tensors[f"exit.{layer}.classifier"] for layer in config.exit_points]
        self._heads = [
            LabelHead(
                tensors[f"exit.{layer}.head_weight"],
                tensors[f"exit.{layer}.head_bias"],
                self.token_ids,
            )
            for layer in config.exit_points
        ]

    def score(self, exit_index: int, asked: Asked) -> Tensor:
        """The scores of an exit point's head, see `LabelHead.score`."""
        subsets = None
        if self._pool:
            assert asked.subsets is not None
            subsets = mask_of(asked.subsets, self._columns)
        return self._heads[exit_index].score(asked.hidden, subsets)

    def decide(self, exit_index: int, asked: Asked, features: Tensor, answers: Tensor) -> Decision:
        """Decide by the `features` of the scores."""
        threshold = self._thresholds[exit_index][asked.tags]
        return Decision.by_score(
            features, self._classifiers[exit_index], threshold, asked.memory, answers
        )

    def read(self, exit_index: int, asked: Asked, features: Tensor, scores: Tensor) -> Reading:
        """What `decide` decides by; `features` are those of the `scores`."""
        labels = scores[:, : len(self.token_ids)]
        top_prob, gap = features_among(labels).unbind(dim=1)
        return Reading(
            tokens=self.token_ids[labels.argmax(dim=1)],
            top_prob=top_prob,
            gap=gap,
            odds=score(features, self._classifiers[exit_index], asked.memory),
            threshold=self._thresholds[exit_index][asked.tags],
        )
