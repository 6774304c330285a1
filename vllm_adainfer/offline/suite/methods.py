"""What other ways to run fewer layers would have done on the same prompts, from recorded states.

They are judged by their decisions; the time they would take is reckoned from measured costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vllm_adainfer.offline.calibration.certify import Bound, PathPoint, certify, walk
from vllm_adainfer.offline.calibration.collect import Ints, Recording
from vllm_adainfer.offline.calibration.cost import Costs, probe_seconds
from vllm_adainfer.offline.calibration.fit import (
    FittedExit,
    RightTokens,
    Scored,
    fit_exits,
    is_right,
    judge,
)
from vllm_adainfer.offline.calibration.policy import STEP_ROWS, FittedPolicy
from vllm_adainfer.offline.calibration.probes import Target, logit_lens

GAP_ALONE = torch.tensor([0.0, 1.0, 0.0])  # a classifier: the gap is the score
EVEN_ODDS = 0.0


@dataclass(frozen=True)
class Outcome:
    """A method on the test prompts.

    Attributes:
        accuracy: share of right answers.
        disagreement: share of answers that are not the full model's.
        layers_run: mean number.
        layers_saved: share.
        expected_speedup: in layers, probes and cuts, by measured costs.

    """

    accuracy: float
    disagreement: float
    layers_run: float
    layers_saved: float
    expected_speedup: float


@dataclass(frozen=True)
class TestPart:
    """The prompts of a recording to judge methods on."""

    recording: Recording
    prompts: Ints
    right: RightTokens

    def outcome(
        self,
        layers: Sequence[int],
        scored: Sequence[Scored],
        threshold: float,
        costs: Costs,
    ) -> Outcome:
        """The policy that leaves at the first of `layers` whose score passes `threshold`."""
        [point] = walk(layers, scored, costs.depth, [threshold])
        answers = np.stack([*(exit.tokens for exit in scored), self.recording.tokens[self.prompts]])
        chosen = answers[point.exits, np.arange(len(self.prompts))]
        return Outcome(
            accuracy=float(is_right(chosen, self.right, self.prompts).mean()),
            disagreement=point.disagreement,
            layers_run=costs.depth * (1 - point.layers_saved),
            layers_saved=point.layers_saved,
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

    def scored(self, exit: FittedExit) -> Scored:
        """What an exit point says of the test prompts."""
        return judge(exit.probe, exit.layer, self.recording, self.prompts).scored(exit.classifier)


def ours(policy: FittedPolicy, epsilon: float, test: TestPart) -> Outcome | None:
    """The policy at its certified threshold; None if nothing was certified."""
    if epsilon not in policy.points:
        return None
    layers = [exit.layer for exit in policy.exits]
    scored = [test.scored(exit) for exit in policy.exits]
    return test.outcome(layers, scored, policy.points[epsilon].threshold, policy.costs)


def static_truncation(layers_run: float, target: Target, test: TestPart, costs: Costs) -> Outcome:
    """Every prompt stops at the layer nearest to `layers_run`, read by the model's own head."""
    layer = min(test.recording.states, key=lambda layer: abs(layer - layers_run))
    probe = logit_lens(test.recording, target)
    scored = judge(probe, layer, test.recording, test.prompts).scored(GAP_ALONE)
    return test.outcome([layer], [scored], -np.inf, replace(costs, cut=0.0, probe={layer: 0.0}))


def adainfer(
    halves: tuple[Ints, Ints],
    target: Target,
    epsilon: float,
    bound: Bound,
    costs: Costs,
    test: TestPart,
    seed: int,
) -> dict[str, Outcome | None]:
    """AdaInfer's features: the whole head after every layer; by three rules of leaving.

    ``adainfer`` is the paper's: leave where the SVM says settled. ``adainfer_certified`` has one
    threshold on the SVM's log odds certified as ours are, ``calm`` (arXiv 2207.07061) one on
    the gap itself.
    """
    recording, depth = test.recording, costs.depth
    open_target = Target("logit-lens", None)
    exits = fit_exits(recording, open_target, halves, "svm", seed, recording.states)
    if not exits:
        return dict.fromkeys(("adainfer", "adainfer_certified", "calm"))
    states = next(iter(recording.states.values()))
    asked = states[: max(1, round(STEP_ROWS / recording.computed.mean()))]
    probe = probe_seconds(exits[0].probe, asked, recording.threads)
    costs = replace(costs, probe={exit.layer: probe for exit in exits})
    layers = [exit.layer for exit in exits]
    scored = [test.scored(exit) for exit in exits]

    def certified(exits: list[FittedExit], scored: Sequence[Scored]) -> Outcome | None:
        point = certify(exits, depth, epsilon, bound)
        return None if point is None else test.outcome(layers, scored, point.threshold, costs)

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


def agreement_curve(policy: FittedPolicy, target: Target, test: TestPart) -> dict[str, list[float]]:
    """Share of test answers equal to the full model's, were every prompt to leave there.

    Returns:
        ``layers``, and by those our ``probe`` and the ``logit_lens``.

    """
    plain = logit_lens(test.recording, target)

    def agrees(exit: FittedExit, lens: bool) -> float:
        probe = plain if lens else exit.probe
        return float(judge(probe, exit.layer, test.recording, test.prompts).agrees.mean())

    return {
        "layers": [exit.layer for exit in policy.candidates],
        "probe": [agrees(exit, lens=False) for exit in policy.candidates],
        "logit_lens": [agrees(exit, lens=True) for exit in policy.candidates],
    }


def risk_coverage(
    policy: FittedPolicy, test: TestPart, thresholds: Sequence[float]
) -> dict[str, list[float]]:
    """Layers saved and disagreement of our policy on the test prompts along its threshold."""
    layers = [exit.layer for exit in policy.exits]
    scored = [test.scored(exit) for exit in policy.exits]
    path = list(walk(layers, scored, policy.costs.depth, thresholds))
    return {
        "layers_saved": [point.layers_saved for point in path],
        "disagreement": [point.disagreement for point in path],
    }
