"""What a policy is made from: rows, target, split and options; and its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.artifact.fields import Label, SharedTokens
from vllm_adainfer.artifact.outputs import AnyOutput, Tokens
from vllm_adainfer.offline.calibration.data.split import Split
from vllm_adainfer.offline.calibration.data.student_base import StudentBase
from vllm_adainfer.offline.calibration.fit.probes import Target
from vllm_adainfer.offline.calibration.options import PolicyOptions
from vllm_adainfer.offline.calibration.record.rows import Rows
from vllm_adainfer.policy.guesser import Guesser
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.policy.questions import End
from vllm_adainfer.promise.accuracy import RightTokens
from vllm_adainfer.promise.changed import Changed

TOGETHER = 64  # prompts whose states are in memory at once


ANY_TOKEN = Tokens(candidates="full")


@dataclass(frozen=True)
class TrainedProbe:
    """A probe with an encoder, a student's or a branch's, trained on the rows that fit.

    Attributes:
        layer: the layer after which it decides; 0 for a student.
        probe: the probe, as it is served.
        unseen: fp32 [rows that fit, scores]: those of one that was trained on the other half of
            them; 0 where it has nothing to read.
        inputs: what it reads of prompts, the text or the states of each. It is not asked about
            those that have none.
        base: what a student was trained from; None for a branch.
        name: the size of a student, in words.

    """

    layer: int
    probe: Probe
    unseen: Tensor
    inputs: Callable[[Ints], Sequence[Any]]
    base: StudentBase | None = None
    name: str = ""

    def asked(self, prompts: Ints) -> Bools:
        """[prompts], whether it is asked about each."""
        return np.array([len(one) > 0 for one in self.inputs(prompts)], dtype=np.bool_)

    def scores(self, prompts: Ints, subsets: Tensor | None) -> Tensor:
        """Scores of `prompts`, see `Probe.label_scores`; 0 where it is not asked."""
        inputs, asked = self.inputs(prompts), np.flatnonzero(self.asked(prompts))
        scores = torch.zeros(len(prompts), self.probe.head.size)
        together = TOGETHER if self.base is None else max(1, len(prompts))
        for start in range(0, len(asked), together):
            some = asked[start : start + together]
            read = [inputs[place] for place in some.tolist()]
            own = None if subsets is None else subsets[some]
            if self.base is None:
                rows, lens = self.probe.project(torch.cat(read)), np.array([len(o) for o in read])
                scores[some] = self.probe.label_scores(rows, own, lens)
            else:
                scores[some] = self.probe.label_scores(scores[:0], own, texts=read)
        return scores


@dataclass(frozen=True)
class Calibration:
    """The data and options that a policy is made from.

    Attributes:
        rows: what full depth did with all prompts.
        target: the probes' target.
        split: the prompts that fit, and those that certify.
        options: the options asked for.
        output: what requests ask for that the policy is to serve.
        right: the right tokens by prompt, if the risk is of accuracy.
        pooled_from: see `ArtifactConfig.pooled_from`; None unless the probes are pooled.
        questions: the question of each prompt, if prompts are requests; else empty.
        ends: question -> the tokens that its prompts end with, if it can be recognised by them.
        trained: a student, which decides before the first layer, and branches, which decide in
            place of heads, each after another layer.
        shared: see `ArtifactConfig.shared`; empty for a policy that serves any prompt.
        guesser: what guesses the objects that are decided; None for other answers.

    """

    rows: Rows
    target: Target
    split: Split
    options: PolicyOptions
    output: AnyOutput = ANY_TOKEN
    right: RightTokens | None = None
    pooled_from: int | None = None
    questions: Sequence[str] = ()
    ends: Mapping[str, tuple[End, ...]] = field(default_factory=dict)
    trained: tuple[TrainedProbe, ...] = ()
    shared: SharedTokens = field(default_factory=SharedTokens)
    guesser: Guesser | None = None

    @property
    def labels(self) -> tuple[Label, ...]:
        """The answers, if there is a fixed set of them."""
        return self.output.labels

    @property
    def any_exit_point(self) -> bool:
        """Whether the bounds are to hold whichever exit point is asked.

        Of texts, where a device serves them: there a decode step asks at one exit point.
        """
        options = self.options
        return (
            self.rows.model.device != "cpu"
            and options.max_tokens > 1
            and options.classifier != "crf"  # which remembers what it read before
            and isinstance(options.promise, Changed)
            and not options.label_bounds
        )

    @cached_property
    def fitted(self) -> Ints:
        """The decision rows of the prompts that fit."""
        return self.rows.of(self.split.fit)

    @cached_property
    def held_out(self) -> Ints:
        """The decision rows of the prompts that certify."""
        return self.rows.of(self.split.certify)
