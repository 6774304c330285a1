"""A promise: what a policy's answers are right about, and when one is wrong."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from torch import Tensor

from vllm_adainfer.arrays import Floats
from vllm_adainfer.artifact.kinds import PROBABILITY_FEATURES, Risk
from vllm_adainfer.promise.links import SOFTMAX, Link
from vllm_adainfer.promise.probabilities import LabelProbabilities, answers_of, features_of


class Unit(Enum):
    """The unit that a bound counts."""

    ANSWER = "answers"
    QUERY = "queries"


@dataclass(frozen=True)
class Outcome:
    """The answers of some rows, early or at full depth.

    Attributes:
        best: int64 [rows], the answer: a token, or the place of a label.
        scores: [rows, labels], with which `Link` gives the labels' probabilities; -inf for a label
            that a row is not about. None where no promise reads them.
        labels: the probabilities themselves; None where no promise reads them.
        is_label: bool [rows], whether the best token of the whole vocabulary is a label; None where
            no promise reads it.

    """

    best: Tensor
    scores: Tensor | None = None
    labels: LabelProbabilities | None = None
    is_label: Tensor | None = None

    def of_rows(self, rows: Tensor | Sequence[int]) -> Outcome:
        """The outcome of some of the rows, int64."""
        labels = self.labels
        return Outcome(
            self.best[rows],
            None if self.scores is None else self.scores[rows],
            None if labels is None else labels.of_rows(rows),
            None if self.is_label is None else self.is_label[rows],
        )


class Promise(ABC):
    """What epsilon bounds: the one definition that fit, certify, serving and evaluation use.

    Attributes:
        risk: its name in artifacts.
        lost: what epsilon bounds, in two words.
        bounded: the same after a number of this `measure`; "{answers}" stands for these.
        measure: "%", or the points of a difference.
        broken: what shadow requests do where it is broken.
        unit: what counts once in the bound.
        feature_names: what the classifiers read.
        reads_probabilities: whether it is about probabilities, so that heads have one more row, for
            the log-odds of the label mass, and answers are logits of an exact distribution.
        reads_values: whether `wrong` compares the values of probabilities.
        best_may_change: whether an answer with another best label may be right.
        closes: whether changed answers in service are evidence against it.
        vocabulary: its size, where it shares what the label mass leaves; None where the labels are
            all there is.
        link: how scores become probabilities.
        right_about: what is right about probabilities that are served; "" if their values are.

    """

    risk: ClassVar[Risk]
    lost: ClassVar[str] = "wrong answers"
    bounded: ClassVar[str] = "of the answers wrong"
    measure: ClassVar[str] = "%"
    broken: ClassVar[str] = (
        "early answers of shadow requests differ from full depth or have a probability that moves "
        "too far"
    )
    unit: ClassVar[Unit] = Unit.ANSWER
    feature_names: ClassVar[tuple[str, ...]] = PROBABILITY_FEATURES
    reads_probabilities: ClassVar[bool] = True
    reads_values: ClassVar[bool] = False
    best_may_change: ClassVar[bool] = False
    closes: ClassVar[bool] = True
    vocabulary: int | None = None
    link: Link = SOFTMAX
    right_about: str = ""

    @property
    def covers_mass(self) -> bool:
        """Whether the label mass is promised, too."""
        return False

    @property
    def best_counts(self) -> bool:
        """Whether an answer with another best label is wrong."""
        return self.link.one_holds and not self.best_may_change

    def features(self, scores: Tensor) -> Tensor:
        """[rows, features], what the classifier reads of `scores`, see `Probe.label_scores`."""
        return features_of(scores, self.link)

    def answers(self, scores: Tensor) -> Tensor:
        """The answers of rows with a head's `scores`: fp32, as wide as these."""
        return answers_of(scores, self.vocabulary, self.link)

    @property
    def serves_best(self) -> bool:
        """Whether it covers requests for the best token or label alone."""
        return True

    def serves_probabilities(self, in_vocabulary: bool) -> bool:
        """Whether it covers requests for probabilities, among the labels or of all tokens."""
        return not in_vocabulary or self.vocabulary is not None

    def admits(self) -> dict[str, object]:
        """All of it by which requests are admitted, by what users call it."""
        return {"whether it bounds probabilities": self.reads_probabilities}

    @abstractmethod
    def wrong(self, early: Outcome, full: Outcome) -> Tensor:
        """bool [rows], whether early answers break the promise, given those of full depth."""

    def breaks(self, early: Floats, full: Floats) -> bool:
        """Whether the answers of one query break a promise about queries.

        Both are [documents], the scores that they have early and at full depth.
        """
        raise NotImplementedError

    def moves(self, early: Outcome, full: Outcome) -> Tensor | None:
        """fp32 [rows], the largest move of a probability; None where their values are not read."""
        return None

    def loss(
        self, early: Outcome, full: Outcome, right: Sequence[set[int]] | None = None
    ) -> Floats:
        """[rows], the loss whose mean is bounded; `right` are the right tokens of each row."""
        loss: Floats = self.wrong(early, full).double().numpy()
        return loss

    @abstractmethod
    def words(self) -> str:
        """Which answers are wrong, as a phrase."""
