"""The exit policy: probe -> features -> classifier score -> threshold, at each exit point."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from adainfer_kernels import Head
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.artifact.config import Artifact
from vllm_adainfer.artifact.kinds import FEATURES
from vllm_adainfer.artifact.tensors import served_shape
from vllm_adainfer.policy.probe import Probe, lens_of
from vllm_adainfer.policy.reading import Reading
from vllm_adainfer.policy.score import is_chain, score

LINEAR_SHAPE = served_shape("svm", len(FEATURES))


@dataclass(frozen=True)
class Decision:
    """What a policy decides about some rows at an exit point.

    Attributes:
        settled: bool [rows]; True where the answer is decided.
        answers: what to decode in settled rows: fp32 [rows, answer ids] scores of those tokens;
            with one more column, their logits and that of every other token; or [rows, hidden
            size] states for the LM head if any token may be the answer. None if the policy never
            settles a row.
        memory: [rows, ...], passed back to the policy with these rows at the next exit point;
            None if it needs none.

    """

    settled: Tensor
    answers: Tensor | None
    memory: Tensor | None = None

    @classmethod
    def by_score(
        cls,
        features: Tensor,
        classifier: Tensor,
        threshold: Tensor,
        memory: Tensor | None,
        answers: Tensor | None,
    ) -> Decision:
        """Settle the rows whose classifier score reaches their `threshold`, [rows]."""
        odds = score(features, classifier, memory)
        chained = is_chain(classifier, features)
        return cls(odds >= threshold, answers, memory=odds if chained else None)


@dataclass(frozen=True)
class Asked:
    """The rows that a policy is asked about at an exit point.

    Attributes:
        hidden: [rows, hidden size], the residual stream of the rows to sample.
        tags: int64 [rows], the tag each row's request was admitted with.
        memory: `Decision.memory` of these rows from the previous exit point; None at the first.
        subsets: int64 [rows], the labels each row is about, as bits; None if no policy of the
            engine has a label pool. Policies without one ignore it.

    """

    hidden: Tensor
    tags: Tensor
    memory: Tensor | None = None
    subsets: Tensor | None = None


class ExitPolicy(Protocol):
    """What the exit loop needs from a policy.

    Attributes:
        exit_points: layers after which the exit loop calls `decide`, ascending.
        num_tags: how many tags the policy has; tags count from 0.
        answer_ids: int64 [answer ids], the tokens that answers hold scores of, ascending unless
            they are labels; None where answers are states.
        restricted: whether requests may produce only these tokens, even at full depth.

    """

    exit_points: tuple[int, ...]
    num_tags: int
    answer_ids: Tensor | None
    restricted: bool

    def decide(self, exit_index: int, asked: Asked) -> Decision:
        """Decide which rows are settled at exit point ``exit_points[exit_index]``."""


class CalibratedPolicy(ExitPolicy):
    """The policy of an artifact; a request's tag is its row of the thresholds."""

    def __init__(self, artifact: Artifact, logit_lens: Probe | None, device: torch.device) -> None:
        """Load the fitted tensors of `artifact` onto `device`.

        `logit_lens` is that of the served model; label heads do not need it.
        """
        config, tensors = artifact.config, artifact.tensors
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        self.exit_points = config.exit_points
        self.num_tags = config.num_threshold_rows
        self.restricted = config.candidates == "labels"
        self.answer_ids = tensors.get("shortlist")
        if self.restricted:
            self.answer_ids = torch.tensor(config.label_ids, device=device)
        self._thresholds = tensors["thresholds"].T.contiguous()  # [exit points, tags]
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
            if logit_lens is None or config.probe == "label-head":
                head = Head(own["head_weight"], own["head_bias"])
                self._probes.append(Probe(head, token_ids=self.answer_ids))
            else:
                self._probes.append(replace(logit_lens, lens=lens_of(own)))

    @override
    def decide(self, exit_index: int, asked: Asked) -> Decision:
        probe, classifier = self._probes[exit_index], self._classifiers[exit_index]
        threshold = self._thresholds[exit_index][asked.tags]
        linear = classifier.shape == LINEAR_SHAPE
        readout = probe.readout(asked.hidden)
        if linear and self.answer_ids is not None:
            return Decision(*probe.settle(readout, classifier, threshold))
        result = probe.score(
            readout,
            classifier=classifier if linear else None,
            threshold=threshold if linear else None,
            return_scores=self.answer_ids is not None,
        )
        answers = readout if self.answer_ids is None else result.scores
        if result.settled is not None:  # the kernel has applied a linear classifier
            return Decision(result.settled, answers)
        return Decision.by_score(result.features, classifier, threshold, asked.memory, answers)

    def read(self, exit_index: int, asked: Asked) -> Reading:
        """What `decide` decides by."""
        probe = self._probes[exit_index]
        result = probe.score(probe.readout(asked.hidden))
        return Reading(
            tokens=result.top1_id,
            top_prob=result.top_prob,
            gap=result.gap,
            odds=score(result.features, self._classifiers[exit_index], asked.memory),
            threshold=self._thresholds[exit_index][asked.tags],
        )
