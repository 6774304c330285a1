"""The tokens that a choice may begin with, by the label that each stands for.

A grammar of choices takes any token that is a byte prefix of one, in whatever tokenisation. What
such a token decides is the choice that it leaves; some leave several open.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact.outputs import AnyOutput, Choices


@dataclass(frozen=True)
class FirstTokens:
    """Groups of tokens, one for each label.

    Attributes:
        token_ids: int64 [tokens], of all groups, ascending.
        labels: int64 [tokens], the label (an index) that each stands for.
        num_labels: how many labels there are.
        undecided: the label of tokens that decide no choice, the last; None if there are none.

    """

    token_ids: Tensor
    labels: Tensor
    num_labels: int
    undecided: int | None

    @classmethod
    def of(cls, output: AnyOutput, device: torch.device | None = None) -> FirstTokens | None:
        """Those of choices, and those that decide none; None of another output."""
        if not isinstance(output, Choices):
            return None
        undecided, columns = output.undecided, output.columns
        pairs = sorted((token, place) for place, (_, own) in enumerate(columns) for token in own)
        token_ids, labels = torch.tensor(pairs, device=device).unbind(dim=1)
        return cls(token_ids, labels, len(columns), len(columns) - 1 if undecided else None)

    def decided_by(self, scores: Tensor) -> Tensor:
        """int64 [rows], the label of the best token, by scores [rows, tokens].

        A tie goes to the lowest token, as in vLLM's sampler.
        """
        return self.labels[scores.argmax(dim=1)]

    def labels_of(self, tokens: Ints) -> Ints:
        """int64 [rows], the label that each of these first `tokens` stands for."""
        found: Ints = self.labels.numpy()[np.searchsorted(self.token_ids.numpy(), tokens)]
        return found

    def best(self, scores: Tensor) -> Tensor:
        """[rows, labels], the best of the scores [rows, tokens] of each label's tokens."""
        found = scores.new_full((scores.shape[0], self.num_labels), -torch.inf)
        return found.scatter_reduce(1, self.labels.expand(scores.shape), scores, "amax")
