"""Label heads: they score all labels of a policy; a request may name only some of them."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.label_subsets import mask_of, restrict
from vllm_adainfer.policy.answers import Answers, LabelScores
from vllm_adainfer.policy.artifact_policy import (
    TRAINED,
    ArtifactPolicy,
    Trained,
    branches_among,
    scores_of,
    trained_probe,
)
from vllm_adainfer.policy.exit_policy import Decision, UndecidedRows
from vllm_adainfer.policy.links import link_of
from vllm_adainfer.policy.probe import LabelHead
from vllm_adainfer.policy.reading import ProbeView, features_among
from vllm_adainfer.policy.score import score


class LabelHeadPolicy(ArtifactPolicy):
    """Decides by a label head, a classifier and a threshold at each exit point of an artifact.

    Attributes:
        answer_ids: int64 [labels], the tokens of the labels.

    """

    answer_ids: Tensor

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        """Load the fitted tensors of `artifact` onto `device`."""
        config = artifact.config
        tensors = {name: tensor.float().to(device) for name, tensor in artifact.tensors.items()}
        super().__init__(config, tensors)
        self.answer_ids = torch.tensor(config.label_ids, device=device)
        self._columns = torch.arange(len(config.labels), device=device)
        self._pool = config.label_pool
        self._link = link_of(config.score_head)
        self._probes: list[LabelHead | Trained] = []
        for layer, read in zip(self.exit_points, self.probe_inputs, strict=True):
            weight, bias = tensors[f"exit.{layer}.head_weight"], tensors[f"exit.{layer}.head_bias"]
            head = LabelHead(weight, bias, self.answer_ids)
            trained = read in TRAINED
            self._probes.append(trained_probe(artifact, layer, head, device) if trained else head)
        self.branches = branches_among(self._probes)

    @abstractmethod
    def _features(self, scores: Tensor) -> Tensor:
        """What the classifier reads of a head's `scores`, fp32 [rows, features]."""

    @abstractmethod
    def _answers(self, scores: Tensor) -> Answers:
        """What rows with a head's `scores` are answered with."""

    @override
    def _decide(self, exit_index: int, rows: UndecidedRows) -> Decision:
        scores = self._score(exit_index, rows)
        return Decision.by_score(
            self._features(scores),
            self._classifiers[exit_index],
            self._thresholds[exit_index][rows.threshold_rows],
            rows.memory,
            self._answers(scores),
        )

    def view(self, exit_index: int, rows: UndecidedRows) -> ProbeView:
        """What `decide` bases its decision on."""
        scores = self._score(exit_index, rows)
        labels = scores[:, : len(self.answer_ids)]
        top_prob, gap = features_among(labels, self._link).unbind(dim=1)
        return ProbeView(
            tokens=self.answer_ids[labels.argmax(dim=1)],
            top_prob=top_prob,
            gap=gap,
            odds=score(self._features(scores), self._classifiers[exit_index], rows.memory),
            threshold=self._thresholds[exit_index][rows.threshold_rows],
        )

    @override
    def best_labels(self, logits: Tensor, subsets: Tensor | None) -> Tensor:
        return restrict(logits[:, self.answer_ids], self._named(subsets)).argmax(dim=1)

    def _named(self, subsets: Tensor | None) -> Tensor | None:
        """bool [rows, labels], the labels that each row names; None if all name all."""
        if not self._pool:
            return None
        assert subsets is not None
        return mask_of(subsets, self._columns)

    def _score(self, exit_index: int, rows: UndecidedRows) -> Tensor:
        """The scores of an exit point's probe, see `LabelHead.score`."""
        subsets = self._named(rows.subsets)
        probe = self._probes[exit_index]
        if isinstance(probe, LabelHead):
            return probe.score(rows.hidden, subsets)
        return scores_of(probe, rows, subsets)


class PoolPolicy(LabelHeadPolicy):
    """Settles a row once the best of the labels that its request names is decided.

    It serves a label pool: a request names some of its labels, and only those compete.
    """

    @override
    def _features(self, scores: Tensor) -> Tensor:
        return features_among(scores)

    @override
    def _answers(self, scores: Tensor) -> Answers:
        return LabelScores(scores, self.answer_ids)
