"""A policy as the exit loop sees it, and the rows that it decides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.policy.answers import Answers
from vllm_adainfer.policy.probe import NO_LENS, Probe
from vllm_adainfer.policy.score import is_chain, score
from vllm_adainfer.promise.changed import Changed
from vllm_adainfer.promise.promise import Outcome, Promise


@dataclass(frozen=True)
class Decision:
    """A policy's decision about some rows at an exit point.

    Attributes:
        settled: bool [rows], True where the answer is decided.
        answers: the answers of these rows, valid where they are settled.
        codes: int64 [rows], the answer of each row as a number, see `ByField.code`, settled or not;
            None but for objects.
        memory: [rows, ...], passed back to the policy with these rows at the next exit point;
            None if it needs none.

    """

    settled: Tensor
    answers: Answers
    memory: Tensor | None = None
    codes: Tensor | None = None

    @classmethod
    def by_score(
        cls,
        features: Tensor,
        classifier: Tensor,
        threshold: Tensor,
        memory: Tensor | None,
        answers: Answers,
    ) -> Decision:
        """Settle the rows whose classifier score reaches their `threshold`, [rows]."""
        odds = score(features, classifier, memory)
        chained = is_chain(classifier, features)
        return cls(odds >= threshold, answers, memory=odds if chained else None)


@dataclass(frozen=True)
class UndecidedRows:
    """Rows at an exit point for a policy to decide.

    Attributes:
        hidden: what the probe reads. The state of the last token: [rows, hidden size], the residual
            stream. The whole prompt: fp32 [rows, 2 x hidden size], the normed state of the last
            token and the mean of those of the prompt. Each token of the prompt: what the branch
            has projected its state to, [tokens of all rows, width]. Unused where it reads the text.
            Of an object, the first two are [rows, fields, width], with the state of the row that
            each field is read at in place of the last token's.
        threshold_rows: int64 [rows], the row of the policy's thresholds that applies to each.
        memory: `Decision.memory` of these rows from the previous exit point; None at the first.
        subsets: int64 [rows], the labels that each row's request names, as bits; None if no policy
            of the engine has a label pool. Policies without one ignore it.
        texts: for a student the text of each row, in its tokens; none is empty.
        lens: for a branch the tokens of each row, [rows].

    """

    hidden: Tensor
    threshold_rows: Tensor
    memory: Tensor | None = None
    subsets: Tensor | None = None
    texts: Sequence[Sequence[int]] = ()
    lens: Ints = field(default_factory=lambda: NO_LENS)


class ExitPolicy(ABC):
    """A policy as the exit loop sees it.

    Attributes:
        exit_points: layers after which the exit loop calls `decide`, ascending.
        num_threshold_rows: the number of threshold rows: one per level, or per level and question.
        probe_inputs: what it reads at each exit point.
        probes: the probe of each exit point; none of a policy without probes.
        decides_objects: whether an answer is an object, each field of which is read at a row of its
            own; else answers are read at the last row.
        promise: what is promised of the answers.
        answers_stand: whether what it has settled is answered early even where the request stays
            to full depth: what it promises holds only so (see `Promise.answers_stand`), or
            the early answer spares the LM head a scan of the whole vocabulary.
        any_exit_point: whether the promise holds whichever exit point is asked; else only where
            all before it were.

    """

    exit_points: tuple[int, ...]
    num_threshold_rows: int
    probe_inputs: tuple[ProbeInput, ...]
    probes: Sequence[Probe] = ()
    decides_objects: bool = False
    promise: Promise = Changed()
    answers_stand: bool = False
    any_exit_point: bool = False

    @abstractmethod
    def decide(self, exit_index: int, rows: UndecidedRows) -> Decision:
        """Decide which rows are settled at exit point ``exit_points[exit_index]``."""

    def early(self, answers: Answers, head: Callable[[Tensor], Tensor]) -> Outcome:
        """What rows with these answers are answered with; `head` is as for `Answers.best`."""
        return Outcome(answers.best(head))

    def full_depth(self, logits: Tensor, answers: Answers | None) -> Outcome:
        """What rows with these early answers are answered with at full depth.

        `logits` are [rows, vocabulary] at full depth. Rows may have no answers where an order is
        promised.
        """
        assert answers is not None
        return Outcome(answers.best_at_full_depth(logits))

    def best_labels(self, logits: Tensor, subsets: Tensor | None) -> Tensor:
        """int64 [rows], the place of the label that full depth answers with, of those it has.

        `logits` are [rows, vocabulary] at full depth; `subsets` are as in `UndecidedRows`.
        """
        raise NotImplementedError
