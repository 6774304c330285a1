r"""Requests with `structured_outputs.choice`: a stock server against one that ends them early.

    .venv/bin/python benchmarks/bench_choices.py --model MODEL --data-dir DIR

MODEL is the demo model fine-tuned on the tasks of `bench_probabilities`; DIR holds
TASK/test.jsonl. Our server has no policy: its model is stock vLLM's, and all that it saves are the
steps after a choice is decided. Both servers run side by side and take turns.

With `--exits`, requests leave early, too: a policy for each case is first calibrated on
DIR/TASK/train.jsonl.

It fails if a request fails, if an answer is none of its choices, or does not end by `stop`.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from bench_probabilities import TASKS
from label_requests import post
from report_files import write_report
from sending import Sent, send
from serve_report import OURS, STOCK
from server import Server
from side_by_side import side_by_side
from tqdm import tqdm

from vllm_adainfer.offline.calibration.calibrate import calibrate
from vllm_adainfer.offline.calibration.data import read_rows
from vllm_adainfer.offline.calibration.prompts import CalibrationRequest
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.offline.tables import markdown_table

MOST_TOKENS = 32
REPORTED = 1.0  # seconds after the last answer by which counters are up to date


@dataclass(frozen=True)
class Case:
    """What is asked of the rows of a task."""

    title: str
    task: str
    choices: tuple[str, ...]


CASES = (
    Case("SST-2, a token each", "sst2", (" negative", " positive")),
    Case("TREC, a token each", "trec", tuple(f" {label}" for label in TASKS["trec"].labels)),
    Case("SST-2, sentences", "sst2", (" negative, as a whole.", " positive, as a whole.")),
)


def main(
    model: Annotated[str, typer.Option()],
    data_dir: Annotated[Path, typer.Option()],
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/choices.json"),
    requests: Annotated[int, typer.Option(min=1, help="All at once, in each round.")] = 300,
    alone: Annotated[int, typer.Option(min=1, help="One after the other, likewise.")] = 60,
    compared: Annotated[int, typer.Option(min=1, help="Texts compared, of each case.")] = 800,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    exits: Annotated[bool, typer.Option(help="Calibrate policies, and serve with them.")] = False,
) -> None:
    """Measure, and write JSON and a Markdown table."""
    with tempfile.TemporaryDirectory() as folder:
        switch: dict[str, Any] = {"finish_choices": True}
        if exits:
            switch = {"artifact": calibrated(model, data_dir, Path(folder))}
        with side_by_side(model, switch, ["--max-model-len", "512"]) as servers:
            cases = [
                measured(
                    servers, case, bodies_of(case, data_dir), requests, alone, compared, rounds
                )
                for case in tqdm(CASES, desc="cases")
            ]
    report = {
        "model": Path(model).name,
        "requests": requests,
        "alone": alone,
        "rounds": rounds,
        "cases": cases,
        "provenance": provenance(),
    }
    write_report(output, report, table(report))


def calibrated(model: str, data_dir: Path, folder: Path) -> dict[str, str]:
    """A policy for the choices of each case, by the name of the case."""
    artifacts = {}
    for number, case in enumerate(CASES):
        output = folder / f"policy-{number}"
        request = CalibrationRequest(
            model=model,
            data=data_dir / case.task / "train.jsonl",
            template=TASKS[case.task].template,
            label_field="",  # the right answers are not needed, and named otherwise
            choices=case.choices,
            output=output,
        )
        calibrate(request)
        artifacts[output.name] = str(output)
    return artifacts


def bodies_of(case: Case, data_dir: Path) -> list[dict[str, Any]]:
    """A request for each row of the test part, in random order."""
    rows = read_rows(data_dir / case.task / "test.jsonl")
    random.Random(0).shuffle(rows)
    template = TASKS[case.task].template
    return [
        {
            "model": "model",
            "prompt": template.format_map(row.fields),
            "temperature": 0,
            "max_tokens": MOST_TOKENS,
            "structured_outputs": {"choice": list(case.choices)},
        }
        for row in rows
    ]


def measured(
    servers: Mapping[str, Server],
    case: Case,
    bodies: Sequence[Mapping[str, Any]],
    requests: int,
    alone: int,
    compared: int,
    rounds: int,
) -> dict[str, Any]:
    """Throughput all at once, latency one after the other, and how many texts differ."""
    found: dict[str, Any] = {"title": case.title, "choices": case.choices, STOCK: [], OURS: []}
    several, few = bodies[:compared], bodies[:alone]
    before = layer_rows(servers[OURS])
    texts = {
        name: answers(case, turn(server, several, [0.0] * len(several)))
        for name, server in servers.items()
    }
    pairs = list(zip(texts[STOCK], texts[OURS], strict=True))
    found["compared"], found["differ"] = len(pairs), sum(a != b for a, b in pairs)
    for number in range(rounds):
        for name in list(servers)[:: 1 if number % 2 else -1]:
            together = turn(servers[name], bodies[:requests], [0.0] * len(bodies[:requests]))
            single = turn(servers[name], few, None)
            answers(case, together)
            answers(case, single)
            found[name].append(
                {
                    "requests_per_second": len(together.answers) / together.seconds,
                    "p50_ms": single.latency(0.5),
                    "p99_ms": single.latency(0.99),
                    "completion_tokens": tokens_of(together),
                }
            )
    executed, skipped = layer_rows(servers[OURS]) - before
    found["layers_saved"] = skipped / max(executed + skipped, 1)
    return found


def layer_rows(server: Server) -> npt.NDArray[np.float64]:
    """Rows x layers executed and skipped so far; zeros without a policy."""
    time.sleep(REPORTED)
    names = (f"adainfer:layer_rows_{kind}_total" for kind in ("executed", "skipped"))
    return np.array([sum(server.metrics(name).values()) for name in names])


def turn(server: Server, bodies: Sequence[Mapping[str, Any]], gaps: Sequence[float] | None) -> Sent:
    """One run with an empty prefix cache."""
    if not post(server, "/reset_prefix_cache")["success"]:
        raise RuntimeError("the prefix cache is in use by a server that should be idle")
    return send(server, "/v1/completions", bodies, gaps)


def answers(case: Case, sent: Sent) -> list[str]:
    """The texts.

    Raises:
        RuntimeError: one is none of the choices, or did not end by itself.

    """
    found = [answer["choices"][0] for answer in sent.answers]
    strange = [one for one in found if one["text"] not in case.choices]
    strange += [one for one in found if one["finish_reason"] != "stop"]
    if strange:
        raise RuntimeError(f"not a whole choice: {strange[0]}")
    return [one["text"] for one in found]


def tokens_of(sent: Sent) -> float:
    """Mean number of tokens that an answer counts."""
    return statistics.mean(answer["usage"]["completion_tokens"] for answer in sent.answers)


def table(report: Mapping[str, Any]) -> str:
    """A row for each case: medians over the rounds, stock / ours."""

    def cell(case: Mapping[str, Any], key: str) -> str:
        stock, ours = (statistics.median(run[key] for run in case[name]) for name in (STOCK, OURS))
        return f"{stock:.1f} / {ours:.1f} (**{ours / stock:.2f}x**)"

    return (
        markdown_table(
            [
                "choices",
                "requests/s, all at once",
                "p50 latency alone, ms",
                "p99, ms",
                "tokens of an answer",
                "layers saved",
                "texts that differ",
            ],
            [
                [
                    case["title"],
                    *(cell(case, key) for key in ("requests_per_second", "p50_ms", "p99_ms")),
                    " / ".join(
                        f"{statistics.median(run['completion_tokens'] for run in case[name]):.1f}"
                        for name in (STOCK, OURS)
                    ),
                    f"{case['layers_saved']:.0%}",
                    f"{case['differ']} of {case['compared']}",
                ]
                for case in report["cases"]
            ],
            text_columns=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    typer.run(main)
