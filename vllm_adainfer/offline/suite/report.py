"""The report of a suite: JSON, a Markdown table, and three plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from vllm_adainfer.offline.calibration.options import PolicyOptions
from vllm_adainfer.offline.evaluation.plot import as_png
from vllm_adainfer.offline.evaluation.report import write_whole
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.offline.tables import markdown_table

METHODS = {
    "static_truncation": "static truncation at equal depth",
    "adainfer": "AdaInfer as published",
    "adainfer_certified": "AdaInfer's features, certified",
    "calm": "CALM threshold, certified",
    "ours": "vllm-adainfer",
}
# arXiv 2403.02181, abstract: Llama-2 and OPT of 7B to 70B, all its tasks; one head for each layer.
PAPER = {"layers_saved": 0.178, "layers_saved_sentiment": 0.43, "accuracy_lost_below": 0.01}


def suite_report(
    model: str, suite: str, options: PolicyOptions, depth: int, rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The JSON report.

    Args:
        model: directory or hub id; the report names its last part.
        suite: name of the suite.
        options: of the policies.
        depth: layers of the model.
        rows: one for each task, see `vllm_adainfer.offline.suite.run`.

    Returns:
        the rows, and averages over the tasks where the full model is better than chance.

    """
    meaningful = [row for row in rows if not row["at_chance"]]
    averages: dict[str, Any] = {}
    for method in METHODS:
        outcomes = [
            (row["methods"][method], row["full_depth"]["accuracy"])
            for row in meaningful
            if row["methods"][method] is not None
        ]
        if outcomes:
            averages[method] = {
                "tasks": len(outcomes),
                "layers_saved": fmean(outcome["layers_saved"] for outcome, _ in outcomes),
                "disagreement": fmean(outcome["disagreement"] for outcome, _ in outcomes),
                "accuracy_lost": fmean(full - outcome["accuracy"] for outcome, full in outcomes),
                "expected_speedup": fmean(outcome["expected_speedup"] for outcome, _ in outcomes),
            }
    measured = [row["measured"] for row in meaningful if row["measured"] is not None]
    if measured:
        averages["measured"] = {
            "tasks": len(measured),
            "speedup": fmean(run["speedup"] for run in measured),
            "layers_saved": fmean(run["layers_saved"] for run in measured),
            "disagreement": fmean(run["disagreement"] for run in measured),
            "accuracy_lost": fmean(run["stock_accuracy"] - run["accuracy"] for run in measured),
        }
    return {
        "suite": suite,
        "model": Path(model).name,
        "layers_total": depth,
        "epsilon": options.epsilon,
        "delta": options.delta,
        "seed": options.seed,
        "tasks": list(rows),
        "averages": averages,
        "paper": PAPER,
        "provenance": provenance(),
    }


def write_suite_report(report: dict[str, Any], path: Path | None, plot: Path | None) -> None:
    """Write the JSON to `path` with the Markdown beside it, and the plots to `plot`.

    Raises:
        AdaInferError: a file cannot be written.

    """
    if path is not None:
        write_whole(path, (json.dumps(report, indent=1) + "\n").encode())
        write_whole(path.with_suffix(".md"), markdown(report).encode())
    if plot is not None:
        write_whole(plot, plots(report))


def markdown(report: dict[str, Any]) -> str:
    """Two tables: what was measured in vLLM, and every method by its decisions."""
    parts = [
        f"{report['model']} ({report['layers_total']} layers), suite {report['suite']}, epsilon "
        f"{report['epsilon']:g} at delta {report['delta']:g}, on {report['provenance']['cpu']}.",
        "Measured in vLLM, interleaved with stock:",
        _measured_table(report),
        "Every method on the same prompts, by its decisions; the expected speed-up is that of "
        "layers, probes and cuts by measured costs, without the rest of the engine:",
        _methods_table(report),
        "The means leave out tasks where the full model is at chance. No policy: no exit point "
        "agrees with the full model often enough to be learned or certified.",
    ]
    return "\n\n".join(parts) + "\n"


def _measured_table(report: dict[str, Any]) -> str:
    rows = []
    for task in report["tasks"]:
        run = task["measured"]
        start = [
            task["title"],
            str(task["shots"]),
            f"{task['test']} x {task['prompt_tokens_mean']:.0f}",
            f"{task['chance']:.1%}",
        ]
        if run is None:
            why = "at chance" if task["at_chance"] else "no exit point is worth its cost"
            rows.append([*start, f"{task['full_depth']['accuracy']:.1%}, {why}", *4 * ["-"]])
            continue
        rows.append(
            [
                *start,
                f"{run['stock_accuracy']:.1%} / {run['accuracy']:.1%}",
                f"{run['disagreement']:.1%}",
                f"{run['layers_saved']:.1%}",
                f"**{run['speedup']:.2f}x**",
                ", ".join(map(str, task["exit_points"])),
            ]
        )
    if "measured" in report["averages"]:
        mean = report["averages"]["measured"]
        rows.append(
            [
                f"mean of {mean['tasks']}",
                *3 * [""],
                f"{100 * mean['accuracy_lost']:+.1f} points lost",
                f"{mean['disagreement']:.1%}",
                f"{mean['layers_saved']:.1%}",
                f"{mean['speedup']:.2f}x",
                "",
            ]
        )
    paper = report["paper"]
    rows.append(
        [
            "*AdaInfer's paper, other models and tasks*",
            *3 * [""],
            f"under {100 * paper['accuracy_lost_below']:.0f} point lost",
            "",
            f"*{paper['layers_saved']:.1%}; sentiment {paper['layers_saved_sentiment']:.0%}*",
            "",
            "every layer",
        ]
    )
    columns = [
        "task",
        "shots",
        "prompts x tokens",
        "chance",
        "accuracy, stock / ours",
        "disagreement",
        "layers saved",
        "speed-up",
        "exit points",
    ]
    return markdown_table(columns, rows)


def _methods_table(report: dict[str, Any]) -> str:
    rows = []
    for task in report["tasks"]:
        full = task["full_depth"]["accuracy"]
        mark = " (at chance)" if task["at_chance"] else ""
        depth = str(report["layers_total"])
        rows.append([task["title"] + mark, "full depth", f"{full:.1%}", "", "", depth, "", ""])
        for method, title in METHODS.items():
            outcome = task["methods"][method]
            if outcome is None:
                rows.append(["", title, "no policy", *5 * [""]])
                continue
            rows.append(
                [
                    "",
                    title,
                    f"{outcome['accuracy']:.1%}",
                    f"{100 * (outcome['accuracy'] - full):+.1f}",
                    f"{outcome['disagreement']:.1%}",
                    f"{outcome['layers_run']:.1f}",
                    f"{outcome['layers_saved']:.1%}",
                    f"{outcome['expected_speedup']:.2f}x",
                ]
            )
    for method, title in METHODS.items():
        if method in report["averages"]:
            mean = report["averages"][method]
            rows.append(
                [
                    f"mean of {mean['tasks']}",
                    title,
                    "",
                    f"{-100 * mean['accuracy_lost']:+.1f}",
                    f"{mean['disagreement']:.1%}",
                    "",
                    f"{mean['layers_saved']:.1%}",
                    f"{mean['expected_speedup']:.2f}x",
                ]
            )
    columns = [
        "task",
        "method",
        "accuracy",
        "minus full depth, points",
        "disagreement",
        "layers run",
        "layers saved",
        "expected speed-up",
    ]
    return markdown_table(columns, rows, text_columns=2)


def plots(report: dict[str, Any]) -> bytes:
    """PNG: agreement by layer, disagreement against layers saved, and speed-up."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    agreement, coverage, pareto = figure.subplots(1, 3)
    meaningful = [row for row in report["tasks"] if not row["at_chance"]]
    for index, row in enumerate(meaningful):
        colour, curve = f"C{index}", row["agreement"]
        agreement.plot(curve["layers"], curve["probe"], color=colour, label=row["title"])
        agreement.plot(curve["layers"], curve["logit_lens"], color=colour, linestyle=":")
        if "risk_coverage" in row:
            path = row["risk_coverage"]
            saved, risk = path["layers_saved"], path["disagreement"]
            coverage.plot(_percent(saved), _percent(risk), color=colour, label=row["title"])
    agreement.set_xlabel("layer")
    agreement.set_ylabel("agreement with full depth")
    agreement.set_title("if every prompt left there: our probe; dotted: logit lens")
    agreement.legend(fontsize=8)
    coverage.axhline(100 * report["epsilon"], color="grey", linestyle=":")
    coverage.set_xlabel("layers saved, %")
    coverage.set_ylabel("disagreement on test prompts, %")
    coverage.set_title("along the joint threshold")
    for marker, (method, title) in zip("sv^xo", METHODS.items(), strict=True):
        outcomes = [row["methods"][method] for row in meaningful]
        found = [outcome for outcome in outcomes if outcome is not None]
        pareto.scatter(
            [outcome["expected_speedup"] for outcome in found],
            _percent([outcome["disagreement"] for outcome in found]),
            marker=marker,
            label=title,
        )
    pareto.axhline(100 * report["epsilon"], color="grey", linestyle=":")
    pareto.set_xlabel("expected speed-up of layers, probes and cuts")
    pareto.set_ylabel("disagreement, %")
    pareto.set_yscale("symlog", linthresh=1)
    pareto.set_title("one point per task")
    pareto.legend(fontsize=8)
    return as_png(figure, report["provenance"])


def _percent(shares: Sequence[float]) -> list[float]:
    return [100 * share for share in shares]
