"""The policy of choices: a label for each text, decided by the first token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.policy.answers import Answers
from vllm_adainfer.policy.calibrated_policy import CalibratedPolicy
from vllm_adainfer.policy.first_tokens import FirstTokens


class ChoicePolicy(CalibratedPolicy):
    """Settles a row once its token decides the choice: one that several choices share does not.

    Answers are scores of one token per label, which the request's grammar allows.
    """

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        """Load the fitted tensors of `artifact`, which has choices, onto `device`."""
        super().__init__(artifact, None, device)
        config = artifact.config
        self._first_tokens = FirstTokens.of(config.choices, config.undecided, device)

    @override
    def disagrees(
        self, answers: Answers, logits: Tensor, head: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, None]:
        """Compare choices; `logits` are those before the request's grammar masks them."""
        return answers.values.argmax(dim=1) != self.best_labels(logits, None), None

    @override
    def best_labels(self, logits: Tensor, subsets: Tensor | None) -> Tensor:
        return self._first_tokens.decided_by(logits[:, self._first_tokens.token_ids])
