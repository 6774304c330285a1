"""The policy of a label pool: a request names some of its labels, and only those compete."""

from __future__ import annotations

import torch
from typing_extensions import override

from vllm_adainfer.artifact.config import Artifact
from vllm_adainfer.policy.answers import LabelScores
from vllm_adainfer.policy.exit_policy import Decision, ExitPolicy, UndecidedRows
from vllm_adainfer.policy.label_heads import LabelHeads
from vllm_adainfer.policy.reading import ProbeView, features_among


class PoolPolicy(ExitPolicy):
    """Settles a row once the best of the labels that its request names is decided."""

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        """Load the fitted tensors of `artifact`, which has a label pool, onto `device`."""
        self.exit_points = artifact.config.exit_points
        self.num_threshold_rows = artifact.config.num_threshold_rows
        self._heads = LabelHeads(artifact, device)
        self.answer_ids = self._heads.token_ids

    @override
    def decide(self, exit_index: int, rows: UndecidedRows) -> Decision:
        scores = self._heads.score(exit_index, rows)
        answers = LabelScores(scores, self.answer_ids)
        return self._heads.decide(exit_index, rows, features_among(scores), answers)

    def view(self, exit_index: int, rows: UndecidedRows) -> ProbeView:
        """What `decide` bases its decision on."""
        scores = self._heads.score(exit_index, rows)
        return self._heads.view(exit_index, rows, features_among(scores), scores)
