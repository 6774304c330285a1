r"""Requests with `structured_outputs.choice`: a stock server against one that finishes them early.

    .venv/bin/python benchmarks/serving/bench_choices.py --model MODEL --data-dir DIR

MODEL is the demo model fine-tuned on the tasks of `common/tasks.py`; DIR holds TASK/test.jsonl. Our
server has no policy and runs stock vLLM's model, so all it saves are the steps after a choice is
decided. Both servers run side by side and take turns.

With `--exits`, requests also exit early: a policy for each case is first calibrated on
DIR/TASK/train.jsonl. A third server then does neither.

With `--chats`, DIR holds train.jsonl and test.jsonl with chats, see `choice_cases.chat_cases`.

The benchmark fails if a request fails, or if an answer is not one of its choices or does not finish
with `stop`.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import numpy as np
import numpy.typing as npt
import typer
from tqdm import tqdm

from benchmarks.common.intervals import never_exiting
from benchmarks.common.report_files import write_report
from benchmarks.common.server import Server
from benchmarks.serving.choice_cases import Case, chat_cases, task_cases
from benchmarks.serving.label_requests import post
from benchmarks.serving.sending import Sent, send, text_of
from benchmarks.serving.serve_report import NEVER, OURS, STOCK
from benchmarks.serving.side_by_side import side_by_side
from vllm_adainfer.offline.calibration.calibrate import calibrate
from vllm_adainfer.offline.evaluation.rounds import ROUNDS, in_rounds
from vllm_adainfer.offline.facts.document import markdown_grid
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.offline.reports.speedup import Speedup

REPORTED = 1.0  # seconds until counters catch up with the last answer


def main(
    model: Annotated[str, typer.Option()],
    data_dir: Annotated[Path, typer.Option()],
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/choices.json"),
    requests: Annotated[int, typer.Option(min=1, help="Sent all at once, per round.")] = 300,
    alone: Annotated[int, typer.Option(min=1, help="Sent one after the other, per round.")] = 60,
    compared: Annotated[int, typer.Option(min=1, help="Texts compared per case.")] = 800,
    rounds: Annotated[int, typer.Option(min=1)] = ROUNDS,
    exits: Annotated[bool, typer.Option(help="Calibrate policies and serve with them.")] = False,
    chats: Annotated[
        bool, typer.Option(help="Send the chats of DIR instead of its tasks.")
    ] = False,
) -> None:
    """Measure, and write JSON and a Markdown table."""
    with tempfile.TemporaryDirectory() as folder:
        cases = (chat_cases if chats else task_cases)(model, data_dir, Path(folder))
        switch: dict[str, Any] = {"finish_choices": True}
        if exits:
            switch = {"artifact": calibrated(cases)}
        flags = ["--max-model-len", "512"]
        with side_by_side(model, switch, flags, control=exits) as servers:
            found = [
                measured(servers, case, requests, alone, compared, rounds)
                for case in tqdm(cases, desc="cases")
            ]
    report = {
        "model": Path(model).name,
        "requests": requests,
        "alone": alone,
        "rounds": rounds,
        "cases": found,
        "provenance": provenance(),
    }
    write_report(output, report, table(report))


def calibrated(cases: Sequence[Case]) -> dict[str, str]:
    """Calibrate a policy for the choices of each case; returns their folders by name."""
    for case in cases:
        calibrate(replace(case.calibration, choices=case.choices))
    outputs = [case.calibration.output for case in cases]
    return {output.name: str(output) for output in outputs}


def measured(
    servers: Mapping[str, Server],
    case: Case,
    requests: int,
    alone: int,
    compared: int,
    rounds: int,
) -> dict[str, Any]:
    """Throughput with all requests at once, latency of single requests, and texts that differ."""
    found: dict[str, Any] = {"title": case.title, "choices": case.choices}
    several, few = case.bodies[:compared], case.bodies[:alone]
    before = layer_rows(servers[OURS])
    texts = {
        name: answers(case, turn(server, case, several, at_once=True))
        for name, server in servers.items()
    }
    pairs = list(zip(texts[STOCK], texts[OURS], strict=True))
    found["compared"], found["differ"] = len(pairs), sum(a != b for a, b in pairs)

    def once(name: str) -> dict[str, Any]:
        together = turn(servers[name], case, case.bodies[:requests], at_once=True)
        single = turn(servers[name], case, few, at_once=False)
        answers(case, together)
        answers(case, single)
        return {
            "requests_per_second": len(together.answers) / together.seconds,
            "p50_ms": single.latency(0.5),
            "completion_tokens": tokens_of(together),
        }

    found |= in_rounds([*servers], rounds, once, case.title)
    if NEVER in servers:
        rates = ([run["requests_per_second"] for run in found[name]] for name in (NEVER, STOCK))
        found |= Speedup.of(*rates).entries("never_exit")
    executed, skipped = layer_rows(servers[OURS]) - before
    found["layers_saved"] = skipped / max(executed + skipped, 1)
    return found


def layer_rows(server: Server) -> npt.NDArray[np.float64]:
    """Token-layers executed and skipped so far; zeros without a policy."""
    time.sleep(REPORTED)
    names = (f"adainfer:layer_rows_{kind}_total" for kind in ("executed", "skipped"))
    return np.array([sum(server.metrics(name).values()) for name in names])


def turn(server: Server, case: Case, bodies: Sequence[Mapping[str, Any]], at_once: bool) -> Sent:
    """Send `bodies`, starting from an empty prefix cache."""
    if not post(server, "/reset_prefix_cache")["success"]:
        raise RuntimeError("the prefix cache is in use by a server that should be idle")
    return send(server, case.path, bodies, at_once=None if at_once else 1)


def answers(case: Case, sent: Sent) -> list[str]:
    """The texts of the answers.

    A RuntimeError if a text is not one of the choices, or did not finish with `stop`.
    """
    texts = [text_of(answer) for answer in sent.answers]
    for answer, text in zip(sent.answers, texts, strict=True):
        if text not in case.choices or answer["choices"][0]["finish_reason"] != "stop":
            raise RuntimeError(f"not a whole choice: {answer}")
    return texts


def tokens_of(sent: Sent) -> float:
    """Mean number of completion tokens per answer."""
    return statistics.mean(answer["usage"]["completion_tokens"] for answer in sent.answers)


def table(report: Mapping[str, Any]) -> str:
    """Markdown: a row per case, with medians over the rounds, stock / ours."""

    def cell(case: Mapping[str, Any], key: str) -> str:
        stock, ours = ([run[key] for run in case[name]] for name in (STOCK, OURS))
        middles = f"{statistics.median(stock):.1f} / {statistics.median(ours):.1f}"
        return f"{middles} = {Speedup.of(ours, stock).bold}"

    return (
        markdown_grid(
            [
                "choices",
                "requests/s, all at once",
                "never exiting (95 %)",
                "p50 latency alone, ms",
                "tokens of an answer",
                "layers saved",
                "texts that differ",
            ],
            [
                [
                    case["title"],
                    cell(case, "requests_per_second"),
                    never_exiting(case),
                    cell(case, "p50_ms"),
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
