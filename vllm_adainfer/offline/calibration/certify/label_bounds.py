"""Promises about one label, beside the one about all answers: recall and precision.

Both are about a share of some rows: those that full depth answers with the label, or those that
are answered with it. At one threshold these rows are independent draws like all others, so the
same bound holds for the share of them that changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_adainfer.arrays import Floats, Ints
from vllm_adainfer.artifact.fields import LabelBound, LabelRisk
from vllm_adainfer.offline.calibration.certify.bound import Bound


@dataclass(frozen=True)
class LabelTest:
    """Tests a `LabelBound` on held-out rows.

    Attributes:
        promise: what is promised.
        token: the token that stands for its label.
        bound: the bound, on all held-out rows.

    """

    promise: LabelBound
    token: int
    bound: Bound

    def holds(self, answers: Ints, full: Ints) -> bool:
        """Whether the rows certify the promise; both arguments are tokens, int64 [rows]."""
        bound, losses = self._on(answers, full)
        return bound.holds(losses, self.promise.epsilon)

    def risk(self, answers: Ints, full: Ints) -> LabelRisk:
        """What rows that certify the promise say of it."""
        bound, losses = self._on(answers, full)
        return LabelRisk(
            rows=len(losses),
            risk=float(losses.mean()),
            bound=bound.within(self.promise.epsilon, losses),
        )

    def rows_held(self, full: Ints) -> int:
        """The rows that full depth answers with the label; those that repeat another do not count.

        `full` is int64 [held-out rows], its answers.
        """
        about, repeats = full == self.token, self.bound.repeats
        return int(np.count_nonzero(about if repeats is None else about & ~repeats))

    def rows_needed(self, full: Ints) -> int:
        """The fewest rows that certify the promise if no answer changes."""
        rows = int(np.count_nonzero(full == self.token))
        return self.bound.of_rows(full == self.token).groups_needed(rows, self.promise.epsilon)

    def _on(self, answers: Ints, full: Ints) -> tuple[Bound, Floats]:
        rows = self.promise.chosen_by(answers, full) == self.token
        return self.bound.of_rows(rows), (answers != full)[rows].astype(np.float64)
