"""The generated parts of README."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from benchmarks.common.intervals import control, share_of, shares_of
from benchmarks.parts import CHANGED, RESULTS
from benchmarks.rivals.report import mark
from vllm_adainfer.offline.facts.document import markdown_grid
from vllm_adainfer.offline.reports.shares import clopper_pearson, share_in, spelled, verdict
from vllm_adainfer.offline.reports.speedup import Speedup

DEMO = "8-shot reviews, SmolLM2-135M-Instruct (`make demo`)"
FINE_TUNED = "zero-shot, fine-tuned SmolLM2-135M"


def load(name: str) -> Any:
    """One committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def headlines() -> str:
    """The results of README: a row per workload and processor, then a server's latency."""
    rows = [
        *(of_suite_task(task) for task in load("suite_fine_tuned")["tasks"]),
        of_evaluation("demo", DEMO),
        of_evaluation("demo_amx", DEMO),
    ]
    columns = [
        "workload",
        "measured",
        "speed-up (95 %)",
        "never exiting (95 %)",
        "layers saved (95 %)",
        "answers that differ (95 %)",
        "two passes of stock differ (95 %)",
        "accuracy, stock / ours (95 %)",
    ]
    return f"{markdown_grid(columns, rows, text_columns=2)}\n\n{latency()}"


def of_evaluation(name: str, title: str) -> list[str]:
    """A report of `vllm-adainfer evaluate`."""
    report = load(name)
    run = {
        "stock_accuracy": report["stock"]["accuracy"],
        **report["adainfer"],
        **report,
        **speedup_of(report).entries("speedup"),
        **never_exit(report).entries("never_exit"),
    }
    return row(title, report, run, report["n"])


def never_exit(report: Mapping[str, Any]) -> Speedup:
    """That of never exiting; see `speedup_of`."""
    return Speedup.read(report["never_exit"], "speedup")


def of_suite_task(task: dict[str, Any]) -> list[str]:
    """A task of the model that `fine_tune.py` makes."""
    title = f"{task['title']}, {FINE_TUNED}"
    return row(title, load("suite_fine_tuned"), task["measured"], task["test"])


def row(title: str, report: dict[str, Any], run: Mapping[str, Any], rows: int) -> list[str]:
    """The cells of a run on so many rows."""
    rounding = share_of(run["rounding"], rows) if "rounding" in run else "not measured"
    return [
        title,
        when(report),
        Speedup.read(run, "speedup").bold,
        control(Speedup.read(run, "never_exit")),
        share_of(run["layers_saved"], rows, 0),
        of_bound(run["disagreement"], run.get("compared", rows), report["epsilon"]),
        rounding,
        shares_of(run["stock_accuracy"], run["accuracy"], rows),
    ]


def when(report: Mapping[str, Any]) -> str:
    """The processor, the day and the commit of a measurement."""
    day = datetime.fromisoformat(report["provenance"]["time"])
    return f"{processor(report)}, {day:%-d %B}, {commit(report['provenance']['git'])}"


def commit(git: str | None) -> str:
    """A commit, as `git describe` has named it."""
    if git is None:
        return "unknown"
    name = git.removesuffix(CHANGED)
    return f"`{name}`" if name == git else f"`{name}` with changes"


def speedup_of(report: Mapping[str, Any]) -> Speedup:
    """The speed-up of a report; of an older one of `evaluate`, that of its rounds."""
    if "speedup_rounds" in report or "runs" not in report.get("stock", {}):
        return Speedup.read(report, "speedup")
    return Speedup.of(
        *([run["seconds"] for run in report[name]["runs"]] for name in ("stock", "adainfer"))
    )


def processor(report: Mapping[str, Any]) -> str:
    """A processor in short; results before 4 December 2026 name no instructions but AMX."""
    cpu = str(report["provenance"]["cpu"]).partition(" x ")[0]
    name, _, instructions = cpu.partition(" with ")
    if instructions == "AMX":
        return instructions
    name = "EPYC" if "EPYC" in name else name
    return f"{name} ({instructions})" if instructions else name


def of_bound(value: float, rows: int, epsilon: float) -> str:
    """The share of answers that differ, and whether it is within the bound."""
    interval = clopper_pearson(round(value * rows), rows)
    return f"{spelled(value, interval)}, {verdict(value, interval, epsilon)}"


def latency() -> str:
    """The tail of a server's latency below and at its limit."""
    report = load("serve")
    told = []
    for one in (one for one in report["rates"] if one["rate"] in (20.0, "inf")):
        stock, ours = (p99_of(one[name]) for name in ("stock", "adainfer"))
        sent = "all at once" if one["rate"] == "inf" else f"{one['rate']:g} a second"
        told.append(f"{ours} instead of {stock} with requests sent {sent}")
    limit = report["rates"][-1]["stock"]["request_throughput"]
    return (
        f"A server's p99 latency (SST-2, {report['model']}, {when(report)}; medians of "
        f"{report['rounds']} rounds of {report['requests']} requests, and their range) on a host "
        f"where stock answers at most {limit:.0f} requests a second: "
        f"{', and '.join(told)} ([more](docs/results.md))."
    )


def p99_of(server: Mapping[str, Any]) -> str:
    """The median p99 of a server's rounds, and their range."""
    rounds = [run["p99_e2el_ms"] for run in server["runs"]]
    return f"{server['p99_e2el_ms']:.0f} ms ({min(rounds):.0f} to {max(rounds):.0f})"


def compared() -> str:
    """The comparison of README: what each of three ways spares, by task."""
    rows = []
    for report in load("rivals"):
        found = {one["name"]: one for one in report["rows"] if one["prompts"] == report["timed"]}
        cells = [f"{report['task']}, {report['timed']} prompts"]
        for name in ("student", "exits", "both"):
            spared = share_in(found[name], "spared") if found[name]["spared"] else "nothing"
            cells.append(f"{spared}, {speed(report, name)}{mark(found[name], report)}")
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
