"""Train, calibrate and measure small models of several families side by side.

    .venv/bin/python benchmarks/offline/bench_families.py

All have 12 layers and learn from the same text, see `small_models.py`. Calibration and evaluation
run the code of the commands of that name, on rows the models have not seen.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import typer

from benchmarks.common.intervals import bounded, control, share_of, shares_of
from benchmarks.common.report_files import write_report
from benchmarks.front_page import speedup_of
from benchmarks.offline.small_models import (
    FAMILIES,
    SOURCES,
    TEMPLATE,
    Row,
    snippets,
    train,
    with_shots,
)
from vllm_adainfer.offline.calibration.calibrate import calibrate
from vllm_adainfer.offline.calibration.options import CalibrationRequest
from vllm_adainfer.offline.evaluation.evaluate import evaluate
from vllm_adainfer.offline.evaluation.rounds import ROUNDS
from vllm_adainfer.offline.facts.document import markdown_table
from vllm_adainfer.offline.reports.speedup import Speedup

TRAIN, CALIBRATE = 1400, 700  # rows


def main(
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/families.json"),
    repeat: Annotated[int, typer.Option(help="Rounds to time, of stock and ours.")] = ROUNDS,
    family: Annotated[
        list[str] | None, typer.Option(help="Family to run, repeatable; by default all.")
    ] = None,
    shots: Annotated[int, typer.Option(help="Answered rows before each prompt.")] = 0,
    test_rows: Annotated[int, typer.Option()] = 1500,
) -> None:
    """Train, calibrate and measure each family; write JSON and a Markdown table."""
    rows = snippets()
    with tempfile.TemporaryDirectory() as directory:
        reports = {
            name: measured(name, rows, Path(directory) / name, repeat, shots, test_rows)
            for name in family or FAMILIES
        }
    write_report(output, reports, table(reports))


def measured(
    family: str, rows: Sequence[Row], directory: Path, repeat: int, shots: int, test_rows: int
) -> dict[str, Any]:
    """The report of `evaluate` for one family, with the training time."""
    directory.mkdir()
    known = rows[:TRAIN]
    rest = with_shots(rows[TRAIN : TRAIN + CALIBRATE + test_rows], known, shots)
    parts = {"calibration": rest[:CALIBRATE], "test": rest[CALIBRATE:]}
    for name, part in parts.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    start = time.perf_counter()
    name = family.lower().replace(" ", "-")
    model = str(train(family, known, directory / f"small-{name}", shots))
    seconds = time.perf_counter() - start
    artifact = directory / "artifact"
    calibrate(
        CalibrationRequest(
            model=model,
            data=directory / "calibration.jsonl",
            output=artifact,
            template=TEMPLATE,
            labels=tuple(SOURCES),
        )
    )
    report = evaluate(
        model=model,
        artifact=str(artifact),
        data=directory / "test.jsonl",
        template=TEMPLATE,
        repeat=repeat,
    )
    return {"training_seconds": seconds, "shots": shots, **report}


def table(reports: dict[str, Any]) -> str:
    """Markdown: a row per family."""

    rows = []
    for family, report in reports.items():
        n = report["n"]
        exits = [
            f"{layer}: {round(share * n)}"
            for layer, share in report["adainfer"]["exit_histogram"].items()
            if share
        ]
        rows.append(
            {
                "family": f"{family}, {report['layers_total']} layers",
                "accuracy, stock / ours (95 %)": shares_of(
                    report["stock"]["accuracy"], report["adainfer"]["accuracy"], n
                ),
                "requests that leave after each layer": ", ".join(exits),
                "layers saved (95 %)": share_of(report["layers_saved"], n, 0),
                "disagreement (95 %)": bounded(report["disagreement"], report),
                "speed-up (95 %)": speedup_of(report).bold,
                "never exiting (95 %)": control(Speedup.read(report["never_exit"], "speedup")),
            }
        )
    return markdown_table(rows) + "\n"


if __name__ == "__main__":
    typer.run(main)
