"""The policy that promises on which side of gates probabilities lie."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.label_subsets import restrict
from vllm_adainfer.policy.answers import Answers, LabelLogits
from vllm_adainfer.policy.gates import Gates
from vllm_adainfer.policy.label_heads import LabelHeadPolicy
from vllm_adainfer.policy.probabilities import answers_of


class GatePolicy(LabelHeadPolicy):
    """Settles a row once its probabilities will hardly cross a gate any more."""

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        """Load the fitted tensors of `artifact`, which has gates, onto `device`."""
        super().__init__(artifact, device)
        self._gates = Gates(artifact.config.gates, artifact.config.labels, self._link)
        self._vocabulary = artifact.config.vocab_size

    @override
    def _features(self, scores: Tensor) -> Tensor:
        return self._gates.features(scores[:, :-1])

    @override
    def _answers(self, scores: Tensor) -> Answers:
        return LabelLogits(answers_of(scores, self._vocabulary, self._link), self.answer_ids)

    @override
    def disagrees(
        self, answers: Answers, logits: Tensor, head: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, None]:
        """An answer is wrong where a probability is on the other side of a gate."""
        assert isinstance(answers, LabelLogits)
        subsets = answers.scores.isfinite() if self._pool else None
        full = restrict(logits[:, self.answer_ids].float(), subsets)
        return self._gates.wrong(answers.scores, full), None
