r"""Policies for label probabilities: layers saved and how far probabilities move, by tolerance.

    .venv/bin/python benchmarks/offline/bench_probabilities.py --model MODEL --data-dir DIR

MODEL is the demo model fine-tuned on the tasks of `common/tasks.py`; DIR holds TASK/train.jsonl and
TASK/test.jsonl. Each task is recorded once; for each tolerance, the rest of `calibrate` and then
`evaluate` run at one epsilon.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import typer

from benchmarks.common.intervals import bounded, share_of
from benchmarks.common.report_files import write_report
from benchmarks.common.tasks import TASKS
from benchmarks.front_page import speedup_of
from vllm_adainfer.offline.calibration.calibrate import fit_and_certify, record_prompts
from vllm_adainfer.offline.calibration.options import CalibrationRequest, PolicyOptions
from vllm_adainfer.offline.calibration.prompts import load_prompts
from vllm_adainfer.offline.evaluation.evaluate import evaluate
from vllm_adainfer.offline.evaluation.promised import default_level
from vllm_adainfer.offline.evaluation.rounds import ROUNDS
from vllm_adainfer.offline.facts.document import markdown_table
from vllm_adainfer.promise.tolerance import Tolerance


def main(
    model: Annotated[str, typer.Option()],
    data_dir: Annotated[Path, typer.Option()],
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/probabilities.json"),
    policies: Annotated[
        Path | None,
        typer.Option(help="Keep policies here, and reuse those that are already there."),
    ] = None,
    tolerances: Annotated[str, typer.Option()] = "0.02,0.05,0.1",
    epsilon: Annotated[float, typer.Option()] = 0.02,
    rows: Annotated[int, typer.Option(help="Most test rows per task.")] = 800,
    repeat: Annotated[int, typer.Option(help="Rounds to time, of stock and ours.")] = ROUNDS,
) -> None:
    """Calibrate, measure, and write JSON and a Markdown table."""
    with tempfile.TemporaryDirectory() as folder:
        artifacts = [
            artifact
            for name in TASKS
            for artifact in calibrated(
                name,
                CalibrationRequest(
                    model=model,
                    data=data_dir / name / "train.jsonl",
                    output=policies or Path(folder),
                    template=TASKS[name].template,
                    labels=tuple(TASKS[name].labels.values()),
                    options=PolicyOptions(epsilon=epsilon),
                ),
                [float(tolerance) for tolerance in tolerances.split(",")],
            )
        ]
        reports = []
        for name, artifact in artifacts:
            lines = (data_dir / name / "test.jsonl").read_text().strip().split("\n")
            random.Random(0).shuffle(lines)  # a file may be sorted by label
            test = Path(folder, f"{name}-test.jsonl")
            test.write_text("\n".join(lines[:rows]))
            found = evaluate(
                model=model,
                artifact=str(artifact),
                data=test,
                template=TASKS[name].template,
                epsilon=epsilon,
                repeat=repeat,
            )
            reports.append({"task": name, **found})
            write_report(output, reports, table(reports))


def calibrated(
    name: str, request: CalibrationRequest, tolerances: Sequence[float]
) -> list[tuple[str, Path]]:
    """Calibrate a policy for each tolerance below the request's output; returns their paths."""
    requests = [
        replace(
            request,
            output=request.output / f"{name}-{tolerance:g}",
            options=replace(request.options, promise=Tolerance(tolerance=tolerance)),
        )
        for tolerance in tolerances
    ]
    missing = [one for one in requests if not one.output.exists()]
    if missing:
        prompts = load_prompts(missing[0])
        recording = record_prompts(missing[0], prompts)
        for one in missing:
            fit_and_certify(one, prompts, recording)
    return [(name, one.output) for one in requests]


def table(reports: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row per task and tolerance."""

    def moves(one: dict[str, Any]) -> str:
        return f"{one['move_mean']:.3f}, {one['move_p95']:.3f}"

    rows = []
    for report in reports:
        found = report["probabilities"]
        n = report["n"]
        ours, never, stock = default_level(report), found["never_exit"], found["stock"]
        rows.append(
            {
                "task, prompts": f"{TASKS[report['task']].title}, {report['n']}",
                "tolerance": f"{report['tolerance']:.2f}",
                "mass promised": "yes" if report["label_mass"] else "no",
                "layers saved (95 %)": share_of(report["layers_saved"], n, 0),
                "speed-up (95 %)": speedup_of(report).bold,
                "beyond the tolerance (95 %)": bounded(ours["wrong"], report),
                "best label differs (95 %)": share_of(ours["label_differs"], n),
                "largest move: mean, 95th percentile": moves(ours),
                "stock, by rounding: beyond (95 %), mean, 95th percentile": (
                    f"{share_of(stock['wrong'], n)}, {moves(stock)}"
                ),
                "ECE, never exiting / ours": f"{never['ece']:.3f} / {ours['ece']:.3f}",
                "Brier score, likewise": f"{never['brier']:.3f} / {ours['brier']:.3f}",
            }
        )
    return markdown_table(rows, text_columns=1) + "\n"


if __name__ == "__main__":
    typer.run(main)
