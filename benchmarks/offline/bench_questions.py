r"""One policy for a mixture of questions: layers saved and risk by question, seen and unseen.

    .venv/bin/python benchmarks/offline/bench_questions.py --model MODEL --train train.jsonl \
        --test test.jsonl --label-pool letters,yes-no

The files hold requests, as `calibrate --data` takes them. They are recorded once; the rest of
`calibrate` and then `evaluate` run for a policy for the label alone and for one for its
probabilities. Finally, for each question, a policy calibrated on all others is judged on that one,
to show what the bound is worth on a question calibration has not seen.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import numpy as np
import typer
from tqdm import tqdm

from benchmarks.common.intervals import bounded, control, share_of, shares_of
from benchmarks.common.report_files import write_report
from benchmarks.front_page import speedup_of
from vllm_adainfer.artifact.files import load_details
from vllm_adainfer.offline.calibration.calibrate import (
    calibration_of,
    fit_and_certify,
    record_prompts,
)
from vllm_adainfer.offline.calibration.certify.path import threshold_path
from vllm_adainfer.offline.calibration.fit.exits import judge
from vllm_adainfer.offline.calibration.fit_policy import fit_policy
from vllm_adainfer.offline.calibration.options import CalibrationRequest, PolicyOptions
from vllm_adainfer.offline.calibration.prompts import Prompts, load_prompts
from vllm_adainfer.offline.calibration.record.rows import Rows
from vllm_adainfer.offline.evaluation.evaluate import evaluate
from vllm_adainfer.offline.evaluation.rounds import ROUNDS
from vllm_adainfer.offline.facts.document import markdown_grid, markdown_table
from vllm_adainfer.offline.reports.speedup import Speedup
from vllm_adainfer.promise.tolerance import Tolerance


def main(
    model: Annotated[str, typer.Option()],
    train: Annotated[Path, typer.Option(help="Requests to calibrate on.")],
    test: Annotated[Path, typer.Option(help="Requests to measure, each with its right label.")],
    label_pool: Annotated[str, typer.Option()] = "letters,yes-no",
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/questions.json"),
    tolerance: Annotated[float, typer.Option()] = 0.05,
    epsilon: Annotated[float, typer.Option()] = 0.02,
    repeat: Annotated[int, typer.Option(help="Rounds to time, of stock and ours.")] = ROUNDS,
) -> None:
    """Calibrate, measure, and write JSON and a Markdown table."""
    with tempfile.TemporaryDirectory() as folder:
        label = CalibrationRequest(
            model=model,
            data=train,
            output=Path(folder, "label"),
            label_pool=tuple(label_pool.split(",")),
            options=PolicyOptions(epsilon=epsilon),
        )
        promise = replace(label.options, promise=Tolerance(tolerance=tolerance))
        probabilities = replace(label, output=Path(folder, "probabilities"), options=promise)
        prompts = load_prompts(label)
        recording = record_prompts(label, prompts)
        reports = []
        for request in (label, probabilities):
            config = fit_and_certify(request, prompts, recording)
            measured = evaluate(
                model=model,
                artifact=str(request.output),
                data=test,
                epsilon=epsilon,
                repeat=repeat,
            )
            reports.append(
                {
                    "promise": config.promise.words(),
                    **measured,
                    "exit_points": list(config.exit_points),
                    "questions": load_details(str(request.output))["questions"],
                    "left_out": left_out(request, prompts, recording),
                }
            )
    write_report(output, reports, tables(reports))


def left_out(
    request: CalibrationRequest, prompts: Prompts, recording: Rows
) -> list[dict[str, Any]]:
    """For each question, the outcome of a policy calibrated on all others."""
    calibration = calibration_of(request, prompts, recording)
    names = np.array(calibration.questions)
    rows = []
    for name in tqdm(np.unique(names), desc="leave one out", disable=None):
        split = calibration.split
        fit, certify = (part[names[part] != name] for part in (split.fit, split.certify))
        split = replace(split, fit=fit, certify=certify)
        policy = fit_policy(replace(calibration, split=split), request.probe)
        point = policy.points.get(request.options.epsilon)
        own = recording.of(np.flatnonzero(names == name))
        row: dict[str, Any] = {"question": str(name), "prompts": len(own)}
        row |= {"risk": None, "layers_saved": None}
        if point is not None:
            scored = [
                judge(
                    one.probe, one.layer, recording, own, calibration.target, calibration.right
                ).scored(one.classifier)
                for one in policy.exits
            ]
            layers = [one.layer for one in policy.exits]
            [found] = threshold_path(layers, scored, recording.model.depth, [point.threshold])
            row |= {"risk": found.risk, "layers_saved": found.layers_saved}
        rows.append(row)
    return rows


def tables(reports: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row per guarantee, then a row per question."""
    head = markdown_table(
        [
            {
                "promise": report["promise"],
                "layers saved (95 %)": share_of(report["layers_saved"], report["n"], 0),
                "speed-up (95 %)": speedup_of(report).bold,
                "never exiting (95 %)": control(Speedup.read(report["never_exit"], "speedup")),
                "accuracy, stock / ours (95 %)": shares_of(
                    report["stock"]["accuracy"], report["adainfer"]["accuracy"], report["n"]
                ),
                "wrong (95 %)": bounded(wrong(report), report),
                "exit points": ", ".join(map(str, report["exit_points"])),
            }
            for report in reports
        ],
        text_columns=1,
    )
    names = [row["question"] for row in reports[0]["questions"]]
    rows = []
    for name in sorted(names):
        cells = [name.splitlines()[0]]
        for report in reports:
            [seen] = [row for row in report["questions"] if row["question"] == name]
            [unseen] = [row for row in report["left_out"] if row["question"] == name]
            cells += [_outcome(seen), _outcome(unseen)]
        rows.append(cells)
    columns = ["question"]
    for report in reports:
        columns += [f"{report['promise']}: saved, wrong (95 %)", "left out of calibration"]
    return f"{head}\n\n{markdown_grid(columns, rows, text_columns=1)}\n"


def _outcome(row: Mapping[str, Any]) -> str:
    """The layers that a question's prompts save, and its wrong answers."""
    if row["risk"] is None:
        return "no policy"
    count = row["prompts"]
    return f"{share_of(row['layers_saved'], count, 0)}, {share_of(row['risk'], count)}"


def wrong(report: dict[str, Any]) -> float:
    """The share of answers that the bound limits."""
    if "probabilities" not in report:
        return float(report["disagreement"])
    return float(report["probabilities"]["levels"][0]["wrong"])


if __name__ == "__main__":
    typer.run(main)
