r"""One base model, an adapter and a policy for each task, in one server, beside merged weights.

    .venv/bin/python benchmarks/bench_adapters.py --base BASE --tasks DIR --decisions DIR \
        --merged-tasks DIR --merged-decisions DIR --data-dir DIR --chats-dir DIR

`--tasks` and `--decisions` are LoRA adapters of BASE, the others checkpoints with these merged in.
Requests for choices, as `bench_choices` sends them, go to the first adapter (SST-2 and TREC) and to
the second (chats about A or B), all at once, to a stock server with the same adapters and to ours,
in turn. What a policy saves and changes is also measured by `evaluate` on the merged weights, with
a policy of their own.

It fails if a request fails, or if an answer is none of its choices.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from bench_choices import answers, layer_rows
from choice_cases import Case, chat_cases, task_cases
from label_requests import post
from report_files import write_report
from sending import Sent, send
from serve_report import OURS, STOCK
from server import Server
from side_by_side import side_by_side

from vllm_adainfer.offline.calibration.adapter import NamedAdapter, read_adapter
from vllm_adainfer.offline.calibration.calibrate import calibrate
from vllm_adainfer.offline.evaluation.evaluate import EvaluationRequest, evaluate
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.offline.tables import markdown_table


@dataclass(frozen=True)
class Task:
    """The requests of a case with an adapter.

    Attributes:
        case: the requests and how a policy for them is calibrated.
        merged: directory of the weights that the adapter is merged in.

    """

    case: Case
    merged: str

    @property
    def name(self) -> str:
        """Of the policy."""
        return self.case.calibration.output.name


def main(
    base: Annotated[str, typer.Option()],
    tasks: Annotated[Path, typer.Option()],
    decisions: Annotated[Path, typer.Option()],
    merged_tasks: Annotated[str, typer.Option()],
    merged_decisions: Annotated[str, typer.Option()],
    data_dir: Annotated[Path, typer.Option()],
    chats_dir: Annotated[Path, typer.Option()],
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/adapters.json"),
    requests: Annotated[int, typer.Option(min=1, help="Of each task, in each round.")] = 200,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Measure, and write JSON and a Markdown table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first, second, _ = task_cases(base, data_dir, folder)
        [letters] = [
            one for one in chat_cases(base, chats_dir, folder) if one.choices == ("A", "B")
        ]
        asked = read_adapter(f"tasks={tasks}"), read_adapter(f"decisions={decisions}")
        served = [
            Task(with_adapter(first, asked[0]), merged_tasks),
            Task(with_adapter(second, asked[0]), merged_tasks),
            Task(with_adapter(letters, asked[1]), merged_decisions),
        ]
        for task in served:
            calibrate(task.case.calibration)
        artifacts = {task.name: str(task.case.calibration.output) for task in served}
        # One slot more than adapters: see docs/adapters.md.
        flags = ["--max-model-len", "512", "--enable-lora", "--max-loras", "3"]
        flags += ["--max-lora-rank", "16", "--lora-modules"]
        flags += [f"tasks={tasks.absolute()}", f"decisions={decisions.absolute()}"]
        with side_by_side(base, {"artifact": artifacts}, flags) as servers:
            report = measured(servers, served, requests, rounds)
        merged = {task.name: on_merged(task, folder) for task in served}
    for found in report["tasks"]:
        found["merged"] = merged[found["name"]]
    report |= {"model": Path(base).name, "provenance": provenance()}
    write_report(output, report, table(report))


def with_adapter(case: Case, adapter: NamedAdapter | None) -> Case:
    """The same case of an adapter."""
    assert adapter is not None
    bodies = [{**body, "model": adapter.name} for body in case.bodies]
    calibration = replace(case.calibration, choices=case.choices, adapter=adapter)
    return replace(case, bodies=bodies, calibration=calibration)


def measured(
    servers: Mapping[str, Server], tasks: Sequence[Task], requests: int, rounds: int
) -> dict[str, Any]:
    """Each task by itself, for what it saves and changes; then all at once, for their time."""
    found = []
    for task in tasks:
        before = layer_rows(servers[OURS])
        bodies = task.case.bodies[:requests]
        texts = [answers(task.case, sent(servers[name], task, bodies)) for name in (STOCK, OURS)]
        executed, skipped = layer_rows(servers[OURS]) - before
        found.append(
            {
                "name": task.name,
                "title": task.case.title,
                "compared": requests,
                "differ": sum(stock != ours for stock, ours in zip(*texts, strict=True)),
                "layers_saved": skipped / (executed + skipped),
            }
        )
    seconds: dict[str, list[float]] = {STOCK: [], OURS: []}
    for number in range(rounds):
        for name in list(servers)[:: 1 if number % 2 else -1]:
            seconds[name].append(all_at_once(servers[name], tasks, requests))
    return {"tasks": found, "requests": requests, "seconds": seconds}


def all_at_once(server: Server, tasks: Sequence[Task], requests: int) -> float:
    """Seconds until the requests of all tasks were answered."""
    reset(server)
    with ThreadPoolExecutor(len(tasks)) as threads:
        running = [
            threads.submit(
                send, server, task.case.path, task.case.bodies[:requests], [0.0] * requests
            )
            for task in tasks
        ]
        done = [each.result() for each in running]
    for task, one in zip(tasks, done, strict=True):
        answers(task.case, one)
    return max(one.seconds for one in done)


def sent(server: Server, task: Task, bodies: Sequence[Mapping[str, Any]]) -> Sent:
    """One task's requests, from an empty prefix cache."""
    reset(server)
    return send(server, task.case.path, bodies, [0.0] * len(bodies))


def reset(server: Server) -> None:
    """Empty the prefix cache."""
    if not post(server, "/reset_prefix_cache")["success"]:
        raise RuntimeError("the prefix cache is in use by a server that should be idle")


def on_merged(task: Task, folder: Path) -> dict[str, Any]:
    """What a policy saves, and at which speed, with the adapter merged into the weights."""
    output = folder / f"{task.name}-merged"
    request = replace(task.case.calibration, model=task.merged, adapter=None, output=output)
    calibrate(request)
    report = evaluate(
        EvaluationRequest(
            model=task.merged,
            artifact=str(output),
            data=task.case.test,
            template=request.template,
            label_field="",
            epsilon=request.options.epsilon,
            repeat=1,
        )
    )
    return {key: report[key] for key in ("n", "layers_saved", "disagreement", "speedup")}


def table(report: Mapping[str, Any]) -> str:
    """A row for each task, and the time of all."""
    stock, ours = (statistics.median(report["seconds"][name]) for name in (STOCK, OURS))
    count = report["requests"] * len(report["tasks"])
    return (
        markdown_table(
            ["task", "layers saved", "texts that differ", "saved, merged", "differ, merged"],
            [
                [
                    task["title"],
                    f"{task['layers_saved']:.0%}",
                    f"{task['differ']} of {task['compared']}",
                    f"{task['merged']['layers_saved']:.0%}",
                    f"{task['merged']['disagreement']:.1%}",
                ]
                for task in report["tasks"]
            ],
            text_columns=1,
        )
        + f"\nAll at once: stock {count / stock:.1f}, ours {count / ours:.1f} requests/s "
        + f"(**{stock / ours:.2f}x**).\n"
    )


if __name__ == "__main__":
    typer.run(main)
