"""The tokens that a choice may begin with, by the label that each stands for.

A grammar of choices takes any token that is a byte prefix of one, in whatever tokenisation. What
such a token decides is the choice that it leaves; some leave several open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FirstTokens:
    """Groups of tokens, one for each label.

    Attributes:
        token_ids: int64 [tokens], of all groups, ascending.
        columns: int64 [tokens], the label (an index) that each stands for.
        num_labels: how many labels there are.

    """

    token_ids: Tensor
    columns: Tensor
    num_labels: int

    @classmethod
    def of(cls, groups: Sequence[Sequence[int]], device: torch.device | None = None) -> FirstTokens:
        """The tokens of each label."""
        pairs = sorted((token, column) for column, group in enumerate(groups) for token in group)
        tokens, columns = torch.tensor(pairs, device=device).unbind(dim=1)
        return cls(tokens, columns, len(groups))

    def decided_by(self, scores: Tensor) -> Tensor:
        """int64 [rows], the label of the best token, by scores [rows, tokens].

        A tie goes to the lowest token, as in vLLM's sampler.
        """
        return self.columns[scores.argmax(dim=1)]

    def best(self, scores: Tensor) -> Tensor:
        """[rows, labels], the best of the scores [rows, tokens] of each label's tokens."""
        found = scores.new_full((scores.shape[0], self.num_labels), -torch.inf)
        columns = self.columns.expand(scores.shape)
        return found.scatter_reduce(1, columns, scores, "amax")
