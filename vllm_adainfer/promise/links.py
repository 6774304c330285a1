"""How scores become probabilities: of the one label that holds, or of each label by itself.

An object of decisions has several fields, and one label of each holds. Its answer is a number, the
`code` of the labels that do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import softplus
from typing_extensions import override

from vllm_adainfer.arrays import Ints

AnyCodes = TypeVar("AnyCodes", int, Ints)


class Link(ABC):
    """Turns scores [rows, labels] into probabilities and back.

    Attributes:
        one_holds: whether one label holds, so that the best one is an answer.

    """

    one_holds: ClassVar[bool]

    @abstractmethod
    def probabilities(self, scores: Tensor) -> Tensor:
        """[rows, labels], the probability of each label."""

    @abstractmethod
    def log_odds(self, scores: Tensor, columns: Tensor) -> Tensor:
        """[rows], that the label in the column of each row holds, int64 [rows, 1]."""

    @abstractmethod
    def scores_of(self, probabilities: Tensor) -> Tensor:
        """Scores with these probabilities, [rows, labels]."""

    @abstractmethod
    def cross_entropy(self, scores: Tensor, probabilities: Tensor) -> Tensor:
        """The sum over all rows, whose gradient by the scores is their error."""

    @abstractmethod
    def normalised(self, scores: Tensor) -> Tensor:
        """Scores with the same probabilities, which full depth's would be: [rows, labels]."""

    @abstractmethod
    def top_logit_and_gap(self, scores: Tensor) -> Tensor:
        """[rows, 2], the log-odds of the answer, and the lead of its probability."""

    def top_prob_and_gap(self, scores: Tensor) -> Tensor:
        """[rows, 2], the probability of the answer, and its lead over the second."""
        first, second = self.probabilities(scores).topk(2).values.unbind(dim=1)
        return torch.stack([first, first - second], dim=1)

    def lead(self, scores: Tensor) -> Tensor:
        """[rows], how far the score of the answer is above the second."""
        first, second = scores.topk(2).values.unbind(dim=1)
        return first - second

    def best(self, scores: Tensor) -> Tensor:
        """int64 [rows], the answer: the column of the best label."""
        return scores.argmax(dim=1)

    def may_be_best(self, scores: Tensor) -> Tensor:
        """bool [rows, labels], whether a label is the best one, or ties with it."""
        return scores >= scores.amax(dim=1, keepdim=True)


class Softmax(Link):
    """One of the labels holds. A label that a row is not about scores -inf."""

    one_holds = True

    @override
    def probabilities(self, scores: Tensor) -> Tensor:
        return scores.softmax(dim=1)

    @override
    def log_odds(self, scores: Tensor, columns: Tensor) -> Tensor:
        others = scores.scatter(1, columns, -torch.inf).logsumexp(dim=1)
        return scores.gather(1, columns).squeeze(1) - others

    @override
    def scores_of(self, probabilities: Tensor) -> Tensor:
        return probabilities.log()

    @override
    def cross_entropy(self, scores: Tensor, probabilities: Tensor) -> Tensor:
        logprobs = scores.log_softmax(1)
        return -(probabilities * logprobs.masked_fill(logprobs.isneginf(), 0)).sum()

    @override
    def normalised(self, scores: Tensor) -> Tensor:
        return scores.log_softmax(dim=1)

    @override
    def top_logit_and_gap(self, scores: Tensor) -> Tensor:
        best = scores.topk(2)
        first, second = best.values.unbind(dim=1)
        rest = scores.scatter(1, best.indices[:, :1], -torch.inf).logsumexp(dim=1)
        total = torch.logaddexp(first, rest)
        return torch.stack([first - rest, (first - total).exp() - (second - total).exp()], dim=1)


class Sigmoids(Link):
    """Any number of labels hold."""

    one_holds = False

    @override
    def probabilities(self, scores: Tensor) -> Tensor:
        return scores.sigmoid()

    @override
    def log_odds(self, scores: Tensor, columns: Tensor) -> Tensor:
        return scores.gather(1, columns).squeeze(1)

    @override
    def scores_of(self, probabilities: Tensor) -> Tensor:
        return probabilities.logit()

    @override
    def cross_entropy(self, scores: Tensor, probabilities: Tensor) -> Tensor:
        return (softplus(scores) - probabilities * scores).sum()

    @override
    def normalised(self, scores: Tensor) -> Tensor:
        return scores

    @override
    def top_logit_and_gap(self, scores: Tensor) -> Tensor:
        """Those of the label that is least sure: whether it holds, or does not."""
        least = scores.abs().amin(dim=1)
        return torch.stack([least, (least / 2).tanh()], dim=1)


@dataclass(frozen=True)
class ByField(Link):
    """One label of each field holds; those of a field are adjacent.

    Attributes:
        sizes: how many labels each field has, at least one.

    """

    sizes: tuple[int, ...]
    one_holds = True

    def fields(self, scores: Tensor) -> tuple[Tensor, ...]:
        """The columns of each field, [rows, its labels]."""
        return scores.split_with_sizes(self.sizes, dim=1)

    @override
    def probabilities(self, scores: Tensor) -> Tensor:
        return torch.cat([one.softmax(dim=1) for one in self.fields(scores)], dim=1)

    @override
    def log_odds(self, scores: Tensor, columns: Tensor) -> Tensor:
        fields = torch.repeat_interleave(
            torch.arange(len(self.sizes)), torch.tensor(self.sizes)
        ).to(columns.device)
        of_others = scores.masked_fill(fields != fields[columns], -torch.inf)
        others = of_others.scatter(1, columns, -torch.inf).logsumexp(dim=1)
        return scores.gather(1, columns).squeeze(1) - others

    @override
    def scores_of(self, probabilities: Tensor) -> Tensor:
        return probabilities.log()

    @override
    def cross_entropy(self, scores: Tensor, probabilities: Tensor) -> Tensor:
        parts = zip(self.fields(scores), self.fields(probabilities), strict=True)
        return torch.stack([SOFTMAX.cross_entropy(*part) for part in parts]).sum()

    @override
    def normalised(self, scores: Tensor) -> Tensor:
        return torch.cat([one.log_softmax(dim=1) for one in self.fields(scores)], dim=1)

    @override
    def top_logit_and_gap(self, scores: Tensor) -> Tensor:
        """Those of the field that is least sure."""
        return self._of_fields(scores, SOFTMAX.top_logit_and_gap).amin(dim=0)

    @override
    def best(self, scores: Tensor) -> Tensor:
        return self.code(torch.stack([one.argmax(dim=1) for one in self.fields(scores)], dim=1))

    @override
    def top_prob_and_gap(self, scores: Tensor) -> Tensor:
        """The probability of the object, if its fields are independent, and the least lead."""
        top_probs, gaps = self._of_fields(scores, SOFTMAX.top_prob_and_gap).unbind(dim=2)
        return torch.stack([top_probs.prod(dim=0), gaps.amin(dim=0)], dim=1)

    def _of_fields(self, scores: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
        """[fields, rows, 2], what is read of each field; of those with one label there is none."""
        return torch.stack([read(one) for one in self.fields(scores) if one.shape[1] > 1])

    @override
    def lead(self, scores: Tensor) -> Tensor:
        """That of the field with the least."""
        return self._of_fields(scores, SOFTMAX.lead).amin(dim=0)

    @override
    def may_be_best(self, scores: Tensor) -> Tensor:
        return torch.cat([SOFTMAX.may_be_best(one) for one in self.fields(scores)], dim=1)

    def least_sure(self, scores: Tensor) -> Tensor:
        """int64 [rows], the field whose answer has the least lead in probability."""
        return torch.stack(
            [
                SOFTMAX.top_prob_and_gap(one)[:, 1] if one.shape[1] > 1 else one.new_ones(len(one))
                for one in self.fields(scores)
            ]
        ).argmin(dim=0)

    def code(self, places: Tensor) -> Tensor:
        """int64 [rows], the answer with so many-th label of each field, [rows, fields]."""
        return reduce(
            lambda code, field: code * field[1] + field[0],
            zip(places.unbind(dim=1), self.sizes, strict=True),
            torch.zeros_like(places[:, 0]),
        )

    def code_of(self, places: Sequence[int]) -> int:
        """`code` of one answer."""
        return reduce(
            lambda code, field: code * field[1] + field[0],
            zip(places, self.sizes, strict=True),
            0,
        )

    def places(self, code: int) -> tuple[int, ...]:
        """Which label of each field the answer with this code has."""
        return tuple(int(self.place_in(field, code)) for field in range(len(self.sizes)))

    def place_in(self, field: int, codes: AnyCodes) -> AnyCodes:
        """Which label of a field the answers with these codes have."""
        return codes // prod(self.sizes[field + 1 :]) % self.sizes[field]

    def label_beside(self, column: int, code: int) -> int:
        """Which label the answer with this code has in the field of a label, both as columns."""
        first = 0
        for field, size in enumerate(self.sizes):
            if column < first + size:
                return first + int(self.place_in(field, code))
            first += size
        raise IndexError(column)


SOFTMAX, SIGMOIDS = Softmax(), Sigmoids()
