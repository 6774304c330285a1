"""A promise about the best token or label: how often it is not full depth's."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor
from typing_extensions import override

from vllm_adainfer.promise.probabilities import FEATURES, features_among
from vllm_adainfer.promise.promise import Outcome, Promise


class BestAnswer(Promise):
    """A promise about the best token or label alone."""

    broken: ClassVar[str] = "early answers of shadow requests differ from full depth"
    feature_names: ClassVar[tuple[str, ...]] = FEATURES
    reads_probabilities: ClassVar[bool] = False
    right_about: ClassVar[str] = "probabilities are right about which is largest, not in value"

    @override
    def features(self, scores: Tensor) -> Tensor:
        return features_among(scores, self.link)

    @override
    def answers(self, scores: Tensor) -> Tensor:
        return scores

    @override
    def serves_probabilities(self, in_vocabulary: bool) -> bool:
        return False

    @override
    def wrong(self, early: Outcome, full: Outcome) -> Tensor:
        return early.best != full.best


class Changed(BestAnswer):
    """At most epsilon of the answers change."""

    kind: Literal["changed"] = "changed"
    lost: ClassVar[str] = "disagreement"
    measured: ClassVar[str] = "disagreement"
    bounded: ClassVar[str] = "of the {answers} changed"

    @override
    def words(self) -> str:
        return "another answer than full depth's"
