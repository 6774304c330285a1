"""The answers of an exit point: states for the LM head, or scores of some tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Answers:
    """Answers of some rows; one policy always gives the same kind.

    Attributes:
        values: [rows, width]: states for the LM head, by which any token may be the answer, or
            fp32 scores of some tokens. A label that the request does not name scores -inf.
        token_ids: int64 [tokens], the token of each column of scores; None for states.
        of_labels: whether these are the only tokens that the request may produce at any depth; of
            a shortlist, full depth may answer with another one.
        has_rest: whether the scores are logits, and one more column is the logit of every token
            that is none of the labels.

    """

    values: Tensor
    token_ids: Tensor | None = None
    of_labels: bool = False
    has_rest: bool = False

    @property
    def scores(self) -> Tensor:
        """The scores of `token_ids`, fp32 [rows, tokens]."""
        return self.values[:, :-1] if self.has_rest else self.values

    @property
    def rest(self) -> Tensor:
        """The logit of every token that is none of the labels, fp32 [rows, 1]."""
        return self.values[:, -1:]

    def subset(self, rows: Tensor) -> Answers:
        """The answers of int64 `rows`."""
        return replace(self, values=self.values[rows])

    def best(self, head: Callable[[Tensor], Tensor]) -> Tensor:
        """The best token of each row, int64 [rows].

        `head` is vLLM's own `compute_logits`, which reads answers that are states.
        """
        if self.token_ids is None:
            return head(self.values).argmax(dim=1)
        return best_token(self.scores, self.token_ids)

    def best_at_full_depth(self, logits: Tensor) -> Tensor:
        """The best token that each row may have at full depth; `logits` are [rows, vocabulary]."""
        if self.token_ids is None or not self.of_labels:
            return logits.argmax(dim=1)
        full = logits[:, self.token_ids].masked_fill(self.scores.isneginf(), -torch.inf)
        return best_token(full, self.token_ids)


def best_token(scores: Tensor, token_ids: Tensor) -> Tensor:
    """The best of `token_ids` by `scores` [rows, tokens], int64 [rows].

    A tie goes to the lowest id, as in vLLM's sampler.
    """
    ids, order = token_ids.sort()
    return ids[scores[:, order].argmax(dim=1)]
