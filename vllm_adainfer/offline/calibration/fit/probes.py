"""Fit probes: an exit point reads the answer with a label head or with the model's own head.

A `lens` is the tuned lens of Belrose et al. 2023 (arXiv 2303.08112): an affine map from the state
after a layer to the state after the last layer, read by the model's own final norm and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from adainfer_kernels import Head, Lens
from torch import Tensor

from vllm_adainfer.arrays import Bools, Floats, Ints
from vllm_adainfer.artifact.kinds import LABEL_HEADS, ProbeKind
from vllm_adainfer.artifact.outputs import Objects
from vllm_adainfer.offline.calibration.fit import ridge
from vllm_adainfer.offline.calibration.fit.distil import (
    PENALTIES,
    PENALTIES_FOR_PROBABILITIES,
    Taught,
    distil,
    distil_fields,
)
from vllm_adainfer.offline.calibration.record.rows import FOLDS, Rows
from vllm_adainfer.policy.first_tokens import FirstTokens
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.promise.changed import Changed
from vllm_adainfer.promise.label_subsets import restrict
from vllm_adainfer.promise.links import SOFTMAX, ByField, Link
from vllm_adainfer.promise.probabilities import LabelProbabilities, probabilities_of_scores
from vllm_adainfer.promise.promise import Outcome, Promise

RIDGE_PENALTIES = (1.0, 10.0, 100.0, 1_000.0, 10_000.0, 100_000.0)

ANSWERS_ALONE = Changed()
# The classifier's input, fp32 [rows, n], and the answers, by their tokens; with probabilities if
# the probe gives them.
ProbeAnswers: TypeAlias = tuple[Tensor, Outcome]


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
        objects: those that are decided; then `label_ids` are places of values, and answers numbers.

    """

    kind: ProbeKind
    label_ids: Tensor | None
    full_depth: Outcome | None = None
    subsets: Tensor | None = None
    first_tokens: FirstTokens | None = None
    promise: Promise = ANSWERS_ALONE
    never_early: frozenset[int] = frozenset()
    objects: Objects | None = None

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

    def are_never_early(self, tokens: Ints) -> Bools:
        """[rows], whether each answer is one that is never early."""
        if self.objects is None:
            return np.isin(tokens, [*self.never_settled])
        found = np.zeros(len(tokens), dtype=np.bool_)
        for label in self.objects.labels:
            if label.token_id in self.never_early:
                field, place = self.objects.at(label.name)
                found |= self.objects.link.place_in(field, tokens) == place
        return found

    @property
    def is_pooled(self) -> bool:
        """Whether the probes read whole prompts."""
        return self.kind == "pooled-label-head"

    def settled(self, agrees: Bools, loss: Floats) -> Bools:
        """[rows], whether an answer with this loss is as good as the full model's.

        Some promises hold with another best label, too; see `Scored` for the arguments.
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
) -> tuple[Probe, Sequence[Probe]]:
    """The layer's probe fitted on the decision rows `where`, and one fitted without each fold.

    `folds` [where] are those of the rows.
    """
    if target.kind not in LABEL_HEADS:
        plain = logit_lens(rows, target)
        if target.kind == "logit-lens":
            return plain, [plain] * FOLDS
        _, whole, without = ridge.choose(rows.moments[layer], RIDGE_PENALTIES)
        return _with_lens(plain, whole), [_with_lens(plain, one) for one in without]
    read = rows.read_by_probe(layer, where, target.is_pooled)
    taught = taught_by_full_depth(rows, target, where, read.float())
    penalties = PENALTIES if target.full_depth is None else PENALTIES_FOR_PROBABILITIES
    columns = () if target.objects is None else target.objects.link.sizes
    if columns:
        _, whole, without = distil_fields(taught, columns, folds, penalties)
    else:
        _, whole, without = distil(taught, folds, penalties)
    fused = taught.mass is None and taught.subsets is None and not columns

    def head(linear: ridge.Linear) -> Probe:
        rows_of_head = Head(linear.matrix.float().contiguous(), linear.bias.float())
        return Probe(rows_of_head, token_ids=target.label_ids, columns=columns, fused=fused)

    return head(whole), [head(one) for one in without]


def taught_by_full_depth(rows: Rows, target: Target, where: Ints, read: Tensor) -> Taught:
    """What full depth says about the labels of the rows `where`, of which a probe sees `read`."""
    full_depth, subsets = target.full_depth, target.subsets_of(where)
    if target.objects is not None:
        assert rows.values is not None, "those of objects have them"
        mass = None if full_depth is None else torch.ones(len(where))
        return Taught(read, rows.values[where], mass, link=target.objects.link)
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
    probe: Probe,
    states: Tensor,
    subsets: Tensor | None = None,
    promise: Promise = ANSWERS_ALONE,
) -> ProbeAnswers:
    """The answers of `probe` for `states`, which are what `Rows.read_by_probe` returns.

    `subsets`, bool [rows, labels], are the labels that each row is about; None for all.
    """
    if not probe.fused:
        return answers_of_scores(probe, probe.label_scores(states, subsets), promise)
    result = probe.score(probe.readout(states))
    return result.features, Outcome(result.top1_id)


def answers_of_scores(probe: Probe, scores: Tensor, promise: Promise) -> ProbeAnswers:
    """The answers of a label head that has given some rows `scores`; see `answers_of_probe`."""
    assert probe.token_ids is not None
    best = promise.link.best(scores[:, : len(probe.token_ids)])
    tokens = best if isinstance(promise.link, ByField) else probe.token_ids[best]
    labels = probabilities_of_scores(scores, promise.link) if probe.reads_mass else None
    return promise.features(scores), Outcome(tokens, labels=labels)


def logit_lens(rows: Rows, target: Target) -> Probe:
    """The model's own final norm and head, restricted to the target's tokens if it names any."""
    plain, tokens = rows.model.logit_lens, target.label_ids
    if target.first_tokens is not None:
        tokens = target.first_tokens.token_ids
    return plain if tokens is None else plain.of_tokens(tokens)


def _with_lens(plain: Probe, linear: ridge.Linear) -> Probe:
    dtype = plain.head.weight.dtype
    lens = Lens(linear.matrix.T.to(dtype).contiguous(), linear.bias.to(dtype))
    return replace(plain, lens=lens)


def full_depth_objects(rows: Rows) -> Outcome:
    """What full depth writes on each row, with how probable it finds each value of a field."""
    assert rows.values is not None, "those of objects have them"
    values = LabelProbabilities(rows.values, torch.ones(len(rows.values)))
    return Outcome(torch.from_numpy(rows.tokens), labels=values)


def full_depth_labels(
    rows: Rows,
    label_ids: Tensor,
    subsets: Tensor | None = None,
    link: Link = SOFTMAX,
) -> Outcome:
    """What full depth answers on each row, with the probabilities that vLLM returns of its labels.

    They are from logits in the model's dtype, computed from the recorded final states. `subsets`,
    bool [rows, labels], are the labels that each row is about; None for all.
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
