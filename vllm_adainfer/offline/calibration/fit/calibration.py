"""What a policy is made from: rows, target, split and options; and its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from torch import Tensor

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.artifact.fields import Label, SharedTokens
from vllm_adainfer.artifact.kinds import ClassifierKind, ScoreHead
from vllm_adainfer.offline.calibration.data.choices import Choices
from vllm_adainfer.offline.calibration.data.split import Split
from vllm_adainfer.offline.calibration.fit.probes import Target
from vllm_adainfer.offline.calibration.options import PolicyOptions
from vllm_adainfer.offline.calibration.record.rows import FOLDS, Rows
from vllm_adainfer.policy.branch import Branch
from vllm_adainfer.policy.questions import End
from vllm_adainfer.policy.student import Student
from vllm_adainfer.promise.accuracy import RightTokens


class TrainedProbe(Protocol):
    """A student or a branch that was trained on the rows that fit."""

    @property
    def layer(self) -> int:
        """The layer after which it decides."""

    @property
    def probe(self) -> Student | Branch:
        """The probe, as it is served."""

    @property
    def unseen(self) -> Tensor:
        """fp32 [rows that fit, scores]: those of one that was trained on the other half of them."""

    def asked(self, prompts: Ints) -> Bools:
        """[prompts], whether it is asked about each."""

    def scores(self, prompts: Ints, subsets: Tensor | None) -> Tensor:
        """Scores of the labels for `prompts`, see `LabelHead.score`."""


@dataclass(frozen=True)
class Calibration:
    """The data and options that a policy is made from.

    Attributes:
        rows: what full depth did with all prompts.
        target: the probes' target.
        split: the prompts that fit, and those that certify.
        options: the options asked for.
        labels: the answers, if there is a fixed set of them.
        right: the right tokens by prompt, if the risk is of accuracy.
        choices: the texts and their first tokens, if requests choose from texts.
        pooled_from: see `ArtifactConfig.pooled_from`; None unless the probes are pooled.
        questions: the question of each prompt, if prompts are requests; else empty.
        ends: question -> the tokens that its prompts end with, if it can be recognised by them.
        trained: a student, which decides before the first layer, and branches, which decide in
            place of heads, each after another layer.
        score_head: see `ArtifactConfig.score_head`.
        shared: see `ArtifactConfig.shared`; empty for a policy that serves any prompt.

    """

    rows: Rows
    target: Target
    split: Split
    options: PolicyOptions
    labels: tuple[Label, ...] = ()
    right: RightTokens | None = None
    choices: Choices | None = None
    pooled_from: int | None = None
    questions: Sequence[str] = ()
    ends: Mapping[str, tuple[End, ...]] = field(default_factory=dict)
    trained: tuple[TrainedProbe, ...] = ()
    score_head: ScoreHead | None = None
    shared: SharedTokens = field(default_factory=SharedTokens)

    @cached_property
    def fitted(self) -> Ints:
        """The decision rows of the prompts that fit."""
        return self.rows.of(self.split.fit)

    @cached_property
    def held_out(self) -> Ints:
        """The decision rows of the prompts that certify."""
        return self.rows.of(self.split.certify)

    @property
    def folds(self) -> Ints:
        """[rows that fit], 0 to `FOLDS`: a probe is judged on rows of the fold it has not seen.

        The sums that tuned lenses learn from are by prompt; else no group of prompts is torn.
        """
        prompts = self.rows.prompts[self.fitted]
        folds: Ints = (prompts if self.rows.moments else self.split.units[prompts]) % FOLDS
        return folds

    @property
    def halves(self) -> Ints:
        """[rows that fit], 0 or 1: two halves, between which no group of prompts is torn."""
        halves: Ints = self.split.units[self.rows.prompts[self.fitted]] % 2
        return halves

    @property
    def linear(self) -> ClassifierKind:
        """The kind of classifier of one exit point; a CRF is over several, see `fit_crf_chain`."""
        return "svm" if self.options.classifier == "crf" else self.options.classifier

    @property
    def with_mass(self) -> bool:
        """Whether probabilities in the whole vocabulary are promised."""
        return self.target.promise.covers_mass
