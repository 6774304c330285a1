"""The exit policy: probe -> features -> classifier score -> threshold, at each exit point."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from vllm_adainfer.policy.artifact import Artifact
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.policy.score import CHAIN_SHAPE, LINEAR_SHAPE, score


@dataclass(frozen=True)
class Decision:
    """What an exit point says of the rows it was asked about.

    Attributes:
        settled: bool [rows]; True where the answer is decided.
        answers: what to decode in settled rows: fp32 [rows, answer ids] scores of those tokens,
            or [rows, hidden size] states for the LM head if any token may be the answer. None
            from a policy that settles nothing.
        memory: [rows, ...], what the policy is to be told of these rows at the next exit point;
            None if nothing.

    """

    settled: Tensor
    answers: Tensor | None
    memory: Tensor | None = None


class ExitPolicy(Protocol):
    """What the exit loop asks of whoever decides.

    Attributes:
        exit_points: layers after which `decide` is asked, ascending.
        num_tags: it knows requests by numbers below this.
        answer_ids: int64, the tokens whose scores answers are, ascending unless they are labels;
            None where answers are states.
        restricted: whether requests are restricted to these tokens, at full depth, too.

    """

    exit_points: tuple[int, ...]
    num_tags: int
    answer_ids: Tensor | None
    restricted: bool

    def decide(
        self, exit_index: int, hidden: Tensor, tags: Tensor, memory: Tensor | None
    ) -> Decision:
        """Decide rows at exit point ``exit_points[exit_index]``.

        Args:
            exit_index: which exit point.
            hidden: [rows, hidden size], the residual stream of the rows to be sampled.
            tags: int64 [rows], the number with which each row's request was admitted.
            memory: of these rows, as `Decision.memory` of the exit point before had it; None at
                the first one.

        """


class CalibratedPolicy:
    """The policy of an artifact; a request's tag is its row of the epsilon table."""

    def __init__(self, artifact: Artifact, logit_lens: Probe | None, device: torch.device) -> None:
        """Take what `artifact` has fitted to `device`.

        `logit_lens` is the served model's, loaded; None is enough for label heads.
        """
        config, tensors = artifact.config, artifact.tensors
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        self.exit_points = config.exit_points
        self.num_tags = len(config.levels)
        self.restricted = config.candidates == "labels"
        self.answer_ids: Tensor | None = tensors.get("shortlist")
        if self.restricted:
            self.answer_ids = torch.tensor(config.label_ids, device=device)
        self._thresholds = tensors["thresholds"].T.contiguous()  # [exit points, levels]
        self._classifiers = [tensors[f"exit.{layer}.classifier"] for layer in self.exit_points]
        own = logit_lens
        if own is not None and "head_rows" in tensors:
            own = replace(
                own, head_weight=tensors["head_rows"], token_ids=self.answer_ids, shards=None
            )
        self._probes = [
            Probe(
                head_weight=tensors[f"exit.{layer}.head_weight"],
                head_bias=tensors[f"exit.{layer}.head_bias"],
                token_ids=self.answer_ids,
            )
            if own is None or config.probe == "label-head"
            else replace(
                own,
                lens_weight=tensors.get(f"exit.{layer}.lens_weight"),
                lens_down=tensors.get(f"exit.{layer}.lens_down"),
                lens_up=tensors.get(f"exit.{layer}.lens_up"),
                lens_bias=tensors.get(f"exit.{layer}.lens_bias"),
            )
            for layer in self.exit_points
        ]

    def decide(
        self, exit_index: int, hidden: Tensor, tags: Tensor, memory: Tensor | None
    ) -> Decision:
        """See `ExitPolicy.decide`."""
        probe, classifier = self._probes[exit_index], self._classifiers[exit_index]
        threshold = self._thresholds[exit_index][tags]
        linear = classifier.shape == LINEAR_SHAPE
        readout = probe.readout(hidden)
        if linear and self.answer_ids is not None:
            return Decision(*probe.settle(readout, classifier, threshold))
        result = probe.score(
            readout,
            classifier=classifier if linear else None,
            threshold=threshold if linear else None,
            return_scores=self.answer_ids is not None,
        )
        answers = readout if self.answer_ids is None else result.scores
        if result.settled is not None:  # by the probe kernel
            return Decision(result.settled, answers)
        odds = score(result.features, classifier, memory)
        chained = classifier.shape == CHAIN_SHAPE
        return Decision(odds >= threshold, answers, memory=odds if chained else None)
