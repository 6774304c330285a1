r"""Other ways to answer cheaply, under one promise: small classifiers, a cut model, other exits.

    .venv/bin/python benchmarks/rivals/bench_rivals.py --model MODEL --task cr

MODEL is one that `fine_tune.py` has made; all rows are from its ``rows``, which it never learnt.
All methods learn from the same prompts and the whole model's answers to them, without labels. At
most 2 % of all requests may be answered otherwise than by the whole model (exact bound, confidence
90 %): a method keeps the promise by the prompts that it holds out, by a threshold on how sure it
is, and leaves other requests to the whole model. AdaInfer's own rule has no such promise. Shares
are of prompts that nothing was fitted to, by the whole model's recorded states and answers; speed
is that of one run beside stock vLLM, after calibration with `--timed` prompts. Exit points are
chosen as if the student took no time, so that it is in its policies also where it costs more.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported

import typer

from benchmarks.common.minilm import fetch_minilm
from benchmarks.common.report_files import add_report
from benchmarks.rivals.contest import Contest
from benchmarks.rivals.report import markdown
from benchmarks.rivals.task import form_of, read_task, sample
from benchmarks.rivals.timed import ALONE, AT_ONCE, timed_in_turn
from vllm_adainfer.cli.app import errors_as_sentences
from vllm_adainfer.cli.arguments import names_of
from vllm_adainfer.offline.calibration.options import CalibrationRequest, PolicyOptions
from vllm_adainfer.offline.provenance import provenance

CACHE = Path(__file__).parents[2] / ".cache"


@errors_as_sentences
def main(
    model: Annotated[str, typer.Option()],
    task: Annotated[str, typer.Option(help="A folder of MODEL/rows.")],
    budgets: Annotated[str, typer.Option(help="Prompts to learn from.")] = "300,1000,3000",
    timed: Annotated[int, typer.Option(help="The budget that is timed.")] = 1000,
    test: Annotated[int, typer.Option(help="Prompts that nothing is fitted to.")] = 600,
    epsilon: Annotated[float, typer.Option()] = 0.02,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/rivals.json"),
) -> None:
    """Compare, and add the task to the JSON and the Markdown of `output`."""
    sizes = [int(size) for size in names_of(budgets)]
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        most = sample(Path(model, "rows", task), rows, max(sizes) + test) - test
        title, asked = form_of(task)
        request = CalibrationRequest(
            model=model,
            data=rows,
            output=Path(folder, "policy"),
            probe="pooled-label-head",
            student=str(fetch_minilm(CACHE / "all-MiniLM-L6-v2")),
            options=PolicyOptions(epsilon=epsilon),
            **asked,
        )
        start = time.perf_counter()
        prompts = read_task(request, most)
        recording_seconds = (time.perf_counter() - start) / (most + test)
        found, times = [], {}
        for budget in sorted({min(size, most) for size in sizes}):
            made = Contest(prompts, budget)
            made.judge()
            found += [one | {"prompts": budget} for one in made.rows]
            if budget == min(timed, most):
                times = timed_in_turn(prompts, made, Path(folder))
    report = {
        "task": title,
        "model": Path(model).name,
        "epsilon": epsilon,
        "test": test,
        "timed": min(timed, most),
        "at_once": AT_ONCE,
        "alone": ALONE,
        "recording_seconds": recording_seconds,
        "stock_accuracy": prompts.tests.stock_accuracy,
        "cut_layers": prompts.cut_layers,
        "depth": prompts.recording.model.depth,
        "rows": found,
        "times": times,
        "provenance": provenance(),
    }
    add_report(output, report, markdown)


if __name__ == "__main__":
    typer.run(main)
