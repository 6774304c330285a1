"""Methods of the comparison, judged by what they would do with prompts that they have not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.common.intervals import mean_interval
from benchmarks.offline.resamples import exits_on
from benchmarks.suite.methods import Outcome
from vllm_adainfer.arrays import Bools, Floats, Ints
from vllm_adainfer.offline.calibration.certify.bound import Bound
from vllm_adainfer.offline.calibration.certify.path import threshold_path
from vllm_adainfer.offline.calibration.data.split import Split
from vllm_adainfer.offline.calibration.fit.exits import judge
from vllm_adainfer.offline.calibration.fit.probes import Target, logit_lens
from vllm_adainfer.offline.calibration.fit_policy import FittedPolicy
from vllm_adainfer.offline.calibration.record.rows import Rows
from vllm_adainfer.offline.reports.shares import Interval, clopper_pearson

THRESHOLDS = 1 - np.geomspace(1e-6, 0.9, 300)  # the strictest first; chosen before any data


@dataclass(frozen=True)
class Unseen:
    """The prompts that test: their numbers among all, the model's answers, the right tokens."""

    rows: Ints
    teacher: Ints
    rights: Sequence[set[int]]

    @property
    def stock_accuracy(self) -> float:
        """Of the whole model."""
        return self._share_right(self.teacher)

    def result(self, answers: Ints, spared: Floats, by_request: bool) -> dict[str, Any]:
        """The outcome of a method, as a row of the report.

        `spared` [tests] is the share of the model's layers that each answer does not run, and may
        be negative; `by_request`: requests are spared whole, or not at all.
        """
        count, changed = len(answers), int((answers != self.teacher).sum())
        interval: Interval = mean_interval(spared)
        if by_request:
            interval = clopper_pearson(float(spared.sum()), count)
        return {
            "spared": float(spared.mean()),
            "spared_95": interval,
            "changed": changed / count,
            "changed_95": clopper_pearson(changed, count),
            "accuracy": self._share_right(answers),
        }

    def outcome(self, found: Outcome | None) -> dict[str, Any]:
        """The same for a method of the suite; nothing is spared where nothing was certified."""
        if found is None:
            return self.result(self.teacher, np.zeros(len(self.rows)), by_request=False)
        count = len(self.rows)
        row = asdict(found)
        return {
            "spared": row["layers_saved"],
            "spared_95": row["layers_saved_95"],
            "changed": row["disagreement"],
            "changed_95": clopper_pearson(round(row["disagreement"] * count), count),
            "accuracy": row["accuracy"],
        }

    def _share_right(self, answers: Ints) -> float:
        pairs = zip(answers.tolist(), self.rights, strict=True)
        return float(np.mean([answer in right for answer, right in pairs]))


def certified_threshold(differs: Bools, sure: Floats, bound: Bound, epsilon: float) -> float:
    """The lowest confidence at which an answer may be given instead of the model's.

    At most `epsilon` of all requests may then be answered otherwise. It is infinite if nothing can
    be certified. `differs` and `sure` [rows] are of rows that nothing was fitted to.
    """
    found = np.inf
    for threshold in THRESHOLDS:
        if not bound.holds((differs & (sure >= threshold)).astype(np.float64), epsilon):
            break
        found = float(threshold)
    return found


def of_policy(policy: FittedPolicy, epsilon: float, tests: Unseen) -> dict[str, Any]:
    """The outcome of one of our policies."""
    exits, depth = exits_on(policy, tests.rows), policy.costs.depth
    layers = [exit.layer for exit in exits]
    held_out = [exit.held_out for exit in exits]
    [point] = threshold_path(layers, held_out, depth, [policy.points[epsilon].threshold])
    spared = 1 - np.array([*layers, depth])[point.exits] / depth
    return tests.result(point.answers, spared, by_request=layers == [0])


def static_truncation(
    recording: Rows, target: Target, split: Split, bound: Bound, epsilon: float, tests: Unseen
) -> dict[str, Any]:
    """Stop every prompt after the first layer from which on the model's own head is certified.

    Deeper layers are tested first. `target` is that of heads that read a last token.
    """
    probe, depth, last = logit_lens(recording, target), recording.model.depth, recording.model.depth
    for layer in sorted(recording.states, reverse=True):
        losses = judge(probe, layer, recording, split.certify, target=target).loss
        if not bound.holds(losses, epsilon):
            break
        last = layer
    if last == depth:
        return tests.outcome(None) | {"layers": depth}
    answers = judge(probe, last, recording, tests.rows, target=target).tokens
    spared = np.full(len(answers), 1 - last / depth)
    return tests.result(answers, spared, by_request=False) | {"layers": last}
