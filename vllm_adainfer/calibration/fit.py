"""Fit: a probe and a classifier at every candidate exit point, by ridge regression and an SVM.

Prompts are split in two. The first half fits probes and classifiers; the classifier learns from
out-of-fold probe scores, because a ridge is surer of the rows it has seen than of new ones. The
second half is touched by nothing but the bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from adainfer_kernels import linear_score
from torch import Tensor

from vllm_adainfer.calibration import ridge
from vllm_adainfer.calibration.collect import FOLDS, Recording
from vllm_adainfer.decision.bound import FloatArray
from vllm_adainfer.decision.classifier import Kind, fit_classifier
from vllm_adainfer.decision.moments import Moments
from vllm_adainfer.decision.probe import Probe

PENALTIES = (1.0, 10.0, 100.0, 1_000.0, 10_000.0, 100_000.0)
# From this hidden size on a lens may be of low rank: a whole one is 8 MiB there in bfloat16, to
# be stored and read for each exit point.
LOW_RANK_HIDDEN_SIZE = 2048
# The ranks tried are the hidden size divided by these; above a quarter little is saved.
RANK_DIVISORS = (64, 32, 16, 8, 4)
# A low rank may add so much to the lens's squared error on unseen prompts, relative to it: on the
# demo model (SST-2, layers 15 to 27) agreement with the full model stays within 0.5 points.
RANK_TOLERANCE = 0.1

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Scored:
    """One exit point on one half of the prompts.

    Attributes:
        score: fp32 [rows], the classifier's settled score.
        agrees: [rows], whether the probe's best token is the full model's.
        loss: [rows], what leaving here costs: 1 where it does not agree, else 0.

    """

    score: Tensor
    agrees: Bools
    loss: FloatArray


@dataclass(frozen=True)
class FittedExit:
    """A candidate exit point: what serving needs of it, and how it did."""

    layer: int
    probe: Probe
    classifier: Tensor
    fitted: Scored
    held_out: Scored


@dataclass(frozen=True)
class Target:
    """What the probes are to predict.

    Attributes:
        kind: ``label-head``, ``lens`` or ``logit-lens``.
        label_ids: token ids of the labels, None for the whole vocabulary.
        norm_eps: epsilon of the model's final norm.

    """

    kind: str
    label_ids: Tensor | None
    norm_eps: float


def split(prompts: int, seed: int) -> tuple[Ints, Ints]:
    """Two random halves of the prompts: to fit on, and to certify on."""
    order = np.random.default_rng(seed).permutation(prompts)
    return np.sort(order[: prompts // 2]), np.sort(order[prompts // 2 :])


def fit_exits(
    recording: Recording,
    target: Target,
    halves: tuple[Ints, Ints],
    classifier: Kind,
    seed: int,
    layers: Iterable[int],
) -> list[FittedExit]:
    """Fit every layer in `layers`; those that cannot be learned are left out."""
    exits = (_fit_exit(recording, target, halves, classifier, seed, layer) for layer in layers)
    return [fitted for fitted in exits if fitted is not None]


def _fit_exit(
    recording: Recording,
    target: Target,
    halves: tuple[Ints, Ints],
    kind: Kind,
    seed: int,
    layer: int,
) -> FittedExit | None:
    states, tokens = recording.states[layer], recording.tokens
    fit_prompts, held_out = halves
    probe, without_fold = _fit_probes(recording, target, fit_prompts, layer)

    def judge(probe: Probe, rows: Ints) -> tuple[Tensor, Bools]:
        result = probe.score(probe.readout(states[rows]))
        return result.features, result.top1_id.numpy() == tokens[rows]

    # Out of fold: each decision row is judged by a probe that has not seen its prompt.
    rows_features = torch.empty(len(fit_prompts), 2)
    agrees = np.empty(len(fit_prompts), dtype=np.bool_)
    for fold, unseeing in enumerate(without_fold):
        where = np.flatnonzero(fit_prompts % FOLDS == fold)
        rows_features[where], agrees[where] = judge(unseeing, fit_prompts[where])
    classifier = fit_classifier(kind, rows_features, agrees, seed)
    if classifier is None:
        return None

    def scored(features: Tensor, agrees: Bools) -> Scored:
        return Scored(linear_score(features, classifier), agrees, (~agrees).astype(np.float64))

    held_features, held_agrees = judge(probe, held_out)
    return FittedExit(
        layer=layer,
        probe=probe,
        classifier=classifier,
        fitted=scored(rows_features, agrees),
        held_out=scored(held_features, held_agrees),
    )


def _fit_probes(
    recording: Recording, target: Target, prompts: Ints, layer: int
) -> tuple[Probe, list[Probe]]:
    """The layer's probe fitted on `prompts`, and for each fold the one fitted on the others."""
    head = recording.head_weight
    if target.label_ids is not None:
        head = head[target.label_ids]
    plain = Probe(
        head_weight=head,
        token_ids=target.label_ids,
        norm_weight=recording.norm_weight,
        norm_eps=target.norm_eps,
    )
    if target.kind == "logit-lens":
        return plain, [plain] * FOLDS
    if target.kind == "lens":
        return _fit_lenses(plain, recording.moments[layer])
    scores = plain.score(plain.readout(recording.final[prompts]), return_scores=True).scores
    assert scores is not None
    folds = []
    for fold in range(FOLDS):
        rows = torch.from_numpy(prompts % FOLDS == fold)
        folds.append(Moments.zeros(recording.final.shape[1], len(head)))
        folds[-1].add(
            recording.states[layer][prompts][rows].double(),
            (scores - scores.mean(1, keepdim=True))[rows].double(),
            torch.ones(int(rows.sum())),
        )
    fitted = ridge.choose(folds, PENALTIES)

    def label_head(linear: ridge.Linear) -> Probe:
        return Probe(
            head_weight=linear.matrix.float().contiguous(),
            head_bias=linear.bias.float(),
            token_ids=target.label_ids,
        )

    return label_head(fitted.whole), [label_head(linear) for linear in fitted.without]


def _fit_lenses(plain: Probe, folds: Sequence[Moments]) -> tuple[Probe, list[Probe]]:
    """`plain` with a lens from all `folds`, and for each fold one from the others.

    A lens of a wide model is of the lowest rank that serves unseen prompts as well.
    """
    fitted = ridge.choose(folds, PENALTIES)
    size, dtype = plain.head_weight.shape[1], plain.head_weight.dtype
    rank = None
    if size >= LOW_RANK_HIDDEN_SIZE:
        ranks = [size // divisor for divisor in RANK_DIVISORS]
        rank = ridge.choose_rank(folds, fitted.penalty, ranks, RANK_TOLERANCE)
    whole = ridge.total(folds)

    def lens(moments: Moments, linear: ridge.Linear) -> Probe:
        if rank is None:
            weight = linear.matrix.T.to(dtype).contiguous()
            return replace(plain, lens_weight=weight, lens_bias=linear.bias.to(dtype))
        down, up = ridge.low_rank(moments, linear.matrix, rank)
        bias = ridge.intercept(moments, (down @ up).T)
        return replace(
            plain,
            lens_down=down.to(dtype).contiguous(),
            lens_up=up.to(dtype).contiguous(),
            lens_bias=bias.to(dtype),
        )

    without = [
        lens(whole - fold, linear) for fold, linear in zip(folds, fitted.without, strict=True)
    ]
    return lens(whole, fitted.whole), without


def candidate_layers(depth: int, asked: Sequence[int] | None) -> list[int]:
    """Layers to record: those asked for, or about nine spread over the stack."""
    if asked is not None:
        return list(asked)
    step = max(1, round(depth / 10))
    return list(range(step, depth, step))
