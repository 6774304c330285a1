"""Gates: numbers that requests compare a label's probability with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_adainfer.artifact.fields import Gate, Label
from vllm_adainfer.policy.links import SOFTMAX, Link

FURTHEST = 20.0  # from a gate, in log-odds: beyond it, and without one, all answers are alike


class Gates:
    """The gates of a policy.

    Labels are [rows, labels]: scores, log-probabilities, or both up to a constant by row; -inf for
    a label that a row is not about. Where any number of labels may hold, scores alone.
    """

    def __init__(
        self, gates: Sequence[Gate], labels: Sequence[Label], link: Link = SOFTMAX
    ) -> None:
        """Take `gates` on `labels`, whose scores become probabilities by `link`."""
        self._link = link
        columns = {label.name: column for column, label in enumerate(labels)}
        self._columns = [None if one.label is None else columns[one.label] for one in gates]
        self._odds = [math.log(one.probability / (1 - one.probability)) for one in gates]

    def margins(self, labels: Tensor) -> Tensor:
        """fp32 [rows, gates], how far log-odds among the labels lie above each gate's."""
        best = labels.argmax(dim=1, keepdim=True)
        found = []
        for column, odds in zip(self._columns, self._odds, strict=True):
            chosen = best if column is None else torch.full_like(best, column)
            found.append(self._link.log_odds(labels, chosen) - odds)
        return torch.stack(found, dim=1).float()

    def features(self, labels: Tensor) -> Tensor:
        """What the classifier reads: fp32 [rows, 2], see `GATE_FEATURES`.

        The distance from the nearest gate in log-odds, and the same with its sign: above a gate an
        answer may be surer than as far below it.
        """
        margins = self.margins(labels).clamp(-FURTHEST, FURTHEST)
        nearest = margins.abs().argmin(dim=1, keepdim=True)
        margin = margins.gather(1, nearest)
        return torch.cat([margin.abs(), margin], dim=1)

    def wrong(self, early: Tensor, full: Tensor) -> Tensor:
        """bool [rows], whether an answer is on the other side of a gate than at full depth.

        For a gate on the best label, it is also wrong if another label is best where full depth
        lies above the gate.
        """
        above = self.margins(full) >= 0
        wrong = ((self.margins(early) >= 0) != above).any(dim=1)
        of_best = [column is None for column in self._columns]
        if any(of_best):
            another = early.argmax(dim=1) != full.argmax(dim=1)
            wrong |= another & above[:, of_best].any(dim=1)
        return wrong
