r"""Objects under one bound: stock vLLM, drafts alone, and policies without and with a student.

    .venv/bin/python benchmarks/offline/object_requests.py --data-dir DIR --output TEST.jsonl \
        --each 600
    .venv/bin/python benchmarks/offline/object_requests.py --data-dir DIR --output TRAIN.jsonl \
        --part train --each 1500
    .venv/bin/python benchmarks/offline/bench_objects.py --model MODEL --student MINILM \
        --train TRAIN.jsonl --test TEST.jsonl --policies FOLDER

`train_writer.py` makes MODEL. For each schema, policies are calibrated on the requests
of TRAIN, unless FOLDER has them; then all engines, compiled, in this process and on one thread,
answer those of TEST, and take turns with some of them by the number in flight.

Each part is written when it is done. The same command at the same commit goes on where it was cut.
"""

from __future__ import annotations

import os

# Set before libraries read them: one process and one thread, as in a server on two cores.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import typer

from benchmarks.common.report_files import write_report
from benchmarks.offline.bench_structured import LONGEST, begun, own_caches, settings_of
from benchmarks.offline.object_rounds import DRAFTS, STUDENT, of_schema
from benchmarks.offline.objects_report import table
from benchmarks.offline.structured_engine import OURS, STOCK, engines
from benchmarks.offline.structured_requests import bodies_by_kind, lines_of
from vllm_adainfer.artifact.files import load_artifact_config
from vllm_adainfer.offline.calibration.calibrate import (
    fit_and_certify,
    record_objects,
    say_what_they_share,
)
from vllm_adainfer.offline.calibration.options import CalibrationRequest
from vllm_adainfer.offline.calibration.prompts import load_prompts
from vllm_adainfer.offline.evaluation.report import write_whole

SCHEMAS = ("review", "news", "question", "seven booleans")


def main(
    model: Annotated[str, typer.Option()],
    train: Annotated[Path, typer.Option(help="A batch file; object_requests.py writes one.")],
    test: Annotated[Path, typer.Option(help="Another one, of texts that TRAIN does not have.")],
    policies: Annotated[Path, typer.Option(help="A folder for the policies.")],
    student: Annotated[str, typer.Option(help="An encoder, see calibrate --student.")] = "",
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/objects.json"),
    rounds: Annotated[int, typer.Option(min=2)] = 10,
    only: Annotated[str, typer.Option(help="Schemas to measure; all by default.")] = "",
    minutes: Annotated[float, typer.Option(help="Begin nothing new after so many.")] = 25,
) -> None:
    """Measure what the report does not have yet, and write JSON and a Markdown table."""
    end = time.monotonic() + 60 * minutes
    report = begun(output, settings_of(model, test, rounds, eager=False))
    tests, done = bodies_by_kind(test), [part["schema"] for part in report["parts"]]
    missing = [one for one in SCHEMAS if one not in done and (not only or one in only.split(","))]
    with own_caches():
        for schema in missing:
            if time.monotonic() > end:
                typer.echo("time is up: the same command does the rest")
                break
            artifacts = calibrated(model, train, schema, policies, student)
            switches: dict[str, dict[str, Any] | None] = {
                name: {"artifact": str(artifact)} for name, artifact in artifacts.items()
            }
            switches |= {STOCK: None, DRAFTS: {"draft_structure": True}}
            with engines(model, switches, LONGEST) as started:
                measured = of_schema(started, tests[schema], rounds, artifacts[OURS])
            has_student = STUDENT in artifacts if student else None
            report["parts"].append({"schema": schema, "student": has_student, **measured})
            write_whole(output, json.dumps(report, indent=1) + "\n")
    write_report(output, report, table(report))


def calibrated(
    model: str, train: Path, schema: str, policies: Path, student: str
) -> dict[str, Path]:
    """The policies of a schema, by the names of their engines.

    None with a student where `calibrate` leaves it out.
    """
    folder = policies / schema.replace(" ", "_")
    artifacts = {OURS: folder / "heads"} | ({STUDENT: folder / "student"} if student else {})
    if not all(artifact.is_dir() for artifact in artifacts.values()):
        folder.mkdir(parents=True, exist_ok=True)
        data = folder / "train.jsonl"
        data.write_text("".join(lines_of(train, schema)))
        first = CalibrationRequest(model=model, data=data, output=artifacts[OURS])
        loaded = load_prompts(first)
        assert loaded.schema is not None, "the requests ask for objects"
        prompts, rows = record_objects(first, loaded, loaded.schema)
        say_what_they_share(prompts)
        fit_and_certify(first, prompts, rows)
        if student:
            second = replace(first, output=artifacts[STUDENT], student=student)
            with_student = replace(prompts, student=load_prompts(second).student)
            fit_and_certify(second, with_student, rows)
    return {
        name: artifact
        for name, artifact in artifacts.items()
        if name == OURS or load_artifact_config(str(artifact)).student is not None
    }


if __name__ == "__main__":
    typer.run(main)
