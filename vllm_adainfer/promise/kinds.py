"""Which promise a policy makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vllm_adainfer.artifact.config_fields import ConfigFields
from vllm_adainfer.artifact.fields import Gate, Label, TopK
from vllm_adainfer.artifact.kinds import Risk, ScoreHead
from vllm_adainfer.promise.accuracy import Accuracy
from vllm_adainfer.promise.changed import Changed
from vllm_adainfer.promise.first_documents import FirstDocuments
from vllm_adainfer.promise.gates import Gates
from vllm_adainfer.promise.links import link_of
from vllm_adainfer.promise.promise import Promise
from vllm_adainfer.promise.tolerance import Tolerance


class Asked(Protocol):
    """What says which promise it is: the config of an artifact, or the options of `calibrate`."""

    @property
    def risk(self) -> Risk:
        """See `ArtifactConfig.risk`."""

    @property
    def tolerance(self) -> float | None:
        """See `ArtifactConfig.tolerance`."""

    @property
    def gates(self) -> tuple[Gate, ...]:
        """See `ArtifactConfig.gates`."""

    @property
    def top_k(self) -> TopK | None:
        """See `ArtifactConfig.top_k`."""


def promise_of(config: ConfigFields) -> Promise:
    """The promise of an artifact, or of one of its parts."""
    return asked_for(config, config.labels, config.score_head, config.label_mass, config.vocab_size)


def asked_for(
    asked: Asked,
    labels: Sequence[Label] = (),
    score_head: ScoreHead | None = None,
    label_mass: bool = False,
    vocabulary: int = 1,
) -> Promise:
    """The promise that is asked for.

    Args:
        asked: which one.
        labels: the labels of the policy.
        score_head: see `ArtifactConfig.score_head`.
        label_mass: see `ArtifactConfig.label_mass`.
        vocabulary: its size, which only answers in service depend on.

    """
    link = link_of(score_head)
    if asked.gates:
        return Gates(asked.gates, labels, link, vocabulary)
    if asked.top_k is not None:
        return FirstDocuments(asked.top_k)
    if asked.tolerance is not None:
        return Tolerance(asked.tolerance, link, vocabulary if label_mass else None)
    kind = Accuracy if asked.risk == "accuracy" else Changed
    return kind(is_classifier=score_head is not None)
