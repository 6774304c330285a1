"""The policy of a label pool: requests name any of its labels, and only those are compared."""

from __future__ import annotations

import torch
from typing_extensions import override

from vllm_adainfer.artifact.config import Artifact
from vllm_adainfer.policy.exit_policy import Asked, Decision, ExitPolicy
from vllm_adainfer.policy.label_heads import LabelHeads
from vllm_adainfer.policy.reading import Reading, features_among


class PoolPolicy(ExitPolicy):
    """Settles a row once the best of its own labels is decided.

    Answers are the scores of all labels of the pool, -inf for those that a row is not about.
    """

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        """Load the fitted tensors of `artifact`, which has a label pool, onto `device`."""
        self.exit_points = artifact.config.exit_points
        self.num_tags = artifact.config.num_threshold_rows
        self.restricted = True
        self._heads = LabelHeads(artifact, device)
        self.answer_ids = self._heads.token_ids

    @override
    def decide(self, exit_index: int, asked: Asked) -> Decision:
        scores = self._heads.score(exit_index, asked)
        return self._heads.decide(exit_index, asked, features_among(scores), scores)

    def read(self, exit_index: int, asked: Asked) -> Reading:
        """What `decide` decides by."""
        scores = self._heads.score(exit_index, asked)
        return self._heads.read(exit_index, asked, features_among(scores), scores)
