"""The policy of choices: a label for each text, decided by the first token."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.artifact.config import Artifact
from vllm_adainfer.policy.exit_policy import Asked, CalibratedPolicy, Decision
from vllm_adainfer.policy.first_tokens import FirstTokens


class ChoicePolicy(CalibratedPolicy):
    """Settles a row once the choice is decided; where its token would decide none, it never does.

    Answers are the scores of one token for each label, which the request's grammar takes.
    """

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        """Load the fitted tensors of `artifact`, which has choices, onto `device`."""
        super().__init__(artifact, None, device)
        config = artifact.config
        self._first_tokens = FirstTokens.of(config.choices, config.undecided, device)

    @override
    def decide(self, exit_index: int, asked: Asked) -> Decision:
        decision = super().decide(exit_index, asked)
        undecided = self._first_tokens.undecided
        if undecided is None:
            return decision
        assert decision.answers is not None
        decides = decision.answers.argmax(dim=1) != undecided
        return replace(decision, settled=decision.settled & decides)

    def differs(self, answers: Tensor, logits: Tensor) -> Tensor:
        """bool [rows], whether the choice of early `answers` is not that of full depth.

        Args:
            answers: [rows, labels], from `decide`.
            logits: [rows, vocabulary] at full depth, before the request's grammar masks them.

        """
        full = self._first_tokens.decided_by(logits[:, self._first_tokens.token_ids])
        return answers.argmax(dim=1) != full
