"""The exit policy: probe -> features -> classifier score -> threshold, at each exit point."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from adainfer_kernels import Head
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.kinds import FEATURES
from vllm_adainfer.artifact.tensors import served_shape
from vllm_adainfer.policy.answers import (
    Answers,
    EarlyScores,
    EarlyStates,
    LabelScores,
    ShortlistScores,
)
from vllm_adainfer.policy.probe import Probe, lens_of
from vllm_adainfer.policy.reading import ProbeView
from vllm_adainfer.policy.score import is_chain, score

LINEAR_SHAPE = served_shape("svm", len(FEATURES))


@dataclass(frozen=True)
class Decision:
    """What a policy decides about some rows at an exit point.

    Attributes:
        settled: bool [rows], True where the answer is decided.
        answers: the answers of these rows, valid where they are settled.
        memory: [rows, ...], passed back to the policy with these rows at the next exit point;
            None if it needs none.

    """

    settled: Tensor
    answers: Answers
    memory: Tensor | None = None

    @classmethod
    def by_score(
        cls,
        features: Tensor,
        classifier: Tensor,
        threshold: Tensor,
        memory: Tensor | None,
        answers: Answers,
    ) -> Decision:
        """Settle the rows whose classifier score reaches their `threshold`, [rows]."""
        odds = score(features, classifier, memory)
        chained = is_chain(classifier, features)
        return cls(odds >= threshold, answers, memory=odds if chained else None)


@dataclass(frozen=True)
class UndecidedRows:
    """Rows at an exit point for a policy to decide.

    Attributes:
        hidden: [rows, hidden size], the residual stream; for a pooled policy fp32 [rows, 2 x hidden
            size], the normed state of the last token and the mean of those of the prompt.
        threshold_rows: int64 [rows], the row of the policy's thresholds that applies to each.
        memory: `Decision.memory` of these rows from the previous exit point; None at the first.
        subsets: int64 [rows], the labels that each row's request names, as bits; None if no policy
            of the engine has a label pool. Policies without one ignore it.

    """

    hidden: Tensor
    threshold_rows: Tensor
    memory: Tensor | None = None
    subsets: Tensor | None = None


class ExitPolicy(ABC):
    """What the exit loop needs from a policy.

    Attributes:
        exit_points: layers after which the exit loop calls `decide`, ascending.
        num_threshold_rows: the number of threshold rows: one per level, or per level and question.
        is_pooled: whether it reads the whole prompt, not the state of its last token alone.

    """

    exit_points: tuple[int, ...]
    num_threshold_rows: int
    is_pooled: bool = False

    @abstractmethod
    def decide(self, exit_index: int, rows: UndecidedRows) -> Decision:
        """Decide which rows are settled at exit point ``exit_points[exit_index]``."""

    def disagrees(
        self, answers: Answers, logits: Tensor, head: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Compare early answers with full depth; arguments as for `Answers.disagree`.

        Returns:
            whether each answer is wrong, bool [rows], and the largest move of a probability, fp32
            [rows]; None where the policy promises no probabilities.

        """
        return answers.disagree(logits, head), None


class CalibratedPolicy(ExitPolicy):
    """The policy of an artifact: probe, classifier and threshold at each exit point."""

    def __init__(self, artifact: Artifact, logit_lens: Probe | None, device: torch.device) -> None:
        """Load the fitted tensors of `artifact` onto `device`.

        `logit_lens` is the served model's; None for label heads, which need none.
        """
        config, tensors = artifact.config, artifact.tensors
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        self.exit_points = config.exit_points
        self.num_threshold_rows = config.num_threshold_rows
        self.is_pooled = config.is_pooled
        self.answer_ids = tensors.get("shortlist")
        self._scores: type[EarlyScores] = ShortlistScores
        if config.candidates == "labels":
            self.answer_ids = torch.tensor(config.label_ids, device=device)
            self._scores = LabelScores
        self._thresholds = tensors["thresholds"].T.contiguous()  # [exit points, threshold rows]
        self._classifiers = [tensors[f"exit.{layer}.classifier"] for layer in self.exit_points]
        if logit_lens is not None and "head_rows" in tensors:
            head = Head(tensors["head_rows"])
            logit_lens = replace(logit_lens, head=head, token_ids=self.answer_ids, shards=None)
        self._probes = []
        for layer in self.exit_points:
            prefix = f"exit.{layer}."
            own = {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            if logit_lens is None or config.has_label_heads:
                head = Head(own["head_weight"], own["head_bias"])
                self._probes.append(Probe(head, token_ids=self.answer_ids))
            else:
                self._probes.append(replace(logit_lens, lens=lens_of(own)))

    @override
    def decide(self, exit_index: int, rows: UndecidedRows) -> Decision:
        probe, classifier = self._probes[exit_index], self._classifiers[exit_index]
        threshold = self._thresholds[exit_index][rows.threshold_rows]
        is_linear, ids = classifier.shape == LINEAR_SHAPE, self.answer_ids
        readout = probe.readout(rows.hidden)
        if is_linear and ids is not None:
            settled, scores = probe.settle(readout, classifier, threshold)
            return Decision(settled, self._scores(scores, ids))
        result = probe.score(
            readout,
            classifier=classifier if is_linear else None,
            threshold=threshold if is_linear else None,
            return_scores=ids is not None,
        )
        answers: Answers = EarlyStates(readout)
        if ids is not None:
            assert result.scores is not None
            answers = self._scores(result.scores, ids)
        if result.settled is not None:  # the kernel has applied a linear classifier
            return Decision(result.settled, answers)
        return Decision.by_score(result.features, classifier, threshold, rows.memory, answers)

    def view(self, exit_index: int, rows: UndecidedRows) -> ProbeView:
        """What `decide` bases its decision on."""
        probe = self._probes[exit_index]
        result = probe.score(probe.readout(rows.hidden))
        return ProbeView(
            tokens=result.top1_id,
            top_prob=result.top_prob,
            gap=result.gap,
            odds=score(result.features, self._classifiers[exit_index], rows.memory),
            threshold=self._thresholds[exit_index][rows.threshold_rows],
        )
