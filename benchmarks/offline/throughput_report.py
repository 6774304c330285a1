"""The report of `bench_throughput.py`: measured speed-ups and how much was possible.

    .venv/bin/python benchmarks/offline/throughput_report.py

rewrites the table and the plot of the committed result, with the current results of the suite.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

from benchmarks.common.report_files import as_png
from vllm_adainfer.offline.facts.document import markdown_grid
from vllm_adainfer.offline.reports.speedup import Speedup

RESULTS = Path(__file__).parents[1] / "results"

STOCK, HALF, IDLE = "stock", "half the layers", "installed, idle"


def case_rows(
    case: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The rows of the report for one case, one per scenario.

    ``bound`` is the speed-up if all skipped layers saved their time. Stock with half of its layers
    shows how much of stock's time is spent in layers; only that time can be saved. ``stock`` of a
    run are the seconds of stock beside it.
    """
    half = runs[HALF]
    in_layers = 2 * (1 - statistics.median(half["seconds"]) / statistics.median(half["stock"]))
    rows = []
    for name, run in runs.items():
        if name in (STOCK, HALF):
            continue
        speedup = Speedup.of(run["stock"], run["seconds"])
        saved = run["layers_saved"] or 0.0
        bound = 1 / (1 - in_layers * saved)
        rows.append(
            {
                **case,
                "scenario": name,
                "stock_seconds": statistics.median(run["stock"]),
                "outside_layers": 1 - in_layers,
                "layers_saved": saved,
                **speedup.entries("speedup"),
                "bound": bound,
                "of_bound": speedup.value / bound,
            }
        )
    return rows


def table(report: Mapping[str, Any]) -> str:
    """Markdown: a row per case, a column per scenario."""
    rows = report["cases"]
    names = list(dict.fromkeys(row["scenario"] for row in rows))
    cases: dict[tuple[int, int, int], dict[str, Any]] = {}
    for row in rows:
        cases.setdefault((row["length"], row["batch"], row["output"]), {})[row["scenario"]] = row
    cells = []
    for (length, batch, output), by_name in cases.items():
        any_row = next(iter(by_name.values()))
        speedups = [
            f"{row['speedup']:.2f}x ({row['of_bound']:.2f})" if (row := by_name.get(name)) else ""
            for name in names
        ]
        cells.append(
            [
                f"{length} x {batch}, {output}",
                f"{1000 * any_row['stock_seconds']:.0f}",
                f"{any_row['outside_layers']:.0%}",
                *speedups,
            ]
        )
    columns = ["prompt tokens x requests, output tokens", "stock, ms", "outside layers", *names]
    return (
        f"Synthetic: {report['synthetic']}. {report['model']}, {report['rounds']} rounds. Speed-up "
        "over stock vLLM, and in brackets its share of the bound, which counts time outside the "
        f"layers as not skippable.\n\n{markdown_grid(columns, cells, text_columns=0)}\n"
    )


def plot(report: Mapping[str, Any]) -> bytes:
    """PNG: speed-up against layers saved, with the ideal line where skipped work costs no time.

    Stars are calibrated policies, from the suite's committed results.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    saved = [index / 100 for index in range(66)]
    axes.plot(
        saved,
        [1 / (1 - share) for share in saved],
        "k--",
        label="ideal",
    )
    for name in dict.fromkeys(row["scenario"] for row in report["cases"]):
        rows = [row for row in report["cases"] if row["scenario"] == name and row["output"] == 1]
        axes.plot(
            [row["layers_saved"] for row in rows],
            [row["speedup"] for row in rows],
            "o",
            alpha=0.6,
            label=name,
        )
    suites = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("suite_*.json"))]
    for cpu in dict.fromkeys(suite["provenance"]["cpu"] for suite in suites):
        own = [suite for suite in suites if suite["provenance"]["cpu"] == cpu]
        real = [task["measured"] for suite in own for task in suite["tasks"] if task["measured"]]
        axes.plot(
            [run["layers_saved"] for run in real],
            [run["speedup"] for run in real],
            "k*",
            label=f"calibrated policies, real tasks, {cpu}",
        )
    axes.axhline(1, color="grey", linewidth=0.5)
    axes.set_xlabel("fraction of token-layers skipped")
    axes.set_ylabel("speed-up over stock vLLM")
    axes.set_title(f"{report['model']}: scripted exits (dots) and calibrated policies (stars)")
    axes.legend(fontsize=8)
    return as_png(figure, report["provenance"])


if __name__ == "__main__":
    committed = json.loads((RESULTS / "throughput.json").read_text())
    (RESULTS / "throughput.md").write_text(table(committed))
    (RESULTS / "throughput.png").write_bytes(plot(committed))
