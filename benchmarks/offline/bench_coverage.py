r"""How often a policy breaks its bound: policies made of other rows each time, on the same prompts.

    .venv/bin/python benchmarks/offline/bench_coverage.py --demo
    .venv/bin/python benchmarks/offline/bench_coverage.py --model MODEL --task sst2 --rows 1500

MODEL is one that `fine_tune.py` has made: policies are made of rows of its training file in
``rows/TASK``, and judged by all of the test file. With `--demo`, model and reviews are those of
`make demo`.
"""

from __future__ import annotations

import os

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}

import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import numpy as np
import typer

from benchmarks.common.report_files import add_report
from benchmarks.offline.draws import cells, of_draw
from benchmarks.rivals.task import form_of
from vllm_adainfer.cli.app import errors_as_sentences
from vllm_adainfer.offline.calibration.calibrate import record_prompts
from vllm_adainfer.offline.calibration.options import CalibrationRequest
from vllm_adainfer.offline.calibration.prompts import load_prompts
from vllm_adainfer.offline.demo.model import fetch_demo_model
from vllm_adainfer.offline.demo.run import LABELS
from vllm_adainfer.offline.facts.document import markdown_table
from vllm_adainfer.offline.progress import progress
from vllm_adainfer.offline.provenance import provenance

DEMO = "8-shot reviews (`make demo`)"


@errors_as_sentences
def main(
    model: Annotated[str, typer.Option()] = "",
    task: Annotated[str, typer.Option(help="A folder of MODEL/rows.")] = "sst2",
    demo: Annotated[bool, typer.Option("--demo", help="The demo's model and reviews.")] = False,
    draws: Annotated[int, typer.Option(min=2)] = 30,
    rows: Annotated[int, typer.Option(help="Rows of a draw.")] = 440,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/coverage.json"),
) -> None:
    """Measure, and add the task to the JSON and the Markdown of `output`."""
    with tempfile.TemporaryDirectory() as folder:
        if demo:
            model = model or str(fetch_demo_model(Path(folder, "model")))
            source = Path(str(files("vllm_adainfer.offline.demo")))
            title = DEMO
            asked: dict[str, Any] = {"template": f"@{source / 'template.txt'}", "labels": LABELS}
            parts = source / "calibration.jsonl", source / "test.jsonl"
        else:
            title, asked = form_of(task)
            parts = (
                Path(model, "rows", task, "train.jsonl"),
                Path(model, "rows", task, "test.jsonl"),
            )
        texts = [part.read_text(encoding="utf-8").splitlines(keepends=True) for part in parts]
        data = Path(folder, "rows.jsonl")
        data.write_text("".join(line for lines in texts for line in lines), encoding="utf-8")
        request = CalibrationRequest(model=model, data=data, output=Path(folder, "policy"), **asked)
        prompts = load_prompts(request)
        recording = record_prompts(request, prompts)
    # Prompts come in random order: those behind the training file's lines are the tests.
    lines = np.array([int(one.place.rpartition(" ")[2]) for one in prompts.examples])
    pool, tests = (np.flatnonzero(some) for some in (lines <= len(texts[0]), lines > len(texts[0])))
    found = [
        of_draw(
            request,
            prompts,
            recording,
            np.random.default_rng(draw).permutation(pool)[:rows],
            tests,
        )
        for draw in progress(range(draws), desc="draws", unit="draw")
    ]
    report = {
        "task": title,
        "model": Path(model).name,
        "rows": rows,
        "pool": len(pool),
        "epsilon": request.options.epsilon,
        "delta": request.options.delta,
        "draws": found,
        "provenance": provenance(),
    }
    add_report(output, report, table)


def table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each task."""
    return markdown_table([{"task": one["task"], **cells(one)} for one in reports], text_columns=2)


if __name__ == "__main__":
    typer.run(main)
