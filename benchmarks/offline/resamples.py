"""How often a promise is broken if the rows that certify it are drawn anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from vllm_adainfer.arrays import Ints
from vllm_adainfer.offline.calibration.certify.bound import Bound
from vllm_adainfer.offline.calibration.certify.certify import LabelTest, certify
from vllm_adainfer.offline.calibration.certify.path import PathPoint, held_out_path, threshold_grid
from vllm_adainfer.offline.calibration.fit.exits import FittedExit
from vllm_adainfer.offline.calibration.fit_policy import (
    FittedPolicy,
    fit_candidates,
    make_policy,
)

DRAWS = 500


def resampled(policy: FittedPolicy, tests: Ints) -> dict[str, Any]:
    """How often the promises of a policy are broken, if its rows are drawn anew.

    The rows that certified it, and `tests`, neither of which fitted or chose anything, stand for
    the population. Each draw takes as many of them as have certified, with replacement. A promise
    is broken if more of the population than it allows then leaves with a wrong answer.
    """
    calibration = policy.calibration
    recording, options = calibration.rows, calibration.options
    split = calibration.split
    population = np.concatenate([split.certify, tests])
    exits = exits_on(policy, population)
    bound = Bound.promised(options)
    labels = [replace(test, bound=bound) for test in policy.terms.tests]
    draw, risks, broken = np.random.default_rng(0), [], 0
    for _ in range(DRAWS):
        rows = draw.integers(0, len(population), len(split.certify))
        drawn = [replace(e, held_out=e.held_out.of_rows(rows)) for e in exits]
        path = held_out_path(drawn, recording.model.depth, threshold_grid(drawn))
        points = certify(path, [options.epsilon], bound, labels)
        if options.epsilon not in points:  # nothing leaves
            risks.append(0.0)
            continue
        threshold = points[options.epsilon].threshold
        [served] = held_out_path(exits, recording.model.depth, [threshold])
        risks.append(served.risk)
        broken += served.risk > options.epsilon or any(_is_broken(one, served) for one in labels)
    return {
        "resamples": DRAWS,
        "resamples_over": broken,
        "resamples_risk_mean": float(np.mean(risks)),
    }


def exits_on(policy: FittedPolicy, rows: Ints) -> list[FittedExit]:
    """The exit points of a policy as they were, with `rows` held out in place of its own.

    `rows` [prompts] must not be among those that fitted it.
    """
    calibration = policy.calibration
    other = replace(calibration, split=replace(calibration.split, certify=rows))
    layers = {exit.layer for exit in policy.exits}
    heads = fit_candidates(other, layers) if layers - {0} else []
    again = {key_of(exit): exit for exit in make_policy(other, heads).candidates}
    return [again[key_of(exit)] for exit in policy.exits]


def key_of(exit: FittedExit) -> tuple[int, bool, float]:
    """What tells a candidate from the others of the same calibration."""
    return exit.layer, exit.is_branch, exit.handicap


def _is_broken(test: LabelTest, served: PathPoint) -> bool:
    promise = test.promise
    about = promise.chosen_by(served.answers, served.full) == test.token
    return float(np.mean((served.answers != served.full)[about])) > promise.epsilon
