"""Fit probes: an exit point reads the answer with a label head or with the model's own head.

A `lens` is the tuned lens of Belrose et al. 2023 (arXiv 2303.08112): an affine map from the state
after a layer to the state after the last layer, read by the model's own final norm and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from adainfer_kernels import Head, Lens
from torch import Tensor

from vllm_adainfer.arrays import Bools, Floats, Ints
from vllm_adainfer.artifact.kinds import LABEL_HEADS, ProbeKind
from vllm_adainfer.artifact.label_subsets import restrict
from vllm_adainfer.exits.recording.moments import Moments
from vllm_adainfer.offline.calibration.fit import ridge
from vllm_adainfer.offline.calibration.fit.distil import (
    PENALTIES,
    PENALTIES_FOR_PROBABILITIES,
    Taught,
    distil,
)
from vllm_adainfer.offline.calibration.fit.outcomes import ProbeAnswers
from vllm_adainfer.offline.calibration.record.rows import FOLDS, Rows
from vllm_adainfer.policy.branch import Branch
from vllm_adainfer.policy.first_tokens import FirstTokens
from vllm_adainfer.policy.probe import LabelHead, Probe
from vllm_adainfer.policy.student import Student
from vllm_adainfer.promise.changed import Changed
from vllm_adainfer.promise.probabilities import probabilities_of_scores
from vllm_adainfer.promise.promise import Outcome, Promise

RIDGE_PENALTIES = (1.0, 10.0, 100.0, 1_000.0, 10_000.0, 100_000.0)

ANSWERS_ALONE = Changed()
StateProbe = Probe | LabelHead  # reads states of the model
AnyProbe = StateProbe | Student | Branch


@dataclass(frozen=True)
class Target:
    """The target that the probes of a policy predict.

    Attributes:
        kind: the kind of probe.
        label_ids: token ids of the possible answers, labels or a shortlist; None for the whole
            vocabulary.
        full_depth: what each row is answered with at full depth, with the probabilities of labels,
            if these are predicted; None if the answer alone is.
        subsets: bool [rows, labels], the labels that each row of the recording is about, if they
            are a pool; None if each row is about all of them.
        first_tokens: the first tokens of choices, if `label_ids` stand for such.
        promise: what is promised of the answers.
        never_early: those of `label_ids` that the policy promises to be no early answer.

    """

    kind: ProbeKind
    label_ids: Tensor | None
    full_depth: Outcome | None = None
    subsets: Tensor | None = None
    first_tokens: FirstTokens | None = None
    promise: Promise = ANSWERS_ALONE
    never_early: frozenset[int] = frozenset()

    @property
    def undecided(self) -> int | None:
        """The one of `label_ids` that decides no choice; None if each is an answer."""
        if self.first_tokens is None or self.first_tokens.undecided is None:
            return None
        assert self.label_ids is not None
        return int(self.label_ids[self.first_tokens.undecided])

    @property
    def never_settled(self) -> frozenset[int]:
        """Those of `label_ids` that no early answer is."""
        return self.never_early if self.undecided is None else self.never_early | {self.undecided}

    @property
    def is_pooled(self) -> bool:
        """Whether the probes read whole prompts."""
        return self.kind == "pooled-label-head"

    def settled(self, agrees: Bools, loss: Floats) -> Bools:
        """[rows], whether an answer with this loss is as good as the full model's.

        Some promises hold with another best label, too; see `Judged` for the arguments.
        """
        settled: Bools = (loss == 0) & (agrees | (not self.promise.best_counts))
        return settled

    def full_depth_of(self, rows: Rows, where: Ints) -> Outcome:
        """What the decision rows `where` are answered with at full depth."""
        if self.full_depth is None:
            return Outcome(torch.from_numpy(rows.tokens[where]))
        return self.full_depth.of_rows(torch.from_numpy(where))

    def subsets_of(self, rows: Ints) -> Tensor | None:
        """The subsets of decision `rows`."""
        return None if self.subsets is None else self.subsets[rows]


def fit_probes(
    rows: Rows, target: Target, where: Ints, layer: int, folds: Ints
) -> tuple[StateProbe, Sequence[StateProbe]]:
    """The layer's probe fitted on the decision rows `where`, and one fitted without each fold.

    `folds` [where] are those of the rows.
    """
    if target.kind in LABEL_HEADS:
        return _fit_label_heads(rows, target, where, layer, folds)
    plain = logit_lens(rows, target)
    if target.kind == "logit-lens":
        return plain, [plain] * FOLDS
    return _fit_tuned_lenses(plain, rows.moments[layer])


def _fit_label_heads(
    rows: Rows, target: Target, where: Ints, layer: int, folds: Ints
) -> tuple[StateProbe, Sequence[StateProbe]]:
    """A head that gives the labels the probabilities of full depth, and perhaps the label mass."""
    label_ids = target.label_ids
    assert label_ids is not None
    read = rows.read_by_probe(layer, where, target.is_pooled)
    taught = taught_by_full_depth(rows, target, where, read.float())
    penalties = PENALTIES if target.full_depth is None else PENALTIES_FOR_PROBABILITIES
    fitted = distil(taught, folds, penalties)
    as_label_head = taught.mass is not None or taught.subsets is not None

    def head(linear: ridge.Linear) -> StateProbe:
        weight, bias = linear.matrix.float().contiguous(), linear.bias.float()
        if as_label_head:
            return LabelHead(weight, bias, label_ids)
        return Probe(Head(weight, bias), token_ids=label_ids)

    return head(fitted.whole), [head(linear) for linear in fitted.without]


def taught_by_full_depth(rows: Rows, target: Target, where: Ints, read: Tensor) -> Taught:
    """What full depth says about the labels of the rows `where`, of which a probe sees `read`."""
    full_depth, subsets = target.full_depth, target.subsets_of(where)
    mass = None
    if full_depth is not None:
        assert full_depth.labels is not None
        labels, mass = full_depth.labels.among[where], full_depth.labels.mass[where]
    else:
        plain = rows.model.as_served(logit_lens(rows, target))
        scores = plain.score(plain.readout(rows.final[where]), return_scores=True).scores
        assert scores is not None
        if target.first_tokens is not None:
            scores = target.first_tokens.best(scores)
        labels = restrict(scores, subsets).softmax(1)
    return Taught(read, labels, mass, subsets, target.promise.link)


def answers_of_probe(
    probe: StateProbe,
    states: Tensor,
    subsets: Tensor | None = None,
    promise: Promise = ANSWERS_ALONE,
) -> ProbeAnswers:
    """The answers of `probe` for `states`, which are what `Rows.read_by_probe` returns.

    `subsets`, bool [rows, labels], are the labels that each row is about; None for all.
    """
    if isinstance(probe, Probe):
        result = probe.score(probe.readout(states))
        return ProbeAnswers(result.features, Outcome(result.top1_id))
    return answers_of_scores(probe, probe.score(states, subsets), promise)


def answers_of_scores(head: LabelHead, scores: Tensor, promise: Promise) -> ProbeAnswers:
    """The answers of a label head that has given some rows `scores`; see `answers_of_probe`."""
    tokens = head.token_ids[scores[:, : len(head.token_ids)].argmax(dim=1)]
    labels = probabilities_of_scores(scores, promise.link) if head.reads_mass else None
    return ProbeAnswers(promise.features(scores), Outcome(tokens, labels=labels))


def logit_lens(rows: Rows, target: Target) -> Probe:
    """The model's own final norm and head, restricted to the target's tokens if it names any."""
    plain, tokens = rows.model.logit_lens, target.label_ids
    if target.first_tokens is not None:
        tokens = target.first_tokens.token_ids
    return plain if tokens is None else plain.of_tokens(tokens)


def _fit_tuned_lenses(plain: Probe, folds: Sequence[Moments]) -> tuple[Probe, list[Probe]]:
    """`plain` with a tuned lens from all `folds`, and for each fold one from the others."""
    fitted, dtype = ridge.choose(folds, RIDGE_PENALTIES), plain.head.weight.dtype

    def with_lens(linear: ridge.Linear) -> Probe:
        weight = linear.matrix.T.to(dtype).contiguous()
        return replace(plain, lens=Lens(weight, linear.bias.to(dtype)))

    return with_lens(fitted.whole), [with_lens(linear) for linear in fitted.without]
