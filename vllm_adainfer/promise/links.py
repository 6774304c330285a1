"""How scores become probabilities: of the one label that holds, or of each label by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import softplus
from typing_extensions import override


class Link(ABC):
    """Turns scores [rows, labels] into probabilities and back.

    Attributes:
        one_holds: whether one label holds, so that the best one is an answer.

    """

    one_holds: bool

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


SOFTMAX, SIGMOIDS = Softmax(), Sigmoids()
