"""A promise about right answers: how many of full depth's are lost, less those that are gained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from typing_extensions import override

from vllm_adainfer.arrays import Floats, Ints
from vllm_adainfer.promise.changed import BestAnswer
from vllm_adainfer.promise.promise import Outcome

RightTokens = Sequence[set[int]]  # by prompt


class Accuracy(BestAnswer):
    """At most epsilon of accuracy is lost.

    Changed answers bound what is lost, and nobody knows the right ones in service. The mean of the
    loss holds there only if no answer that makes up for others is taken back.
    """

    kind: Literal["accuracy"] = "accuracy"
    lost: ClassVar[str] = "accuracy lost"
    measured: ClassVar[str] = "accuracy_lost"
    bounded: ClassVar[str] = "of accuracy lost"
    measure: ClassVar[str] = "points"
    reads_right: ClassVar[bool] = True
    # Early answers that are right where full depth is wrong make up for others: accuracy may fall
    # by more where just those stay.
    answers_stand: ClassVar[bool] = True
    closes: ClassVar[bool] = False
    bounds: ClassVar[str] = "the accuracy lost"
    option: ClassVar[str] = "--risk accuracy"

    @override
    def loss(self, early: Outcome, full: Outcome, right: RightTokens | None = None) -> Floats:
        """1 where full depth is right and the answer is not, -1 in the opposite case, else 0."""
        assert right is not None, "--risk accuracy needs the right answers"
        return is_right(full.best.numpy(), right) - is_right(early.best.numpy(), right)

    @override
    def words(self) -> str:
        return "a wrong answer where full depth's is right"


def is_right(tokens: Ints, right: RightTokens) -> Floats:
    """[rows], 1 where the token is one of the right ones of its row, else 0."""
    pairs = zip(tokens.tolist(), right, strict=True)
    return np.array([float(token in ones) for token, ones in pairs])
