"""Policies made of other rows each time, and how often they break the bound that they promise.

Each is judged by prompts that it has not seen, from what the model did with them when all were
recorded: the early answer against full depth in the same pass, so that no rounding counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.common.intervals import share_of
from vllm_adainfer.arrays import Ints
from vllm_adainfer.offline.calibration.calibrate import calibration_of
from vllm_adainfer.offline.calibration.certify.path import held_out_path
from vllm_adainfer.offline.calibration.data.split import Split
from vllm_adainfer.offline.calibration.enough_rows import split_of
from vllm_adainfer.offline.calibration.fit.exits import judge
from vllm_adainfer.offline.calibration.fit_policy import fit_policy
from vllm_adainfer.offline.calibration.options import CalibrationRequest
from vllm_adainfer.offline.calibration.prompts import Prompts
from vllm_adainfer.offline.calibration.record.rows import Rows
from vllm_adainfer.offline.reports.shares import clopper_pearson


def of_draw(
    request: CalibrationRequest, prompts: Prompts, rows: Rows, drawn: Ints, unseen: Ints
) -> dict[str, Any]:
    """A policy made of the prompts `drawn`, as by `calibrate`, and its risk on the `unseen`."""
    halves = split_of(np.arange(len(drawn)), request.options)
    groups = np.arange(len(prompts.examples))
    split = Split(drawn[halves.fit], drawn[halves.certify], groups)
    calibration = calibration_of(request, replace(prompts, split=split), rows)
    policy = fit_policy(calibration, request.probe)
    target = policy.calibration.target  # heads of prompts, or of last tokens
    epsilon, places = request.options.epsilon, rows.of(unseen)
    if epsilon not in policy.points:
        return {"unseen": len(places), "changed": 0, "layers_saved": 0.0}
    exits = [
        replace(
            one,
            held_out=judge(one.probe, one.layer, rows, places, target).scored(one.classifier),
        )
        for one in policy.exits
    ]
    threshold = policy.points[epsilon].threshold
    [point] = held_out_path(exits, rows.model.depth, [threshold])
    return {
        "unseen": len(places),
        "changed": int(point.losses.sum()),
        "layers_saved": point.layers_saved,
        "probe": target.kind,
    }


def cells(report: Mapping[str, Any]) -> dict[str, str]:
    """The columns of a table about the ``draws`` of a report, of so many ``rows`` each."""
    draws, epsilon = report["draws"], report["epsilon"]
    shares = [one["changed"] / one["unseen"] for one in draws]
    unseen, above = draws[0]["unseen"], sum(share > epsilon for share in shares)
    clearly = sum(clopper_pearson(one["changed"], one["unseen"])[0] > epsilon for one in draws)
    return {
        "policies": f"{len(draws)}, of {report['rows']} rows each",
        "unseen rows": f"{unseen}",
        "promised": f"bound {epsilon:.1%}, confidence {1 - report['delta']:.0%}",
        "answers that changed, mean (95 %)": share_of(float(np.mean(shares)), unseen),
        "most (95 %)": share_of(max(shares), unseen),
        "policies above the bound (95 %)": share_of(above / len(draws), len(draws)),
        "clearly above": f"{clearly}",
        "layers saved, mean (95 %)": share_of(
            float(np.mean([one["layers_saved"] for one in draws])), unseen
        ),
    }
