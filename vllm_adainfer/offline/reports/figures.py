"""The figures of the pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plotly.graph_objects import Bar, Figure, Scatter

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.offline.reports.page import Panel, Points
from vllm_adainfer.promise.kinds import promise_of

MARKER = {"color": "#d1242f", "size": 13, "symbol": "diamond"}
LAYOUT = {
    "template": "plotly_white",
    "height": 360,
    "margin": {"l": 60, "r": 20, "t": 20, "b": 50},
    "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "xanchor": "left", "x": 0},
}


def trade_off(report: Mapping[str, Any], index: int) -> Panel:
    """Quality against speed-up, a point for each bound."""
    levels = report["levels"]
    speedups = [1.0, *(level["speedup"] for level in levels)]
    names = ["stock", *(f"bound {100 * level['epsilon']:g} %" for level in levels)]
    lines = {"answers that differ": [0.0, *(100 * level["disagreement"] for level in levels)]}
    full = report["stock"]["accuracy"]
    if full is not None:
        lost = [100 * (full - level["accuracy"]) for level in levels]
        lines["accuracy lost, points"] = [0.0, *lost]
    figure = _figure("speed-up over stock vLLM", "%")
    for name, y in lines.items():
        figure.add_trace(Scatter(x=speedups, y=y, name=name, text=names, mode="lines+markers"))
    ends = [(level["disagreement"], *level["disagreement_95"]) for level in levels]
    figure.data[0].error_y = {
        "array": [0.0, *(100 * (high - share) for share, _, high in ends)],
        "arrayminus": [0.0, *(100 * (share - low) for share, low, _ in ends)],
        "thickness": 1,
    }
    points = [([x], [y]) for x, y in zip(speedups, lines["answers that differ"], strict=True)][1:]
    return _with_marker("trade-off", "Cost and benefit of each bound", figure, points, index)


def exits(histograms: Sequence[Mapping[str, float]], layers: int, index: int) -> Panel:
    """Where requests exit at each bound: shares by number of layers run."""
    points = [
        ([int(layer) for layer in one], [100 * share for share in one.values()])
        for one in histograms
    ]
    figure = _figure("layers run", "% of requests")
    x, y = points[index]
    figure.add_trace(Bar(x=x, y=y, width=layers / 60, showlegend=False))
    figure.update_xaxes(range=[0, layers + 1])
    figure.update_yaxes(range=[0, 100])
    return Panel("exits", "Where requests exit", figure, 0, points)


def risk_curve(config: ArtifactConfig, details: Mapping[str, Any], index: int) -> Panel:
    """The risk on held-out rows and its bound, along the threshold path."""
    curve = details["risk_curve"]
    saved = [100 * point["layers_saved"] for point in curve]
    figure = _figure("layers saved, %", f"{promise_of(config).lost}, %")
    for key, name in (("risk", "held-out rows"), ("bound", f"bound at {1 - config.delta:.0%}")):
        y = [100 * point[key] for point in curve]
        figure.add_trace(Scatter(x=saved, y=y, name=name, mode="lines"))
    points = [([100 * level.layers_saved], [100 * level.bound]) for level in config.levels]
    return _with_marker("risk", "Risk and its bound at calibration", figure, points, index)


def agreement(config: ArtifactConfig, details: Mapping[str, Any]) -> Panel:
    """How often the probe alone agrees with full depth, by layer."""
    shares = {int(layer): 100 * share for layer, share in details["agreement"].items()}
    figure = _figure("layer", "% of held-out rows")
    x, y = list(shares), list(shares.values())
    figure.add_trace(Scatter(x=x, y=y, name="probe", mode="lines+markers"))
    shares |= {n: 100 * details["branch_agreement"][str(n)] for n in config.branches}
    x = [point for point in config.exit_points if point in shares]
    y = [shares[point] for point in x]
    figure.add_trace(Scatter(x=x, y=y, name="exit points", mode="markers", marker=MARKER))
    return Panel("agreement", "How often the probe agrees with full depth", figure)


def reliability(report: Mapping[str, Any], index: int) -> Panel | None:
    """How often the best label is right, by its probability; None without labels in the data."""
    rows = report.get("probabilities")
    if rows is None or rows["stock"]["bins"] is None:
        return None
    figure = _figure("probability of the best label", "share of prompts where it is right")
    stock, never, *points = (
        ([one["confidence"] for one in row["bins"]], [one["accuracy"] for one in row["bins"]])
        for row in (rows["stock"], rows["never_exit"], *rows["levels"])
    )
    for name, (x, y) in (("stock vLLM", stock), ("never exiting", never)):
        figure.add_trace(Scatter(x=x, y=y, name=name, mode="lines+markers"))
    figure.add_trace(
        Scatter(x=[0, 1], y=[0, 1], name="perfectly calibrated", line={"dash": "dot"}, mode="lines")
    )
    x, y = points[index]
    figure.add_trace(Scatter(x=x, y=y, name="early, at this bound", mode="lines+markers"))
    return Panel("reliability", "Reliability", figure, len(figure.data) - 1, points)


def gates(report: Mapping[str, Any], index: int) -> list[Panel]:
    """For each gate, the label's probability early and at full depth; the gate is a line."""
    panels: list[Panel] = []
    found = report.get("gates") or {"gates": []}
    for number, gate in enumerate(found["gates"]):
        points = [(gate["full"], level["gates"][number]["early"]) for level in found["levels"]]
        figure = _figure("probability at full depth", "early, at this bound")
        x, y = points[index]
        figure.add_trace(Scatter(x=x, y=y, mode="markers", marker={"size": 5}, showlegend=False))
        line = {"line_dash": "dot", "line_color": MARKER["color"]}
        figure.add_vline(x=gate["probability"], **line)
        figure.add_hline(y=gate["probability"], **line)
        title = f"Probability of {gate['label']}, with a gate at {gate['probability']:g}"
        panels.append(Panel(f"gate-{number}", title, figure, 0, points))
    return panels


def _figure(x: str, y: str) -> Figure:
    figure = Figure(layout=LAYOUT)
    figure.update_xaxes(title_text=x, automargin=True)
    figure.update_yaxes(title_text=y, automargin=True, rangemode="tozero")
    return figure


def _with_marker(
    name: str, title: str, figure: Figure, points: Sequence[Points], index: int
) -> Panel:
    """A panel with a marker at the bound of the slider."""
    x, y = points[index]
    figure.add_trace(Scatter(x=x, y=y, name="this bound", mode="markers", marker=MARKER))
    return Panel(name, title, figure, len(figure.data) - 1, points)
