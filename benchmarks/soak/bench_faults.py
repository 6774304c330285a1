r"""A server with the plugin under load and faults: failing clients, files and processes.

    .venv/bin/python benchmarks/soak/bench_faults.py --model MODEL \
        --artifact sst2=policies/sst2 --data sst2.jsonl --template $'Review: {text}\nSentiment:' \
        --artifact trec=policies/trec --data trec.jsonl --template $'Question: {text}\nType:'

One server serves all policies; `fault_scenarios.py` defines the scenarios. The right answer is the
one an idle server gives to a single request. Rounding depends on the batch, so a request whose
answer differs is sent again on its own: it is a tie if the right answer comes then, and wrong
otherwise. Exits with code 1 and a sentence per problem. For requests that grow see
`bench_hostile_growth.py`, for everything at once, adapters included, `bench_everything.py`.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import typer

from benchmarks.common.server import serving
from benchmarks.soak.fault_bench import ENVIRONMENT, Bench, Scenario, tasks
from benchmarks.soak.fault_scenarios import (
    burst,
    disconnects,
    everything,
    hostile_requests,
    reload,
    soak,
)
from benchmarks.soak.faults_report import growth

ARGUMENTS = ("--max-model-len", "512")
PROCESSES = ("VLLM::EngineCore", "VLLM::Worker")
SCENARIOS: dict[str, Scenario] = {
    "burst": burst,
    "disconnects": disconnects,
    "hostile": hostile_requests,
    "reload": reload,
}


def main(
    model: Annotated[str, typer.Option(help="Directory or hub id.")],
    artifact: Annotated[list[str], typer.Option(help="NAME=DIR, once per policy.")],
    data: Annotated[list[Path], typer.Option(help="JSON lines, one file per policy.")],
    template: Annotated[list[str], typer.Option(help="Template of the prompts, one per policy.")],
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/faults.json"),
    minutes: Annotated[float, typer.Option(help="Length of the soak, in minutes.")] = 5,
    rows: Annotated[int, typer.Option(help="Rows of the data per policy.")] = 100,
) -> None:
    """Run all scenarios, and write JSON and a Markdown table next to each other."""
    sources, questions = tasks(artifact, data, template, rows)
    with tempfile.TemporaryDirectory() as folder:
        copies = {name: Path(folder, name) for name in sources}
        for name, source in sources.items():
            shutil.copytree(source, copies[name])
        bench = Bench(questions, next(iter(copies.values())))
        adainfer = {"artifact": {name: str(copy) for name, copy in copies.items()}}
        server_of = partial(serving, model, adainfer, arguments=ARGUMENTS, environment=ENVIRONMENT)
        with bench.written_to(output, model, list(copies)):
            all_in_turn(bench, server_of, Path(folder), 60 * minutes)


def all_in_turn(bench: Bench, server_of: Callable[..., Any], folder: Path, seconds: float) -> None:
    """Run every scenario; restart a killed server as a supervisor would."""
    with server_of(log=folder / "server.log") as server:
        bench.quiet(server)
        for name, scenario in SCENARIOS.items():
            bench.run(name, server, scenario)
        soaked = bench.run("soak", server, partial(soak, seconds=seconds))
        soaked["growth"] = growth(soaked["samples"])
        row = bench.kill(server, PROCESSES[0])
    for title in (*PROCESSES[1:], None):
        with server_of(log=folder / "again.log") as server:
            row["started_again_after_seconds"] = time.monotonic() - row.pop("killed_at")
            bench.run(f"after {row['name']}", server, everything)
            if title is not None:
                row = bench.kill(server, title)


if __name__ == "__main__":
    typer.run(main)
