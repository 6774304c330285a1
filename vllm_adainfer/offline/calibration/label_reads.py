"""What full depth says of the labels' probabilities, from the recorded final states."""

from __future__ import annotations

from dataclasses import dataclass, replace

from adainfer_kernels import Head
from torch import Tensor

from vllm_adainfer.artifact.label_subsets import restrict
from vllm_adainfer.offline.calibration.collect import Recording
from vllm_adainfer.offline.calibration.loss import ProbabilityMoved
from vllm_adainfer.policy.probabilities import LabelProbabilities


@dataclass(frozen=True)
class LabelReads:
    """What full depth says of the labels in each row of a recording.

    Attributes:
        scores: fp32 [rows, labels], their logits, computed in fp32: what heads learn from.
        probabilities: of the labels as vLLM returns them, from logits in the model's dtype.
        label_is_best: bool [rows], whether the best token of the whole vocabulary is a label.

    """

    scores: Tensor
    probabilities: LabelProbabilities
    label_is_best: Tensor

    def loss(self, tolerance: float, with_mass: bool) -> ProbabilityMoved:
        """The loss of an early answer at this tolerance."""
        return ProbabilityMoved(self.probabilities, self.label_is_best, tolerance, with_mass)


def label_reads(
    recording: Recording, label_ids: Tensor, subsets: Tensor | None = None
) -> LabelReads:
    """Read all rows of `recording` for labels, int64 [labels].

    `subsets`, bool [rows, labels], are the labels that each row is about; None for all.
    """
    head = recording.logit_lens.head
    served = Head(head.weight, head.bias, recording.soft_cap, recording.scale)
    lens = replace(recording.logit_lens, head=served)
    whole = lens.score(lens.readout(recording.final))
    labels = lens.of_tokens(label_ids)
    scores = labels.score(labels.readout(recording.final), return_scores=True).scores
    weight = labels.head.weight.float()
    exact = replace(labels, head=replace(labels.head, weight=weight))
    exact_scores = exact.score(exact.readout(recording.final), return_scores=True).scores
    assert scores is not None
    assert exact_scores is not None
    own = restrict(scores, subsets)
    mass = (own.logsumexp(dim=1) - whole.lse).exp().clamp(max=1)
    is_best = whole.top1_id.unsqueeze(1) == label_ids
    if subsets is not None:
        is_best &= subsets
    return LabelReads(
        exact_scores, LabelProbabilities(own.softmax(dim=1), mass), is_best.any(dim=1)
    )
