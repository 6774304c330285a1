"""The answers of an exit point: states for the LM head, or scores of some tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override


@dataclass(frozen=True)
class Answers(ABC):
    """Answers of some rows; one policy always gives the same kind.

    Attributes:
        values: [rows, width], what a row is answered with; each kind says what it is.

    """

    values: Tensor

    def subset(self, rows: Tensor) -> Self:
        """The answers of int64 `rows`."""
        return replace(self, values=self.values[rows])

    @abstractmethod
    def best(self, head: Callable[[Tensor], Tensor]) -> Tensor:
        """The best token of each row, int64 [rows].

        `head` is vLLM's own `compute_logits`, which reads answers that are states.
        """

    def best_at_full_depth(self, logits: Tensor) -> Tensor:
        """The best token that each row may have at full depth; `logits` are [rows, vocabulary]."""
        return logits.argmax(dim=1)


@dataclass(frozen=True)
class EarlyStates(Answers):
    """States [rows, hidden size] for the LM head: any token may be the answer."""

    @override
    def best(self, head: Callable[[Tensor], Tensor]) -> Tensor:
        return head(self.values).argmax(dim=1)


@dataclass(frozen=True)
class EarlyScores(Answers):
    """The LM head's scores of some tokens, fp32 [rows, tokens].

    Attributes:
        token_ids: int64 [tokens], the token of each column.

    """

    token_ids: Tensor

    @property
    def scores(self) -> Tensor:
        """The scores of `token_ids`, fp32 [rows, tokens]."""
        return self.values

    @override
    def best(self, head: Callable[[Tensor], Tensor]) -> Tensor:
        return best_token(self.scores, self.token_ids)


@dataclass(frozen=True)
class ShortlistScores(EarlyScores):
    """Scores of a shortlist; at full depth any token may be the answer."""


@dataclass(frozen=True)
class LabelScores(EarlyScores):
    """Scores of labels, the only tokens that the request may produce at any depth.

    A label of the policy's pool that the request does not name scores -inf.
    """

    @override
    def best_at_full_depth(self, logits: Tensor) -> Tensor:
        full = logits[:, self.token_ids].masked_fill(self.scores.isneginf(), -torch.inf)
        return best_token(full, self.token_ids)


@dataclass(frozen=True)
class LabelLogits(LabelScores):
    """Logits of labels, and in one more column the logit of every other token."""

    @property
    @override
    def scores(self) -> Tensor:
        return self.values[:, :-1]

    @property
    def rest(self) -> Tensor:
        """The logit of every token that is none of the labels, fp32 [rows, 1]."""
        return self.values[:, -1:]


def best_token(scores: Tensor, token_ids: Tensor) -> Tensor:
    """The best of `token_ids` by `scores` [rows, tokens], int64 [rows].

    A tie goes to the lowest id, as in vLLM's sampler.
    """
    ids, order = token_ids.sort()
    return ids[scores[:, order].argmax(dim=1)]
