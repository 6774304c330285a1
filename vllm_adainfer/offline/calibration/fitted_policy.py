"""A policy made from a recording: fit, choose exit points, certify; then its artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.certify import (
    EPSILONS,
    Bound,
    PathPoint,
    certify,
    held_out_path,
)
from vllm_adainfer.offline.calibration.choose import choose_exits, evenly_spread, forecast
from vllm_adainfer.offline.calibration.collect import Ints, Recording
from vllm_adainfer.offline.calibration.cost import Costs, head_seconds, probe_seconds
from vllm_adainfer.offline.calibration.fit import FittedExit, RightTokens, chain, fit_exits
from vllm_adainfer.offline.calibration.probes import Target
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.policy.artifact import ArtifactConfig, Label, Level
from vllm_adainfer.policy.bound import BoundKind
from vllm_adainfer.policy.classifier import Kind
from vllm_adainfer.policy.probe import FEATURES

Risk = Literal["disagreement", "accuracy"]
STEP_ROWS = 2048  # token rows of a full step, vLLM's default on a CPU
HEAD_ROWS = 128  # tokens that a full step yields, likewise


@dataclass(frozen=True)
class PolicyOptions:
    """What a policy is to be and to promise; see `vllm-adainfer calibrate --help`."""

    classifier: Kind = "svm"
    exit_points: tuple[int, ...] | None = None
    epsilon: float = 0.02
    delta: float = 0.1
    risk: Risk = "disagreement"
    bound: BoundKind | Literal["auto"] = "auto"
    seed: int = 0
    max_tokens: int = 1

    def bounds(self, prompts: Ints | None = None) -> Bound:
        """The bound that `risk` and `bound` ask for.

        Args:
            prompts: [held-out rows], the prompt of each, where more than one token is generated.

        Raises:
            AdaInferError: the exact bound for accuracy, whose losses may be negative, or for
                several tokens of a prompt, which are not independent.

        """
        disagreement, generated = self.risk == "disagreement", self.max_tokens > 1
        if self.bound == "exact" and generated:
            raise AdaInferError(
                "--bound exact counts independent answers, and tokens of one text are not: use "
                "wsr, hoeffding-bentkus or auto with --max-tokens"
            )
        if generated and not disagreement:
            raise AdaInferError(
                "--risk accuracy looks at one-token answers: drop --max-tokens or bound the "
                "disagreement"
            )
        if self.bound == "exact" and not disagreement:
            raise AdaInferError(
                "--bound exact counts changed answers and cannot bound the accuracy lost: use wsr, "
                "hoeffding-bentkus or auto"
            )
        kind = self.bound
        if kind == "auto":
            kind = "exact" if disagreement and not generated else "wsr"
        lowest = 0.0 if disagreement else -1.0
        return Bound(kind, self.delta, lowest, prompts if generated else None, self.max_tokens)


@dataclass(frozen=True)
class FittedPolicy:
    """A policy and how it did on the prompts it was made from.

    Attributes:
        exits: the chosen exit points, by layer; none if no set of them is worth its cost.
        points: epsilon -> the loosest policy certified for it on the held-out half.
        candidates: all fitted exit points.
        costs: that the choice was made with.
        expected: expected times of a prompt, in seconds: ``full_depth``, ``chosen``, ``uniform``
            (as many exit points, evenly spread).

    """

    exits: list[FittedExit]
    points: dict[float, PathPoint]
    candidates: list[FittedExit]
    costs: Costs
    expected: dict[str, float]


def make_policy(
    recording: Recording,
    target: Target,
    halves: tuple[Ints, Ints],
    options: PolicyOptions,
    right: RightTokens | None = None,
) -> FittedPolicy:
    """Fit every recorded layer, choose among them, certify every epsilon that can be.

    Args:
        recording: of all prompts.
        target: what the probes are to predict.
        halves: prompts of `recording` to fit on, and to certify on, each in random order.
        options: what is wanted.
        right: right tokens by prompt, where the risk is of accuracy.

    """
    fit_half, held_out = halves = _rows_of(recording, halves)
    depth = recording.depth
    layers = tqdm(recording.states, desc="fit", unit="layer", disable=None)
    candidates = fit_exits(
        recording, target, halves, options.classifier, options.seed, layers, right
    )
    tokens = recording.computed[fit_half]
    if options.max_tokens > 1:  # at later tokens a layer's weights are what takes its time
        tokens = np.ones_like(tokens)
    states = next(iter(recording.states.values()))
    asked = states[: max(1, round(STEP_ROWS / tokens.mean()))]
    costs = Costs(
        depth=depth,
        layer=recording.layer_seconds,
        cut=recording.cut_seconds,
        probe={
            exit.layer: probe_seconds(exit.probe, asked, recording.threads) for exit in candidates
        },
        head=head_seconds(recording.logit_lens, asked[:HEAD_ROWS], recording.threads)
        if options.max_tokens > 1
        else 0.0,
    )
    bound = options.bounds(recording.prompts[held_out])
    allowed = bound.allowance(len(held_out), options.epsilon)
    exits = candidates
    if options.exit_points is None:
        exits = choose_exits(candidates, costs, tokens, allowed)
    expected = {
        "full_depth": forecast([], costs, tokens, allowed).seconds,
        "chosen": forecast(exits, costs, tokens, allowed).seconds,
        "uniform": forecast(evenly_spread(candidates, len(exits)), costs, tokens, allowed).seconds,
    }
    if options.classifier == "crf" and exits:
        exits = chain(exits)
    points: dict[float, PathPoint] = {}
    for epsilon in sorted({*EPSILONS, options.epsilon}) if exits else ():
        point = certify(exits, depth, epsilon, bound)
        if point is not None:
            points[epsilon] = point
    return FittedPolicy(exits, points, candidates, costs, expected)


def _rows_of(recording: Recording, halves: tuple[Ints, Ints]) -> tuple[Ints, Ints]:
    """Decision rows of both halves."""
    return recording.rows_of(halves[0]), recording.rows_of(halves[1])


def policy_config(
    policy: FittedPolicy,
    recording: Recording,
    target: Target,
    halves: tuple[Ints, Ints],
    options: PolicyOptions,
    labels: Sequence[Label],
    model: str,
    hf_config: Any,
) -> ArtifactConfig:
    """``config.json`` of a policy that certified ``options.epsilon``."""
    bound = options.bounds(recording.prompts[_rows_of(recording, halves)[1]])
    shortlist = target.label_ids is not None and not labels
    head_size = recording.logit_lens.head_weight.shape[1]
    return ArtifactConfig(
        base_model=model,
        architecture=hf_config.architectures[0],
        layers=policy.costs.depth,
        hidden_size=hf_config.hidden_size,
        vocab_size=hf_config.vocab_size,
        head_size=None if head_size == hf_config.hidden_size else head_size,
        weights_fingerprint=recording.fingerprint,
        exit_points=tuple(exit.layer for exit in policy.exits),
        probe=target.kind,
        candidates="labels" if labels else "shortlist" if shortlist else "full",
        labels=tuple(labels),
        features=FEATURES,
        classifier=options.classifier,
        epsilon=options.epsilon,
        delta=options.delta,
        risk=options.risk,
        bound=bound.kind,
        max_tokens=options.max_tokens,
        levels=tuple(
            Level(
                epsilon=epsilon,
                disagreement=point.disagreement,
                risk=point.risk,
                bound=bound.of(point.losses),
                layers_saved=point.layers_saved,
            )
            for epsilon, point in policy.points.items()
        ),
    )


def oracle_layers_run(policy: FittedPolicy) -> float:
    """Mean depth on the held-out half if each row left where its answer is first the full model's.

    Of all candidates: the room that a perfect classifier would have.
    """
    agrees = np.stack([exit.held_out.agrees for exit in policy.candidates])
    layers = np.array([*(exit.layer for exit in policy.candidates), policy.costs.depth])
    first = np.where(agrees.any(axis=0), agrees.argmax(axis=0), len(agrees))
    return float(layers[first].mean())


def policy_tensors(
    policy: FittedPolicy, target: Target, labels: Sequence[Label]
) -> dict[str, Tensor]:
    """What ``policy.safetensors`` holds."""
    thresholds = torch.tensor([point.threshold for point in policy.points.values()])
    tensors = {"thresholds": thresholds.unsqueeze(1).repeat(1, len(policy.exits))}
    if target.label_ids is not None and not labels:
        tensors["shortlist"] = target.label_ids
    for exit in policy.exits:
        name, probe = f"exit.{exit.layer}", exit.probe
        tensors[f"{name}.classifier"] = exit.classifier
        if probe.head_bias is not None:  # a label head
            tensors[f"{name}.head_weight"] = probe.head_weight
            tensors[f"{name}.head_bias"] = probe.head_bias
            continue
        for part, tensor in probe.lens.items():
            tensors[f"{name}.{part}"] = tensor
        if target.label_ids is not None:
            tensors["head_rows"] = probe.head_weight
    return tensors


def policy_details(
    policy: FittedPolicy, recording: Recording, halves: tuple[Ints, Ints], options: PolicyOptions
) -> dict[str, Any]:
    """``calibration.json``: how it was made, and what each exit point does."""
    fit_half, held_out = _rows_of(recording, halves)
    bound = options.bounds(recording.prompts[held_out])
    _, counts = np.unique(recording.tokens[held_out], return_counts=True)
    point = policy.points[options.epsilon]
    leaving = np.bincount(point.exits, minlength=len(policy.exits) + 1) / len(held_out)
    return {
        "prompts": len(halves[0]) + len(halves[1]),
        "rows": len(recording.tokens),
        "rows_fitted": len(fit_half),
        "rows_held_out": len(held_out),
        "seed": options.seed,
        "majority_share": float(counts.max() / counts.sum()),
        "exit_points": [
            {
                "layer": exit.layer,
                "leaving": float(share),
                "agreement": float(exit.held_out.agrees.mean()),
                "probe_bytes": exit.probe.bytes,
                # In the time of one layer for one token row.
                "probe_cost": policy.costs.probe[exit.layer] / policy.costs.layer,
            }
            for exit, share in zip(policy.exits, leaving[:-1], strict=True)
        ],
        "agreement": {
            str(exit.layer): float(exit.held_out.agrees.mean()) for exit in policy.candidates
        },
        "oracle_layers_run": oracle_layers_run(policy),
        "seconds": {
            "layer": policy.costs.layer,
            "cut": policy.costs.cut,
            "expected": policy.expected,
        },
        "risk_curve": [
            {
                "threshold": point.threshold if np.isfinite(point.threshold) else None,
                "risk": point.risk,
                "disagreement": point.disagreement,
                "bound": bound.of(point.losses),
                "layers_saved": point.layers_saved,
            }
            for point in held_out_path(policy.exits, policy.costs.depth)
        ],
        "provenance": provenance(),
    }
