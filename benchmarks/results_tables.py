"""Tables of `docs/results.md` that are made from reports, by task, promise and model family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.common.intervals import control, never_exiting, share_of, shares_of
from benchmarks.front_page import load, of_bound, speedup_of
from benchmarks.results_summary import middle, ratio_of
from vllm_adainfer.offline.facts.document import markdown_grid, markdown_table
from vllm_adainfer.offline.reports.speedup import Speedup

REPORTS = {
    "sst2_six_shot": "SST-2, 6-shot, SmolLM2-135M-Instruct",
    "demo": "`make demo`: 8-shot reviews, SmolLM2-135M-Instruct",
    "demo_amx": "`make demo` on a processor with AMX",
}


SUITES = {
    "suite_fine_tuned": "SmolLM2-135M as `fine_tune.py` of the suite makes it",
    "suite_smollm2_instruct": "The whole suite on SmolLM2-135M-Instruct, few-shot",
    "suite_smollm2_squad": "SQuAD again, after the prefix cache began to keep more",
}


def workloads() -> list[str]:
    """A row per report of `evaluate`."""
    rows = []
    for name, title in REPORTS.items():
        report = load(name)
        stock, ours = report["stock"], report["adainfer"]
        rows.append(
            {
                "workload": title,
                "prompts": f"{report['n']} x {report['prompt_tokens_mean']:.0f} tokens",
                "stock, requests/s": f"{stock['requests_per_second']:.1f}",
                "ours, requests/s": f"{ours['requests_per_second']:.1f}",
                "speed-up (95 %)": speedup_of(report).bold,
                "never exiting": control(Speedup.read(report["never_exit"], "speedup")),
                "layers saved (95 %)": share_of(report["layers_saved"], report["n"], 0),
                "disagreement (95 %)": of_bound(
                    report["disagreement"], report.get("compared", report["n"]), report["epsilon"]
                ),
                "differs from stock (95 %)": share_of(
                    report["disagreement_with_stock"], report["n"]
                ),
                "accuracy, stock / ours (95 %)": shares_of(
                    stock["accuracy"], ours["accuracy"], report["n"]
                ),
                "efficiency": f"{report['efficiency']:.2f}",
            }
        )

    return [markdown_table(rows)]


def suite_table(name: str) -> list[str]:
    """A suite's measurements, next to AdaInfer as published."""
    report = load(name)
    rows = []
    for task in report["tasks"]:
        run = task["measured"]
        count = task["test"]
        start = [f"{task['title']}, {task['shots']}", f"{round(task['chance'] * count)} of {count}"]
        full = task["full_depth"]["accuracy"]
        if run is None:
            why = "at chance" if task["at_chance"] else "no exit pays"
            rows.append([*start, f"{share_of(full, count)}, {why}", *8 * [""]])
            continue
        rows.append(
            [
                *start,
                shares_of(run["stock_accuracy"], run["accuracy"], count),
                share_of(run["disagreement"], run.get("compared", count)),
                share_of(run["rounding"], count) if "rounding" in run else "not measured",
                share_of(run["layers_saved"], count, 0),
                Speedup.read(run, "speedup").bold,
                never_exiting(run),
                ", ".join(map(str, task["exit_points"])),
                their_rule(task, "adainfer"),
                their_rule(task, "adainfer_labels"),
            ]
        )
    columns = [
        "task, shots",
        "commonest answer",
        "accuracy, stock / ours (95 %)",
        "disagreement (95 %)",
        "two passes of stock differ (95 %)",
        "layers saved (95 %)",
        "speed-up (95 %)",
        "never exiting (95 %)",
        "exit points",
        "AdaInfer's own rule: layers saved (95 %), points lost",
        "the same among the labels",
    ]
    return [
        f"{SUITES[name]}, epsilon {report['epsilon']:g} at delta {report['delta']:g}, "
        f"{report['provenance']['cpu']}:",
        "",
        markdown_grid(columns, rows),
    ]


def their_rule(task: Mapping[str, Any], name: str) -> str:
    """What AdaInfer's own rule saves and loses; older suites have not measured it both ways."""
    if name not in task["methods"]:
        return "not measured"
    found = task["methods"][name]
    if found is None:
        return "no policy"
    lost = 100 * (task["full_depth"]["accuracy"] - found["accuracy"])
    return f"{share_of(found['layers_saved'], task['test'], 0)}, {lost:.1f}"


def choices_table() -> list[str]:
    """Choices over HTTP, with one policy each."""
    report = load("choices_exits")
    rows = []
    for case in report["cases"]:
        compared = case["compared"]
        cells = [
            f"{middle(case, 'stock', key):.1f} / {middle(case, 'adainfer', key):.1f} "
            f"= {ratio_of(case, key).bold}"
            for key in ("requests_per_second", "p50_ms")
        ]
        differ = share_of(case["differ"] / compared, compared)
        cells.insert(1, never_exiting(case))
        rows.append([case["title"], *cells, share_of(case["layers_saved"], compared), differ])
    columns = [
        "choices",
        "requests/s, all at once",
        "never exiting (95 %)",
        "p50 latency alone, ms",
        "layers saved (95 %)",
        "texts that differ from stock (95 %)",
    ]
    return [
        "Requests with [`structured_outputs.choice`](choices.md) over HTTP, stock / ours, three "
        "policies in one server ([more](../benchmarks/README.md#requests-with-a-choice)):",
        "",
        markdown_grid(columns, rows),
    ]
