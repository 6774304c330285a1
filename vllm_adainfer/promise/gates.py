"""A promise about gates: numbers that requests compare a label's probability with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.artifact.fields import Gate, Label
from vllm_adainfer.artifact.kinds import GATE_FEATURES
from vllm_adainfer.promise.links import SOFTMAX, Link
from vllm_adainfer.promise.promise import Outcome, Promise

FURTHEST = 20.0  # from a gate, in log-odds: beyond it, and without one, all answers are alike


class Gates(Promise):
    """At most epsilon of the answers have a probability on the other side of a gate.

    Labels are [rows, labels]: scores, log-probabilities, or both up to a constant by row; -inf for
    a label that a row is not about. Where any number of labels may hold, scores alone.

    Attributes:
        gates: the gates.

    """

    risk = "probability"
    feature_names = GATE_FEATURES
    best_may_change = True
    right_about = "probabilities are right about their side of the gates, not in value"

    def __init__(
        self,
        gates: Sequence[Gate],
        labels: Sequence[Label],
        link: Link = SOFTMAX,
        vocabulary: int | None = None,
    ) -> None:
        """Take `gates` on `labels`, whose scores become probabilities by `link`.

        `vocabulary` is its size, for the logits of answers; None if the labels are all there is.
        """
        self.gates, self.link, self.vocabulary = tuple(gates), link, vocabulary
        self._num_labels = len(labels)
        columns = {label.name: column for column, label in enumerate(labels)}
        self._columns = [None if one.label is None else columns[one.label] for one in gates]
        self._odds = [math.log(one.probability / (1 - one.probability)) for one in gates]

    def margins(self, labels: Tensor) -> Tensor:
        """fp32 [rows, gates], how far log-odds among the labels lie above each gate's."""
        best = labels.argmax(dim=1, keepdim=True)
        found = []
        for column, odds in zip(self._columns, self._odds, strict=True):
            chosen = best if column is None else torch.full_like(best, column)
            found.append(self.link.log_odds(labels, chosen) - odds)
        return torch.stack(found, dim=1).float()

    @override
    def features(self, scores: Tensor) -> Tensor:
        """The distance from the nearest gate in log-odds, and the same with its sign.

        Above a gate an answer may be surer than as far below it. See `GATE_FEATURES`.
        """
        margins = self.margins(scores[:, :-1]).clamp(-FURTHEST, FURTHEST)
        nearest = margins.abs().argmin(dim=1, keepdim=True)
        margin = margins.gather(1, nearest)
        return torch.cat([margin.abs(), margin], dim=1)

    @property
    @override
    def serves_best(self) -> bool:
        """Of two labels, a gate at 0.5 on one decides which is best."""
        decides = [one for one in self.gates if one.label is not None and one.probability == 0.5]
        return self._num_labels == 2 and bool(decides)

    @override
    def admits(self) -> dict[str, object]:
        return super().admits() | {"its gates": set(self.gates)}

    @override
    def wrong(self, early: Outcome, full: Outcome) -> Tensor:
        """Whether an answer is on the other side of a gate than at full depth.

        For a gate on the best label, it is also wrong if another label is best where full depth
        lies above the gate.
        """
        here, there = self._scores(early), self._scores(full)
        above = self.margins(there) >= 0
        wrong = ((self.margins(here) >= 0) != above).any(dim=1)
        of_best = [column is None for column in self._columns]
        if any(of_best):
            another = here.argmax(dim=1) != there.argmax(dim=1)
            wrong |= another & above[:, of_best].any(dim=1)
        return wrong

    def _scores(self, outcome: Outcome) -> Tensor:
        if outcome.scores is not None:
            return outcome.scores
        assert outcome.labels is not None
        return self.link.scores_of(outcome.labels.among)

    @override
    def words(self) -> str:
        return " or ".join(self._words_of(gate) for gate in self.gates)

    def _words_of(self, gate: Gate) -> str:
        """Which answers are on the wrong side of a gate."""
        side = f"on the other side of {gate.probability:g} than at full depth"
        if not self.link.one_holds:
            return f"the probability of {gate.label} {side}"
        if gate.label is None:
            return (
                f"the best label's probability among the labels {side}, or another best label "
                "where full depth's is above"
            )
        return f"the probability of {gate.label} among the labels {side}"
