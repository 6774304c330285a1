"""The suite's report: its JSON and two Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from vllm_adainfer.offline.calibration.options import PolicyOptions
from vllm_adainfer.offline.facts.document import markdown_grid
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.offline.reports.speedup import Speedup

SUITE = "adainfer"
METHODS = {
    "static_truncation": "static truncation at equal depth",
    "adainfer": "AdaInfer as published (no bound)",
    "adainfer_labels": "AdaInfer's rule among the labels (no bound)",
    "adainfer_certified": "AdaInfer's features, certified",
    "calm": "CALM threshold, certified",
    "ours": "vllm-adainfer",
}
# arXiv 2403.02181, abstract: Llama-2 and OPT of 7B to 70B, all its tasks; one head for each layer.
PAPER = {"layers_saved": 0.178, "layers_saved_sentiment": 0.43, "accuracy_lost_below": 0.01}


def suite_report(
    model: str, options: PolicyOptions, depth: int, rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The JSON report, with averages over the tasks where the full model is better than chance.

    `rows` are one per task, see `run_suite.py`.
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
        "suite": SUITE,
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


def markdown(report: dict[str, Any]) -> str:
    """Two tables: measurements in vLLM, and every method judged by its decisions."""
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
                Speedup.read(run, "speedup").bold,
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
    return markdown_grid(columns, rows)


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
    return markdown_grid(columns, rows, text_columns=2)
