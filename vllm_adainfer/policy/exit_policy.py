"""The exit policy: probe -> features -> classifier score -> threshold, at each exit point."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import torch
from adainfer_kernels import Head
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.kinds import FEATURES, ProbeInput
from vllm_adainfer.artifact.tensors import served_shape
from vllm_adainfer.policy.answers import (
    Answers,
    EarlyScores,
    EarlyStates,
    LabelScores,
    ShortlistScores,
)
from vllm_adainfer.policy.branch import Branch, StateEncoder
from vllm_adainfer.policy.probe import LabelHead, Probe, lens_of
from vllm_adainfer.policy.reading import ProbeView, features_among
from vllm_adainfer.policy.score import is_chain, score
from vllm_adainfer.policy.student import Student

Trained = Student | Branch  # a net of its own, not a map of a state
TRAINED = (ProbeInput.TEXT, ProbeInput.OWN_STATES)  # what these read
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
        hidden: what the probe reads. The state of the last token: [rows, hidden size], the residual
            stream. The whole prompt: fp32 [rows, 2 x hidden size], the normed state of the last
            token and the mean of those of the prompt. Each token of the prompt: what the branch
            has projected its state to, [tokens of all rows, width]. Unused where it reads the text.
        threshold_rows: int64 [rows], the row of the policy's thresholds that applies to each.
        memory: `Decision.memory` of these rows from the previous exit point; None at the first.
        subsets: int64 [rows], the labels that each row's request names, as bits; None if no policy
            of the engine has a label pool. Policies without one ignore it.
        texts: for a student the text of each row, in its tokens; none is empty.
        lens: for a branch the tokens of each row, [rows].

    """

    hidden: Tensor
    threshold_rows: Tensor
    memory: Tensor | None = None
    subsets: Tensor | None = None
    texts: Sequence[Sequence[int]] = ()
    lens: Ints = field(default_factory=lambda: np.arange(0))


class ExitPolicy(ABC):
    """What the exit loop needs from a policy.

    Attributes:
        exit_points: layers after which the exit loop calls `decide`, ascending.
        num_threshold_rows: the number of threshold rows: one per level, or per level and question.
        probe_inputs: what it reads at each exit point.
        branches: by index of the exit point, the branch of each that has one.

    """

    exit_points: tuple[int, ...]
    num_threshold_rows: int
    probe_inputs: tuple[ProbeInput, ...]
    branches: Mapping[int, Branch] = MappingProxyType({})

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


def tensors_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those of `tensors` whose names begin with `prefix`, by the rest of the name."""
    return {n.removeprefix(prefix): one for n, one in tensors.items() if n.startswith(prefix)}


def trained_probe(artifact: Artifact, layer: int, head: LabelHead, device: torch.device) -> Trained:
    """The student or the branch of an artifact at an exit point, with its `head` on `device`.

    Raises:
        AdaInferError: see `TextEncoder.of`.

    """
    if layer not in artifact.config.branches:
        return Student.of(artifact, head, device)
    tensors = tensors_of(artifact.tensors, f"exit.{layer}.branch.")
    return Branch(StateEncoder.of(tensors, device), head)


def branches_among(probes: Sequence[object]) -> dict[int, Branch]:
    """See `ExitPolicy.branches`."""
    return {index: probe for index, probe in enumerate(probes) if isinstance(probe, Branch)}


def scores_of(probe: Trained, rows: UndecidedRows, subsets: Tensor | None = None) -> Tensor:
    """The scores of a trained probe for `rows`, see `LabelHead.score`."""
    if isinstance(probe, Student):
        return probe.score(rows.texts, subsets)
    return probe.score(rows.hidden, rows.lens, subsets)


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
        self.probe_inputs = config.probe_inputs
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
        self._probes: list[Probe | Trained] = []
        for layer, read in zip(self.exit_points, self.probe_inputs, strict=True):
            own = tensors_of(tensors, f"exit.{layer}.")
            if read in TRAINED:
                assert self.answer_ids is not None, "a trained probe scores labels"
                weight, bias = own["head_weight"].float(), own["head_bias"].float()
                labels = LabelHead(weight, bias, self.answer_ids)
                self._probes.append(trained_probe(artifact, layer, labels, device))
            elif logit_lens is None or config.has_label_heads:
                head = Head(own["head_weight"], own["head_bias"])
                self._probes.append(Probe(head, token_ids=self.answer_ids))
            else:
                self._probes.append(replace(logit_lens, lens=lens_of(own)))
        self.branches = branches_among(self._probes)

    @override
    def decide(self, exit_index: int, rows: UndecidedRows) -> Decision:
        probe, classifier = self._probes[exit_index], self._classifiers[exit_index]
        threshold = self._thresholds[exit_index][rows.threshold_rows]
        is_linear, ids = classifier.shape == LINEAR_SHAPE, self.answer_ids
        if not isinstance(probe, Probe):
            assert ids is not None
            scores = scores_of(probe, rows)
            answers: Answers = self._scores(scores, ids)
            features = features_among(scores)
            return Decision.by_score(features, classifier, threshold, rows.memory, answers)
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
        answers = EarlyStates(readout)
        if ids is not None:
            assert result.scores is not None
            answers = self._scores(result.scores, ids)
        if result.settled is not None:  # the kernel has applied a linear classifier
            return Decision(result.settled, answers)
        return Decision.by_score(result.features, classifier, threshold, rows.memory, answers)

    def view(self, exit_index: int, rows: UndecidedRows) -> ProbeView:
        """What `decide` bases its decision on."""
        probe = self._probes[exit_index]
        if not isinstance(probe, Probe):
            scores = scores_of(probe, rows)
            tokens, features = probe.head.token_ids[scores.argmax(dim=1)], features_among(scores)
        else:
            result = probe.score(probe.readout(rows.hidden))
            tokens, features = result.top1_id, result.features
        return ProbeView(
            tokens=tokens,
            top_prob=features[:, 0],
            gap=features[:, 1],
            odds=score(features, self._classifiers[exit_index], rows.memory),
            threshold=self._thresholds[exit_index][rows.threshold_rows],
        )
