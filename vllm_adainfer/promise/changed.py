"""A promise about the best token or label: how often it is not full depth's."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from vllm_adainfer.artifact.kinds import FEATURES, Risk
from vllm_adainfer.promise.probabilities import features_among
from vllm_adainfer.promise.promise import Outcome, Promise


class Changed(Promise):
    """At most epsilon of the answers change."""

    risk: ClassVar[Risk] = "disagreement"
    lost: ClassVar[str] = "disagreement"
    bounded: ClassVar[str] = "of the {answers} changed"
    broken: ClassVar[str] = "early answers of shadow requests differ from full depth"
    feature_names = FEATURES
    reads_probabilities = False

    def __init__(self, is_classifier: bool = False) -> None:
        """`is_classifier`: answers are the scores of a classifier."""
        if is_classifier:
            self.right_about = "probabilities are right about which is largest, not in value"

    @override
    def features(self, scores: Tensor) -> Tensor:
        return features_among(scores)

    @override
    def answers(self, scores: Tensor) -> Tensor:
        return scores

    @override
    def serves_probabilities(self, in_vocabulary: bool) -> bool:
        return False

    @override
    def wrong(self, early: Outcome, full: Outcome) -> Tensor:
        return early.best != full.best

    @override
    def words(self) -> str:
        return "another answer than full depth's"
