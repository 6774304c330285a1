"""Fit: a probe and a classifier at every candidate exit point, by ridge regression and an SVM.

Prompts are split in two. The first half fits probes and classifiers; the classifier learns from
out-of-fold probe scores, because a ridge is surer of the rows it has seen than of new ones. The
second half is touched by nothing but the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from vllm_adainfer.calibration.collect import Recording
from vllm_adainfer.decision.classifier import Kind, fit_classifier
from vllm_adainfer.decision.crf import fit_crf
from vllm_adainfer.decision.probe import Probe
from vllm_adainfer.decision.score import score

ALPHAS = (1.0, 10.0, 100.0, 1_000.0, 10_000.0)
FOLDS = 5
# A decision row counts as much as so many rows from prompts cut short.
DECISION_ROW_WEIGHT = 4.0

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Scored:
    """One exit point on one half of the prompts.

    Attributes:
        score: fp32 [rows], the classifier's settled score.
        agrees: [rows], whether the probe's best token is the full model's.
        features: fp32 [rows, 2], what the classifier reads.

    """

    score: Tensor
    agrees: Bools
    features: Tensor


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
    """Fit every layer in `layers`; those that cannot be learned are left out.

    A ``crf`` is over exit points that are yet to be chosen: these get an SVM, see `chain`.
    """
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
    states, groups, tokens = recording.states[layer], recording.groups, recording.tokens
    fit_prompts, held_out = halves
    fit_rows = np.flatnonzero(np.isin(groups, fit_prompts))
    prompts = groups.max() + 1
    make_probe = _probe_maker(recording, target, states)

    def judge(probe: Probe, rows: Ints) -> tuple[Tensor, Bools]:
        result = probe.score(probe.readout(states[rows]))
        return result.features, result.top1_id.numpy() == tokens[rows]

    # Out of fold: each decision row is judged by a probe that has not seen its prompt.
    rows_features = torch.empty(len(fit_prompts), 2)
    agrees = np.empty(len(fit_prompts), dtype=np.bool_)
    place = {prompt: index for index, prompt in enumerate(fit_prompts)}
    folds = GroupKFold(FOLDS, shuffle=True, random_state=seed)
    for seen, unseen in folds.split(fit_rows, groups=groups[fit_rows]):
        judged = fit_rows[unseen]
        judged = judged[judged < prompts]  # the prompts' own last tokens
        where = [place[prompt] for prompt in groups[judged]]
        rows_features[where], agrees[where] = judge(make_probe(fit_rows[seen]), judged)
    classifier = fit_classifier("svm" if kind == "crf" else kind, rows_features, agrees, seed)
    if classifier is None:
        return None
    probe = make_probe(fit_rows)
    held_features, held_agrees = judge(probe, held_out)
    return FittedExit(
        layer=layer,
        probe=probe,
        classifier=classifier,
        fitted=Scored(score(rows_features, classifier, None), agrees, rows_features),
        held_out=Scored(score(held_features, classifier, None), held_agrees, held_features),
    )


def chain(exits: Sequence[FittedExit]) -> list[FittedExit]:
    """The chosen exit points (ascending, at least one) with a CRF over them for classifiers."""
    steps = fit_crf(
        torch.stack([fitted.fitted.features for fitted in exits], dim=1),
        np.stack([fitted.fitted.agrees for fitted in exits], axis=1),
    )
    chained: list[FittedExit] = []
    fitted_score: Tensor | None = None
    held_out_score: Tensor | None = None
    for fitted, step in zip(exits, steps, strict=True):
        fitted_score = score(fitted.fitted.features, step, fitted_score)
        held_out_score = score(fitted.held_out.features, step, held_out_score)
        chained.append(
            replace(
                fitted,
                classifier=step,
                fitted=replace(fitted.fitted, score=fitted_score),
                held_out=replace(fitted.held_out, score=held_out_score),
            )
        )
    return chained


def _probe_maker(recording: Recording, target: Target, states: Tensor) -> Callable[[Ints], Probe]:
    """A function that fits this layer's probe on given rows."""
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
        return lambda rows: plain
    own = len(np.unique(recording.groups))
    weight = np.where(np.arange(len(states)) < own, DECISION_ROW_WEIGHT, 1.0)
    if target.kind == "lens":

        def lens(rows: Ints) -> Probe:
            change = recording.final[rows].float() - states[rows].float()
            matrix, bias = _ridge(states[rows], change, weight[rows])
            return replace(
                plain,
                lens_weight=matrix.T.contiguous().to(head.dtype),
                lens_bias=bias.to(head.dtype),
            )

        return lens

    def label_head(rows: Ints) -> Probe:
        rows = rows[rows < own]  # cut prompts have no label to come
        scores = plain.score(plain.readout(recording.final[rows]), return_scores=True).scores
        assert scores is not None
        matrix, bias = _ridge(states[rows], scores - scores.mean(1, keepdim=True), weight[rows])
        return Probe(head_weight=matrix, head_bias=bias, token_ids=target.label_ids)

    return label_head


def _ridge(x: Tensor, y: Tensor, weight: npt.NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    """Weighted ridge of y [rows, n] on x [rows, hidden size], penalty chosen by leave-one-out.

    Returns:
        fp32 [n, hidden size] and [n].

    """
    scaler, ridge = StandardScaler(), RidgeCV(ALPHAS)
    scaled = scaler.fit_transform(x.double().numpy())
    ridge.fit(scaled, y.double().numpy(), sample_weight=weight)
    matrix = ridge.coef_ / scaler.scale_
    bias = ridge.intercept_ - matrix @ scaler.mean_
    return torch.from_numpy(matrix).float(), torch.from_numpy(bias).float()


def candidate_layers(depth: int, asked: Sequence[int] | None) -> list[int]:
    """Layers to record: those asked for, or about nine spread over the stack."""
    if asked is not None:
        return list(asked)
    step = max(1, round(depth / 10))
    return list(range(step, depth, step))
