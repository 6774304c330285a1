"""The generated parts of README."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.intervals import share_of, shares_of
from vllm_adainfer.offline.facts.document import markdown_grid
from vllm_adainfer.offline.reports.shares import clopper_pearson, share_in, spelled, verdict
from vllm_adainfer.offline.reports.speedup import Speedup

RESULTS = Path(__file__).parent / "results"
DEMO = "8-shot reviews, SmolLM2-135M-Instruct (`make demo`)"
FINE_TUNED = "zero-shot, fine-tuned SmolLM2-135M"


def load(name: str) -> Any:
    """One committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def headlines() -> str:
    """The results of README: a row per workload and processor, then a server's latency."""
    rows = [
        *(of_suite_task(task) for task in load("suite_fine_tuned")["tasks"]),
        of_policy("trained_probes", "SST-2"),
        of_evaluation("sst2_six_shot", "SST-2, 6-shot, SmolLM2-135M-Instruct"),
        of_evaluation("demo", DEMO),
        of_evaluation("demo_amx", DEMO),
    ]
    columns = [
        "workload",
        "processor, two cores",
        "speed-up (95 %)",
        "layers saved (95 %)",
        "answers that differ (95 %)",
        "accuracy, stock / ours (95 %)",
    ]
    return f"{markdown_grid(columns, rows, text_columns=2)}\n\n{latency()}"


def of_evaluation(name: str, title: str) -> list[str]:
    """A report of `vllm-adainfer evaluate`."""
    report = load(name)
    accuracies = {"stock_accuracy": report["stock"]["accuracy"], **report["adainfer"]}
    run = report | accuracies | speedup_of(report).entries("speedup")
    cells = row(title, report, run, report["n"], report["disagreement"])
    return [title, "AMX", *cells[2:]] if name.endswith("amx") else cells


def of_suite_task(task: dict[str, Any]) -> list[str]:
    """A task of the model that `fine_tune.py` makes."""
    run, title = task["measured"], f"{task['title']}, {FINE_TUNED}"
    return row(title, load("suite_fine_tuned"), run, task["test"], run["disagreement"])


def of_policy(name: str, task: str) -> list[str]:
    """The first policy of those of a task that ran in turn, calibrated on the fewest prompts."""
    reports = [one for one in load(name) if one["task"] == task and one["slow"] == 1]
    report = min(reports, key=lambda one: int(one["prompts"]))
    run, *_ = report["policies"]
    rows = report["test"]
    return row(f"{task}, zero-shot, another fine-tuning", report, run, rows, run["changed"] / rows)


def row(
    title: str, report: dict[str, Any], run: dict[str, Any], rows: int, changed: float
) -> list[str]:
    """The cells of a run on so many rows, of whose answers a share has changed."""
    return [
        title,
        processor(report),
        Speedup.read(run, "speedup").bold,
        share_of(run["layers_saved"], rows, 0),
        of_bound(changed, rows, report["epsilon"]),
        shares_of(run["stock_accuracy"], run["accuracy"], rows),
    ]


def speedup_of(report: Mapping[str, Any]) -> Speedup:
    """The speed-up of a report; of an older one of `evaluate`, that of its rounds."""
    if "speedup_rounds" in report or "runs" not in report.get("stock", {}):
        return Speedup.read(report, "speedup")
    return Speedup.of(
        *([run["seconds"] for run in report[name]["runs"]] for name in ("stock", "adainfer"))
    )


def processor(report: dict[str, Any]) -> str:
    """A processor in short."""
    name = str(report["provenance"]["cpu"])
    if "AMX" in name:
        return "AMX"
    return "EPYC" if "EPYC" in name else name


def of_bound(value: float, rows: int, epsilon: float) -> str:
    """The share of answers that differ, and whether it is within the bound."""
    interval = clopper_pearson(round(value * rows), rows)
    return f"{spelled(value, interval)}, {verdict(value, interval, epsilon)}"


def latency() -> str:
    """The tail of a server's latency below and at its limit."""
    report = load("serve")
    told = []
    for row in (row for row in report["rates"] if row["rate"] in (20.0, "inf")):
        stock, ours = (row[name]["p99_e2el_ms"] for name in ("stock", "adainfer"))
        sent = "all at once" if row["rate"] == "inf" else f"{row['rate']:g} a second"
        told.append(f"{ours:.0f} ms instead of {stock:.0f} ms with requests sent {sent}")
    return (
        f"A server's p99 latency (SST-2, {FINE_TUNED}, EPYC): {', and '.join(told)} "
        "([more](docs/results.md))."
    )


def compared() -> str:
    """The comparison of README: what each of three ways spares, by task."""
    rows = []
    for report in load("rivals"):
        found = {one["name"]: one for one in report["rows"] if one["prompts"] == report["timed"]}
        cells = [report["task"]]
        for name in ("student", "exits", "both"):
            spared = share_in(found[name], "spared") if found[name]["spared"] else "nothing"
            cells.append(f"{spared}, {speed(report, name)}")
        rows.append(cells)
    columns = [
        "task",
        "MiniLM, fine-tuned: requests spared (95 %)",
        "exits: layers spared (95 %)",
        "MiniLM, then exits: layers spared (95 %)",
    ]
    return markdown_grid(columns, rows, text_columns=1)


def speed(report: dict[str, Any], name: str) -> str:
    """The speed-up of a method; stock's if it has no policy."""
    times = report["times"]
    if name not in times:
        return "**1.00x**"
    return Speedup.of(times["stock"]["seconds"], times[name]["seconds"]).bold
