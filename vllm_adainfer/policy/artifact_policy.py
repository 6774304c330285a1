"""The policy of an artifact: probe -> features -> classifier score -> threshold, at exit points."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.policy.answers import EarlyScores
from vllm_adainfer.policy.branch import Branch, StateEncoder
from vllm_adainfer.policy.exit_policy import Decision, ExitPolicy, UndecidedRows
from vllm_adainfer.policy.probe import LabelHead
from vllm_adainfer.policy.student import Student

Trained = Student | Branch  # a net of its own, not a map of a state
TRAINED = (ProbeInput.TEXT, ProbeInput.OWN_STATES)  # what these read


class ArtifactPolicy(ExitPolicy):
    """A probe, a classifier and a threshold at each exit point, from an artifact.

    Attributes:
        answer_ids: int64 [tokens], the tokens that its answers score; None for all.

    """

    answer_ids: Tensor | None

    def __init__(self, config: ArtifactConfig, tensors: Mapping[str, Tensor]) -> None:
        """Take what every kind of policy has; `tensors` are on the device already."""
        self.exit_points = config.exit_points
        self.num_threshold_rows = config.num_threshold_rows
        self.probe_inputs = config.probe_inputs
        self.answers_stand = config.answers_stand
        self._thresholds = tensors["thresholds"].T.contiguous()  # [exit points, threshold rows]
        self._classifiers = [tensors[f"exit.{layer}.classifier"] for layer in self.exit_points]
        self._never_early: Tensor | None = None  # bool [labels]
        if config.never_settled:
            never = [column in config.never_settled for column in range(len(config.labels))]
            self._never_early = torch.tensor(never, device=self._thresholds.device)

    @override
    def decide(self, exit_index: int, rows: UndecidedRows) -> Decision:
        decision = self._decide(exit_index, rows)
        if self._never_early is None:
            return decision
        assert isinstance(decision.answers, EarlyScores)
        scores = decision.answers.scores
        best = scores >= scores.amax(dim=1, keepdim=True)  # the sampler breaks ties
        runs_on = (best & self._never_early).any(dim=1)
        return replace(decision, settled=decision.settled & ~runs_on)

    @override
    def best_labels(self, logits: Tensor, subsets: Tensor | None) -> Tensor:
        assert self.answer_ids is not None
        return logits[:, self.answer_ids].argmax(dim=1)

    @abstractmethod
    def _decide(self, exit_index: int, rows: UndecidedRows) -> Decision:
        """What `decide` does, if every label may be an early answer."""


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
