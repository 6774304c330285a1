"""Fit probes: an exit point reads the answer by ridge regression or with the model's own head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from adainfer_kernels import Head, Lens
from torch import Tensor

from vllm_adainfer.offline.calibration import ridge
from vllm_adainfer.offline.calibration.collect import FOLDS, Ints, Recording
from vllm_adainfer.policy.kinds import ProbeKind
from vllm_adainfer.policy.moments import Moments
from vllm_adainfer.policy.probe import Probe

PENALTIES = (1.0, 10.0, 100.0, 1_000.0, 10_000.0, 100_000.0)
# From this hidden size on, a lens may have low rank: a full one takes 8 MiB there in bfloat16,
# stored and read for each exit point.
LOW_RANK_HIDDEN_SIZE = 2048
# The ranks to try are the hidden size divided by these; above a quarter, little is saved.
RANK_DIVISORS = (64, 32, 16, 8, 4)
# A low rank may raise the lens's squared error on unseen prompts by this share: on the demo model
# (SST-2, layers 15 to 27) agreement with the full model then stays within 0.5 points.
RANK_TOLERANCE = 0.1


@dataclass(frozen=True)
class Target:
    """What the probes predict.

    Attributes:
        kind: of the probes.
        label_ids: token ids of the possible answers, labels or a shortlist; None for the whole
            vocabulary.

    """

    kind: ProbeKind
    label_ids: Tensor | None


def fit_probes(
    recording: Recording, target: Target, rows: Ints, layer: int
) -> tuple[Probe, list[Probe]]:
    """The layer's probe fitted on decision `rows`, and for each fold one fitted without it."""
    plain = logit_lens(recording, target)
    if target.kind == "logit-lens":
        return plain, [plain] * FOLDS
    if target.kind == "lens":
        return _fit_lenses(plain, recording.moments[layer])
    scores = plain.score(plain.readout(recording.final[rows]), return_scores=True).scores
    assert scores is not None
    folds = []
    for fold in range(FOLDS):
        here = torch.from_numpy(recording.prompts[rows] % FOLDS == fold)
        folds.append(Moments.zeros(recording.final.shape[1], scores.shape[1]))
        folds[-1].add(
            recording.states[layer][rows][here].double(),
            (scores - scores.mean(1, keepdim=True))[here].double(),
            torch.ones(int(here.sum())),
        )
    fitted = ridge.choose(folds, PENALTIES)

    def label_head(linear: ridge.Linear) -> Probe:
        head = Head(linear.matrix.float().contiguous(), linear.bias.float())
        return Probe(head, token_ids=target.label_ids)

    return label_head(fitted.whole), [label_head(linear) for linear in fitted.without]


def logit_lens(recording: Recording, target: Target) -> Probe:
    """The model's own final norm and head, restricted to the target's tokens if it names any."""
    plain = recording.logit_lens
    return plain if target.label_ids is None else plain.of_tokens(target.label_ids)


def _fit_lenses(plain: Probe, folds: Sequence[Moments]) -> tuple[Probe, list[Probe]]:
    """`plain` with a lens from all `folds`, and for each fold one from the others.

    A wide model's lens has the lowest rank that predicts unseen prompts as well.
    """
    fitted = ridge.choose(folds, PENALTIES)
    size, dtype = len(folds[0].x_mean), plain.head.weight.dtype
    rank = None
    if size >= LOW_RANK_HIDDEN_SIZE:
        ranks = [size // divisor for divisor in RANK_DIVISORS]
        rank = ridge.choose_rank(folds, fitted.penalty, ranks, RANK_TOLERANCE)
    whole = ridge.total(folds)

    def lens(moments: Moments, linear: ridge.Linear) -> Probe:
        if rank is None:
            weight = linear.matrix.T.to(dtype).contiguous()
            return replace(plain, lens=Lens(weight, bias=linear.bias.to(dtype)))
        down, up = ridge.low_rank(moments, linear.matrix, rank)
        bias = ridge.intercept(moments, (down @ up).T)
        parts = down.to(dtype).contiguous(), up.to(dtype).contiguous(), bias.to(dtype)
        return replace(plain, lens=Lens(*parts))

    without = [
        lens(whole - fold, linear) for fold, linear in zip(folds, fitted.without, strict=True)
    ]
    return lens(whole, fitted.whole), without
