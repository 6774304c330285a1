"""A promise: what a policy's answers are right about, and when one is wrong."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor

from vllm_adainfer.arrays import Floats, Ints
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.promise.links import SOFTMAX, Link
from vllm_adainfer.promise.probabilities import (
    PROBABILITY_FEATURES,
    LabelProbabilities,
    answers_of,
    features_of,
)
from vllm_adainfer.strict import Strict

T = TypeVar("T")


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


class Promise(Strict, ABC):
    """What epsilon bounds: the one definition that fit, certify, serving and evaluation use.

    Its fields are its data, as an artifact keeps them.

    Attributes:
        kind: its name in artifacts.
        lost: what epsilon bounds, in two words.
        measured: the share in an evaluation's report that epsilon bounds.
        bounded: the same after a number of this `measure`; "{answers}" stands for these.
        measure: "%", or the points of a difference.
        broken: what shadow requests do where it is broken.
        unit: what counts once in the bound.
        reads_right: whether its loss, from -1 to 1, needs the right answers.
        feature_names: what the classifiers read.
        reads_probabilities: whether it is about probabilities, so that heads have one more row, for
            the log-odds of the label mass, and answers are logits of an exact distribution.
        reads_values: whether `wrong` compares the values of probabilities.
        best_may_change: whether an answer with another best label may be right.
        section: the part of an evaluation's report about it; "" for none.
        beyond: which answers break it, after their share in a report, with the report's values.
        answers_stand: whether what is settled must be answered early even by a request that stays.
            Who leaves depends on a server's load: on whether a smaller batch pays, and on prefixes
            that others need whole. A changed answer that full depth gives after all is no loss, so
            most promises hold whoever stays.
        closes: whether changed answers in service are evidence against it.
        right_about: what is right about probabilities that are served; "" if their values are.
        bounds: what it bounds, in the words of an error.
        option: the option of `calibrate` that asks for it; "" for the one that needs none.

    """

    kind: str = ""
    lost: ClassVar[str] = "wrong answers"
    measured: ClassVar[str] = "wrong"
    bounded: ClassVar[str] = "of the answers wrong"
    measure: ClassVar[str] = "%"
    broken: ClassVar[str] = (
        "early answers of shadow requests differ from full depth or have a probability that moves "
        "too far"
    )
    unit: ClassVar[Unit] = Unit.ANSWER
    reads_right: ClassVar[bool] = False
    feature_names: ClassVar[tuple[str, ...]] = PROBABILITY_FEATURES
    reads_probabilities: ClassVar[bool] = True
    reads_values: ClassVar[bool] = False
    best_may_change: ClassVar[bool] = False
    section: ClassVar[str] = ""
    beyond: ClassVar[str] = "wrong"
    answers_stand: ClassVar[bool] = False
    closes: ClassVar[bool] = True
    right_about: ClassVar[str] = ""
    bounds: ClassVar[str] = ""
    option: ClassVar[str] = ""
    _labels: tuple[str, ...] = ()
    _link: Link = SOFTMAX
    _vocabulary: int = 1

    def about(self, labels: Sequence[str], link: Link = SOFTMAX, vocabulary: int = 1) -> Self:
        """The same promise about a policy's `labels`, whose scores become probabilities by `link`.

        `vocabulary` is its size, which only answers in service depend on.
        """
        promise = self.model_copy()
        promise._labels, promise._link, promise._vocabulary = tuple(labels), link, vocabulary
        return promise

    @classmethod
    def asked(cls, value: Any) -> Self:
        """The promise that is asked for with the `value` of its option.

        An AdaInferError if the value has another form.
        """
        return cls()

    @property
    def link(self) -> Link:
        """How scores become probabilities."""
        return self._link

    @property
    def vocabulary(self) -> int | None:
        """Its size, where it shares what the label mass leaves; None where labels are all."""
        return self._vocabulary if self.covers_mass else None

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

    @property
    def named(self) -> tuple[str, ...]:
        """The labels that it names."""
        return ()

    @property
    def about_each(self) -> bool:
        """Whether it is about each label by itself, so that any number of them may hold."""
        return False

    def check_groups(self, groups: Ints, data: str) -> None:
        """Check that there are groups it can be broken in; `groups` [prompts] number them.

        An AdaInferError if there are none.
        """

    def with_mass(self) -> Promise | None:
        """The same with the label mass; None if it never covers that."""
        return None

    def moves(self, early: Outcome, full: Outcome) -> Tensor | None:
        """fp32 [rows], the largest move of a probability; None where their values are not read."""
        return None

    def compared(self, early: Outcome, full: Outcome) -> dict[str, Tensor]:
        """What an evaluation reports the share of, each bool [rows]."""
        return {"wrong": self.wrong(early, full)}

    @property
    def parts(self) -> tuple[Promise, ...]:
        """Promises of this kind that are reported one by one beside all of them."""
        return ()

    def reported(self) -> dict[str, Any]:
        """What a report says of a part."""
        return self.model_dump(exclude={"kind"})

    def probabilities(self, outcome: Outcome) -> list[float]:
        """[rows], the probability that a part is about."""
        raise NotImplementedError

    def loss(
        self, early: Outcome, full: Outcome, right: Sequence[set[int]] | None = None
    ) -> Floats:
        """[rows], the loss whose mean is bounded; `right` are the right tokens of each row."""
        loss: Floats = self.wrong(early, full).double().numpy()
        return loss

    @abstractmethod
    def words(self) -> str:
        """Which answers are wrong, as a phrase."""


def labelled(
    option: str, asked: Sequence[str], make: Callable[[str, float], T], must_be: str
) -> tuple[T, ...]:
    """Each LABEL:NUMBER of an option, as `make` builds it.

    An AdaInferError if one has another form, or its number is out of range.
    """
    found = []
    for text in asked:
        label, _, number = text.rpartition(":")
        try:
            found.append(make(label, float(number)))
        except ValueError:
            raise AdaInferError(f"{option} {text!r:.80} must be {must_be}") from None
    return tuple(found)
