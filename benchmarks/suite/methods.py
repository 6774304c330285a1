"""Other methods of running fewer layers, judged on the same prompts from recorded states.

Their decisions are judged; the time they would take is computed from measured costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.intervals import mean_interval
from vllm_adainfer.arrays import Ints
from vllm_adainfer.offline.calibration.certify.bound import Bound
from vllm_adainfer.offline.calibration.certify.certify import certify
from vllm_adainfer.offline.calibration.certify.path import (
    PathPoint,
    held_out_path,
    threshold_grid,
    threshold_path,
)
from vllm_adainfer.offline.calibration.data.split import Split
from vllm_adainfer.offline.calibration.fit.calibration import Calibration
from vllm_adainfer.offline.calibration.fit.cost import STEP_ROWS, Costs, clock_of, probe_seconds
from vllm_adainfer.offline.calibration.fit.exits import FittedExit, Scored, fit_exits, judge
from vllm_adainfer.offline.calibration.fit.probes import Target, logit_lens
from vllm_adainfer.offline.calibration.fit_policy import FittedPolicy
from vllm_adainfer.offline.calibration.options import PolicyOptions
from vllm_adainfer.offline.calibration.record.rows import Rows
from vllm_adainfer.offline.reports.shares import Interval
from vllm_adainfer.promise.accuracy import RightTokens, is_right

GAP_ALONE = torch.tensor([0.0, 1.0, 0.0])  # a classifier whose score is the gap
EVEN_ODDS = 0.0


@dataclass(frozen=True)
class Outcome:
    """The outcome of a method on the test prompts.

    Answers disagree with the full model's; the speed-up is that of layers, probes and compaction,
    by measured costs.
    """

    accuracy: float
    disagreement: float
    layers_run: float
    layers_saved: float
    layers_saved_95: Interval
    expected_speedup: float


@dataclass(frozen=True)
class TestPart:
    """The prompts that methods are judged on, by their row numbers in the recording.

    `right` are the tokens that count as right, for each prompt of the recording.
    """

    recording: Rows
    prompts: Ints
    right: RightTokens

    def outcome(
        self,
        layers: Sequence[int],
        scored: Sequence[Scored],
        threshold: float,
        costs: Costs,
    ) -> Outcome:
        """The outcome of exiting at the first of `layers` whose score passes `threshold`."""
        [point] = threshold_path(layers, scored, costs.depth, [threshold])
        answers = np.stack([*(exit.tokens for exit in scored), self.recording.tokens[self.prompts]])
        chosen = answers[point.exits, np.arange(len(self.prompts))]
        return Outcome(
            accuracy=float(is_right(chosen, [self.right[row] for row in self.prompts]).mean()),
            disagreement=point.disagreement,
            layers_run=costs.depth * (1 - point.layers_saved),
            layers_saved=point.layers_saved,
            layers_saved_95=mean_interval(
                1 - np.array([*layers, costs.depth])[point.exits] / costs.depth
            ),
            expected_speedup=self._expected_speedup(layers, point, costs),
        )

    def _expected_speedup(self, layers: Sequence[int], point: PathPoint, costs: Costs) -> float:
        tokens = self.recording.computed[self.prompts]
        run = np.array([*layers, costs.depth])[point.exits]
        probes = np.cumsum([costs.probe[layer] for layer in layers])
        asked = np.append(probes, probes[-1])[point.exits]
        cuts = len(layers) * costs.cut * tokens
        seconds = costs.layer * run * tokens + asked + cuts
        return float(costs.layer * costs.depth * tokens.sum() / seconds.sum())

    def scored(self, exit: FittedExit, target: Target) -> Scored:
        """The scores of an exit point on the test prompts."""
        return self.judged(exit, target).scored(exit.classifier)

    def judged(self, exit: FittedExit, target: Target) -> Scored:
        """The answers of an exit point for the test prompts."""
        return judge(exit.probe, exit.layer, self.recording, self.prompts, target=target)

    def scored_by(self, policy: FittedPolicy) -> list[Scored]:
        """The scores of its exit points on the test prompts."""
        return [self.scored(exit, policy.calibration.target) for exit in policy.exits]


def ours(policy: FittedPolicy, epsilon: float, test: TestPart) -> Outcome | None:
    """Our policy at its certified threshold; None if no threshold was certified."""
    if epsilon not in policy.points:
        return None
    layers = [exit.layer for exit in policy.exits]
    scored = test.scored_by(policy)
    return test.outcome(layers, scored, policy.points[epsilon].threshold, policy.costs)


def static_truncation(layers_run: float, target: Target, test: TestPart, costs: Costs) -> Outcome:
    """Stop every prompt at the layer nearest to `layers_run`, and use the model's own head."""
    layer = min(test.recording.states, key=lambda layer: abs(layer - layers_run))
    probe = logit_lens(test.recording, target)
    scored = judge(probe, layer, test.recording, test.prompts).scored(GAP_ALONE)
    return test.outcome([layer], [scored], -np.inf, replace(costs, cut=0.0, probe={layer: 0.0}))


def adainfer(
    split: Split, options: PolicyOptions, costs: Costs, test: TestPart, label_ids: Tensor | None
) -> dict[str, Outcome | None]:
    """AdaInfer's features (the model's own head after every layer) with three exit rules.

    ``adainfer`` is the paper's rule: exit where the SVM says settled; any token may be the answer.
    ``adainfer_labels`` is the same among `label_ids`, which everyone's answers are; None without.
    Where a constant answer is often right, its SVM says settled at once. ``adainfer_certified``
    certifies a threshold on the SVM's log-odds, as our policy does, and ``calm`` (arXiv 2207.07061)
    one on the gap itself, both among the labels if there are some.
    """
    of_any = _by_own_head(split, options, costs, test, None)
    if label_ids is None:
        return {**of_any, "adainfer_labels": None}
    of_labels = _by_own_head(split, options, costs, test, label_ids)
    return {**of_labels, "adainfer": of_any["adainfer"], "adainfer_labels": of_labels["adainfer"]}


def _by_own_head(
    split: Split, options: PolicyOptions, costs: Costs, test: TestPart, label_ids: Tensor | None
) -> dict[str, Outcome | None]:
    """The three rules with the model's own head, read for `label_ids` or for all tokens."""
    recording, bound = test.recording, Bound.promised(options)
    own_head = Target("logit-lens", label_ids)
    after_each = [layer for layer in recording.states if layer > 0]
    own = replace(options, classifier="svm")
    exits = fit_exits(Calibration(recording, own_head, split, own), after_each)
    if not exits:
        return dict.fromkeys(("adainfer", "adainfer_certified", "calm"))
    states = next(iter(recording.states.values()))
    asked = states[: max(1, round(STEP_ROWS / recording.computed.mean()))]
    probe = probe_seconds(exits[0].probe, asked, clock_of(recording.model))
    costs = replace(costs, probe={exit.layer: probe for exit in exits})
    layers = [exit.layer for exit in exits]
    scored = [test.scored(exit, own_head) for exit in exits]

    def certified(exits: list[FittedExit], scored: Sequence[Scored]) -> Outcome | None:
        path = held_out_path(exits, costs.depth, threshold_grid(exits))
        points = certify(path, [options.epsilon], bound)
        return (
            test.outcome(layers, scored, points[options.epsilon].threshold, costs)
            if points
            else None
        )

    on_gap = [
        replace(
            exit,
            classifier=GAP_ALONE,
            fitted=exit.fitted.scored(GAP_ALONE),
            held_out=exit.held_out.scored(GAP_ALONE),
        )
        for exit in exits
    ]
    return {
        "adainfer": test.outcome(layers, scored, EVEN_ODDS, costs),
        "adainfer_certified": certified(exits, scored),
        "calm": certified(on_gap, [row.scored(GAP_ALONE) for row in scored]),
    }
