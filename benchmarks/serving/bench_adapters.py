r"""Several adapters of one base model, each with policies, in one server; against merged weights.

    .venv/bin/python benchmarks/serving/bench_adapters.py --base BASE --tasks DIR --decisions DIR \
        --merged-tasks DIR --merged-decisions DIR --data-dir DIR --chats-dir DIR

`--tasks` and `--decisions` are LoRA adapters of BASE, the `--merged` ones checkpoints with these
merged in. DATA-DIR and CHATS-DIR are those of `bench_choices.py`. Requests for choices go to the
first adapter (SST-2, TREC) and to the second (chats about A or B), first task by task, then all at
once, to a stock server with the same adapters and to ours in turn. `evaluate` measures what a
policy for the merged weights saves and changes on the same rows.

The benchmark fails if a request fails, or if an answer is not one of its choices or does not finish
with `stop`.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import typer
from tqdm import tqdm

from benchmarks.common.report_files import write_report
from benchmarks.common.server import Server
from benchmarks.serving.bench_choices import answers, layer_rows, turn
from benchmarks.serving.choice_cases import Case, chat_cases, task_cases
from benchmarks.serving.label_requests import post
from benchmarks.serving.sending import send
from benchmarks.serving.serve_report import OURS, STOCK
from benchmarks.serving.side_by_side import side_by_side
from vllm_adainfer.offline.adapter import NamedAdapter, read_adapter
from vllm_adainfer.offline.calibration.calibrate import calibrate
from vllm_adainfer.offline.evaluation.evaluate import evaluate
from vllm_adainfer.offline.evaluation.rounds import ROUNDS, in_rounds
from vllm_adainfer.offline.facts.document import markdown_table
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.offline.reports.speedup import Speedup


def main(
    base: Annotated[str, typer.Option()],
    tasks: Annotated[Path, typer.Option()],
    decisions: Annotated[Path, typer.Option()],
    merged_tasks: Annotated[str, typer.Option()],
    merged_decisions: Annotated[str, typer.Option()],
    data_dir: Annotated[Path, typer.Option()],
    chats_dir: Annotated[Path, typer.Option()],
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/adapters.json"),
    calibrated: Annotated[int, typer.Option(min=1, help="Rows to calibrate on, per task.")] = 400,
    requests: Annotated[int, typer.Option(min=1, help="Requests per task and round.")] = 100,
    rounds: Annotated[int, typer.Option(min=1)] = ROUNDS,
) -> None:
    """Measure, and write JSON and a Markdown table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first, second, _ = task_cases(base, data_dir, folder)
        letters = next(
            case for case in chat_cases(base, chats_dir, folder) if case.choices == ("A", "B")
        )
        adapters = (f"tasks={tasks}", f"tasks={tasks}", f"decisions={decisions}")
        served = [
            with_adapter(fewer(case, calibrated), read_adapter(adapter))
            for case, adapter in zip((first, second, letters), adapters, strict=True)
        ]
        weights = merged_tasks, merged_tasks, merged_decisions
        merged = [on_merged(*pair, folder) for pair in zip(served, weights, strict=True)]
        for case in tqdm(served, desc="policies"):
            calibrate(case.calibration)
        outputs = [case.calibration.output for case in served]
        artifacts = {output.name: str(output) for output in outputs}
        # One slot more than there are adapters, see docs/adapters.md.
        flags = ["--max-model-len", "512", "--enable-lora", "--max-loras", "3"]
        flags += ["--max-lora-rank", "16", "--lora-modules"]
        flags += [f"tasks={tasks.absolute()}", f"decisions={decisions.absolute()}"]
        with side_by_side(base, {"artifact": artifacts}, flags) as servers:
            found = [measured(servers, case, requests) for case in tqdm(served, desc="tasks")]
            seconds = in_rounds(
                [OURS, STOCK], rounds, lambda name: all_at_once(servers[name], served, requests)
            )
    for one, offline in zip(found, merged, strict=True):
        one["merged"] = offline
    report = {
        "model": Path(base).name,
        "calibrated": calibrated,
        "requests": requests,
        "tasks": found,
        "seconds": seconds,
        "provenance": provenance(),
    }
    write_report(output, report, table(report))


def fewer(case: Case, rows: int) -> Case:
    """`case`, calibrated on only `rows` of its rows, because adapters are slow on a CPU."""
    lines = case.calibration.data.read_text().splitlines()
    if case.path.startswith("/v1/chat"):
        asked = [json.loads(line)["body"]["structured_outputs"]["choice"] for line in lines]
        lines = [line for line, one in zip(lines, asked, strict=True) if tuple(one) == case.choices]
    random.Random(0).shuffle(lines)
    data = case.calibration.output.with_suffix(".jsonl")
    data.write_text("".join(f"{line}\n" for line in lines[:rows]))
    return replace(case, calibration=replace(case.calibration, data=data, choices=case.choices))


def with_adapter(case: Case, adapter: NamedAdapter | None) -> Case:
    """`case`, with its requests and its policy for an adapter."""
    assert adapter is not None
    bodies = [{**body, "model": adapter.name} for body in case.bodies]
    return replace(case, bodies=bodies, calibration=replace(case.calibration, adapter=adapter))


def measured(servers: Mapping[str, Server], case: Case, requests: int) -> dict[str, Any]:
    """One task on its own: what its policy saves and changes, and the throughput."""
    before = layer_rows(servers[OURS])
    bodies = case.bodies[:requests]
    sent = {name: turn(server, case, bodies, True) for name, server in servers.items()}
    texts = [answers(case, sent[name]) for name in (STOCK, OURS)]
    executed, skipped = layer_rows(servers[OURS]) - before
    return {
        "name": case.calibration.output.name,
        "title": case.title,
        "compared": len(bodies),
        "differ": sum(stock != ours for stock, ours in zip(*texts, strict=True)),
        "layers_saved": skipped / (executed + skipped),
        "requests_per_second": {name: len(bodies) / one.seconds for name, one in sent.items()},
    }


def all_at_once(server: Server, cases: Sequence[Case], requests: int) -> float:
    """Seconds until the requests of all tasks, sent together, are answered."""
    if not post(server, "/reset_prefix_cache")["success"]:
        raise RuntimeError("the prefix cache is in use by a server that should be idle")
    asked = [(case, case.bodies[:requests]) for case in cases]
    with ThreadPoolExecutor(len(asked)) as threads:
        running = [threads.submit(send, server, case.path, bodies) for case, bodies in asked]
        done = [each.result() for each in running]
    for (case, _), one in zip(asked, done, strict=True):
        answers(case, one)
    return max(one.seconds for one in done)


def on_merged(case: Case, weights: str, folder: Path) -> dict[str, Any]:
    """Savings and changes by a policy with the adapter merged into the weights."""
    output = folder / f"{case.calibration.output.name}-merged"
    request = replace(case.calibration, model=weights, adapter=None, output=output)
    calibrate(request)
    report = evaluate(
        model=weights,
        artifact=str(output),
        data=case.test,
        template=request.template,
        label_field="",
        epsilon=request.options.epsilon,
    )
    return {key: report[key] for key in ("n", "layers_saved", "disagreement", "speedup")}


def table(report: Mapping[str, Any]) -> str:
    """Markdown: a row per task, then the throughput of all together."""
    stock, ours = (statistics.median(report["seconds"][name]) for name in (STOCK, OURS))
    count = sum(task["compared"] for task in report["tasks"])
    return (
        markdown_table(
            [
                {
                    "task": task["title"],
                    "layers saved": f"{task['layers_saved']:.0%}",
                    "texts that differ": f"{task['differ']} of {task['compared']}",
                    "requests/s, stock / ours": speed(task["requests_per_second"]),
                    "saved, merged": f"{task['merged']['layers_saved']:.0%}",
                    "differ, merged": f"{task['merged']['disagreement']:.1%}",
                    "offline, merged": f"**{task['merged']['speedup']:.2f}x**",
                }
                for task in report["tasks"]
            ],
            text_columns=1,
        )
        + f"\nAll at once: stock {count / stock:.1f}, ours {count / ours:.1f} requests/s "
        + f"{Speedup.of(*(report['seconds'][name] for name in (STOCK, OURS))).bold}.\n"
    )


def speed(rates: Mapping[str, float]) -> str:
    """The throughput of one task on its own."""
    stock, ours = rates[STOCK], rates[OURS]
    return f"{stock:.1f} / {ours:.1f} (**{ours / stock:.2f}x**)"


if __name__ == "__main__":
    typer.run(main)
