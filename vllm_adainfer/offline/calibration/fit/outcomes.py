"""What probes and full depth answer on recorded rows, as promises compare them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_adainfer.artifact.label_subsets import restrict
from vllm_adainfer.offline.calibration.record.rows import Rows
from vllm_adainfer.promise.links import SOFTMAX, Link
from vllm_adainfer.promise.probabilities import LabelProbabilities
from vllm_adainfer.promise.promise import Outcome


@dataclass(frozen=True)
class ProbeAnswers:
    """A probe's output for some rows.

    Attributes:
        features: fp32 [rows, n], the classifier's input.
        outcome: the answers, by their tokens; with probabilities if the probe gives them.

    """

    features: Tensor
    outcome: Outcome


def full_depth_labels(
    rows: Rows,
    label_ids: Tensor,
    subsets: Tensor | None = None,
    link: Link = SOFTMAX,
) -> Outcome:
    """What full depth answers on each row, with the probabilities that vLLM returns of its labels.

    They are from logits in the model's dtype, computed from the recorded final states.

    Args:
        rows: what full depth did.
        label_ids: int64 [labels].
        subsets: bool [rows, labels], the labels that each row is about; None for all.
        link: how scores become probabilities.

    """
    lens = rows.model.as_served(rows.model.logit_lens)
    whole = lens.score(lens.readout(rows.final))
    labels = lens.of_tokens(label_ids)
    scores = labels.score(labels.readout(rows.final), return_scores=True).scores
    assert scores is not None
    own = restrict(scores, subsets)
    mass = (own.logsumexp(dim=1) - whole.lse).exp().clamp(max=1)
    is_label = whole.top1_id.unsqueeze(1) == label_ids
    if subsets is not None:
        is_label &= subsets
    return Outcome(
        torch.from_numpy(rows.tokens),
        labels=LabelProbabilities(link.probabilities(own), mass),
        is_label=is_label.any(dim=1),
    )
