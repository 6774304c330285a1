"""The figures of the pages, as plotly.js draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.offline.reports.speedup import Speedup

Points = tuple[Sequence[Any], Sequence[Any]]  # x and y
Trace = dict[str, Any]
Panel = dict[str, Any]  # see `panel`

MARKER = {"color": "#d1242f", "size": 13, "symbol": "diamond"}
DOTTED = {"dash": "dot", "color": "#9aa4b2", "width": 1}


def panel(
    name: str,
    title: str,
    traces: Sequence[Trace],
    layout: Mapping[str, Any],
    moving: int | None = None,
    points: Sequence[Points] = (),
) -> Panel:
    """A figure, which may follow the slider.

    `name` is its HTML id. `traces` are its lines, bars and points at the bound that the page opens
    with; the one at the index `moving` has these `points` at each bound.
    """
    axes_and_lines = {"traces": traces, "layout": layout}
    return {"name": name, "title": title, **axes_and_lines, "moving": moving, "points": points}


def line(points: Points, name: str, mode: str = "lines", **more: Any) -> Trace:
    """A line, or points with the mode "markers"; `more` is plotly.js's."""
    x, y = points
    return {"type": "scatter", "x": list(x), "y": list(y), "name": name, "mode": mode, **more}


def axes(x: str, y: str, **more: Any) -> dict[str, Any]:
    """The layout of a figure whose values begin at 0, with the titles of its axes."""
    common = {"automargin": True, "gridcolor": "#e5e8ec", "zerolinecolor": "#d9dde3"}
    return {
        "height": 360,
        "margin": {"l": 60, "r": 20, "t": 20, "b": 50},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "xanchor": "left", "x": 0},
        "xaxis": {"title": {"text": x}, **common},
        "yaxis": {"title": {"text": y}, "rangemode": "tozero", **common},
        **more,
    }


def trade_off(report: Mapping[str, Any], index: int) -> Panel:
    """Quality against speed-up, a point for each bound."""
    levels = report["levels"]
    found = [Speedup.read(level, "speedup") for level in levels]
    speedups = [1.0, *(one.value for one in found)]
    reaches = [one.interval or (one.value, one.value) for one in found]
    pairs = list(zip(found, reaches, strict=True))
    across = {
        "array": [0.0, *(high - one.value for one, (_, high) in pairs)],
        "arrayminus": [0.0, *(one.value - low for one, (low, _) in pairs)],
        "thickness": 1,
    }
    names = ["stock", *(f"bound {100 * level['epsilon']:g} %" for level in levels)]
    differ = [0.0, *(100 * level["disagreement"] for level in levels)]
    ends = [(level["disagreement"], *level["disagreement_95"]) for level in levels]
    error = {
        "array": [0.0, *(100 * (high - share) for share, _, high in ends)],
        "arrayminus": [0.0, *(100 * (share - low) for share, low, _ in ends)],
        "thickness": 1,
    }
    mode = "lines+markers"
    drawn = {"text": names, "error_x": across}
    traces = [line((speedups, differ), "answers that differ", mode, error_y=error, **drawn)]
    full = report["stock"]["accuracy"]
    if full is not None:
        lost = [0.0, *(100 * (full - level["accuracy"]) for level in levels)]
        traces.append(line((speedups, lost), "accuracy lost, points", mode, **drawn))
    points = [([x], [y]) for x, y in zip(speedups, differ, strict=True)][1:]
    layout = axes("speed-up over stock vLLM", "%")
    return _marked("trade-off", "Cost and benefit of each bound", traces, layout, points, index)


def exits(histograms: Sequence[Mapping[str, float]], layers: int, index: int) -> Panel:
    """Where requests exit at each bound: shares by number of layers run."""
    points = [
        ([int(layer) for layer in one], [100 * share for share in one.values()])
        for one in histograms
    ]
    x, y = points[index]
    bars = {"type": "bar", "x": x, "y": y, "width": layers / 60, "showlegend": False}
    layout = axes("layers run", "% of requests")
    layout["xaxis"]["range"], layout["yaxis"]["range"] = [0, layers + 1], [0, 100]
    return panel("exits", "Where requests exit", [bars], layout, 0, points)


def risk_curve(config: ArtifactConfig, details: Mapping[str, Any], index: int) -> Panel:
    """The risk on held-out rows and its bound, along the threshold path."""
    curve = details["risk_curve"]
    saved = [100 * point["layers_saved"] for point in curve]
    traces = [
        line((saved, [100 * point[key] for point in curve]), name)
        for key, name in (("risk", "held-out rows"), ("bound", f"bound at {1 - config.delta:.0%}"))
    ]
    points = [([100 * level.layers_saved], [100 * level.bound]) for level in config.levels]
    layout = axes("layers saved, %", f"{config.promise.lost}, %")
    return _marked("risk", "Risk and its bound at calibration", traces, layout, points, index)


def agreement(config: ArtifactConfig, details: Mapping[str, Any]) -> Panel:
    """How often the probe alone agrees with full depth, by layer."""
    shares = {int(layer): 100 * share for layer, share in details["agreement"].items()}
    probe = line((list(shares), list(shares.values())), "probe", "lines+markers")
    shares |= {n: 100 * details["branch_agreement"][str(n)] for n in config.branches}
    x = [point for point in config.exit_points if point in shares]
    marked = line((x, [shares[point] for point in x]), "exit points", "markers", marker=MARKER)
    layout = axes("layer", "% of held-out rows")
    return panel("agreement", "How often the probe agrees with full depth", [probe, marked], layout)


def reliability(report: Mapping[str, Any], index: int) -> Panel | None:
    """How often the best label is right, by its probability; None without labels in the data."""
    rows = report.get("probabilities")
    if rows is None or rows["stock"]["bins"] is None:
        return None
    stock, never, *points = (
        ([one["confidence"] for one in row["bins"]], [one["accuracy"] for one in row["bins"]])
        for row in (rows["stock"], rows["never_exit"], *rows["levels"])
    )
    traces = [
        line(stock, "stock vLLM", "lines+markers"),
        line(never, "never exiting", "lines+markers"),
        line(([0, 1], [0, 1]), "perfectly calibrated", line=DOTTED),
        line(points[index], "early, at this bound", "lines+markers"),
    ]
    layout = axes("probability of the best label", "share of prompts where it is right")
    return panel("reliability", "Reliability", traces, layout, len(traces) - 1, points)


def gates(report: Mapping[str, Any], index: int) -> list[Panel]:
    """For each gate, the label's probability early and at full depth; the gate is a line."""
    panels: list[Panel] = []
    found = report.get("gates") or {"gates": []}
    for number, gate in enumerate(found["gates"]):
        points = [(gate["full"], level["gates"][number]["early"]) for level in found["levels"]]
        at, ends = [gate["probability"]] * 2, [0, 1]
        traces = [
            line(points[index], "prompts", "markers", marker={"size": 5}, showlegend=False),
            line((at, ends), "gate", line=DOTTED, showlegend=False),
            line((ends, at), "gate", line=DOTTED, showlegend=False),
        ]
        title = f"Probability of {gate['label']}, with a gate at {gate['probability']:g}"
        layout = axes("probability at full depth", "early, at this bound")
        panels.append(panel(f"gate-{number}", title, traces, layout, 0, points))
    return panels


def _marked(
    name: str,
    title: str,
    traces: Sequence[Trace],
    layout: Mapping[str, Any],
    points: Sequence[Points],
    index: int,
) -> Panel:
    """A panel with a marker at the bound of the slider."""
    marker = line(points[index], "this bound", "markers", marker=MARKER)
    return panel(name, title, [*traces, marker], layout, len(traces), points)
