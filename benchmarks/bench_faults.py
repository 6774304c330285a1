"""Faults and load: what a server with the plugin does when clients, files and processes fail.

    .venv/bin/python benchmarks/bench_faults.py --model MODEL \
        --artifact sst2=policies/sst2 --data sst2.jsonl --template $'Review: {text}\\nSentiment:' \
        --artifact trec=policies/trec --data trec.jsonl --template $'Question: {text}\\nType:' \\
        --text-artifact chat=policies/chat --text-data chat.jsonl

One server serves all policies; `fault_scenarios.py` has the scenarios. Right is what a quiet server
answers to one request at a time. Batches round differently, so an answer that differs is asked for
again, alone, and is a tie if the quiet answer comes then, wrong if not. Two more servers generate
text beside that, with either KV policy and a small cache: `text_scenarios.py`. Ends with code 1 and
a sentence for each thing that is not as it should be.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from fault_measures import at_rest, counter_problems, counters, memory
from fault_scenarios import (
    Stage,
    burst,
    disconnects,
    everything,
    hostile_requests,
    kill,
    reload,
    soak,
)
from faults_report import growth, table
from load_client import Question, Tokens, client_of, questions_of, quiet_pass
from server import Server, serving
from text_scenarios import texts

from vllm_adainfer.artifact_files import load_artifact_config
from vllm_adainfer.calibration.calibrate import load_config
from vllm_adainfer.calibration.data import make_examples, read_rows, read_template
from vllm_adainfer.calibration.report import write_whole
from vllm_adainfer.provenance import provenance

ENVIRONMENT = {
    "VLLM_PLUGINS": "adainfer",  # has /adainfer/reload
    "OMP_WAIT_POLICY": "passive",
    "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
}
ARGUMENTS = ("--max-model-len", "512")
# Blocks of 128 tokens for 16 texts, so that some are preempted; steps that rows which rejoin fill.
TEXT_LENGTH = 1024
TEXT_ARGUMENTS = ("--max-model-len", str(TEXT_LENGTH), "--num-gpu-blocks-override", "24")
TEXT_ARGUMENTS += ("--max-num-batched-tokens", "512")
LONGEST_PROMPT = 400  # tokens
LEAVING = 0.2  # of the time with text, clients leave in the middle
PROCESSES = ("VLLM::EngineCore", "VLLM::Worker")
Scenario = Callable[[Stage], Awaitable[dict[str, Any]]]
SCENARIOS: dict[str, Scenario] = {
    "burst": burst,
    "disconnects": disconnects,
    "hostile": hostile_requests,
    "reload": reload,
}
MOST_TIES = 0.03  # of the answers compared; more of them are not rounding


class Bench:
    """Runs scenarios on one server after the other, and keeps what they report."""

    def __init__(self, questions: list[Question], artifact: Path, layers: int) -> None:
        """`artifact` is one that servers read and scenarios may damage."""
        self.rows: list[dict[str, Any]] = []
        self._questions = questions
        self._artifact = artifact
        self._layers = layers
        self._expected: dict[int, Tokens] = {}
        self.longest = 0
        self._doubtful: list[int] = []

    def quiet(self, server: Server) -> None:
        """Learn what is right."""
        self._expected, self.longest = asyncio.run(quiet_pass(server.url, self._questions))

    def run(self, name: str, server: Server, scenario: Scenario) -> dict[str, Any]:
        """A scenario whose server lives on; its row of the report."""
        before, held = at_rest(server), memory(server)
        row = asyncio.run(self._play(name, server, scenario))
        row["counters"] = counters(before, row.pop("metrics"), self._layers)
        row["memory"] = {"before": held, "after": memory(server)}
        row["problems"] += counter_problems(row["counters"], row["requests"]["left"], self.longest)
        self.rows.append(row)
        return row

    def kill(self, server: Server, title: str) -> dict[str, Any]:
        """Kill a process under load; its row of the report."""
        held = memory(server)
        row = asyncio.run(self._play(f"kill {title}", server, partial(kill, title=title)))
        row["memory"] = {"before": held}
        self.rows.append(row)
        return row

    async def _play(self, name: str, server: Server, scenario: Scenario) -> dict[str, Any]:
        typer.echo(f"{name} ...")
        begin = time.monotonic()
        async with client_of(server.url, self._questions, self._expected) as client:
            client.doubtful += self._doubtful  # of a server that was killed
            stage = Stage(server, client, self._artifact, random.Random(0))
            row: dict[str, Any] = {"name": name, "problems": [], **await scenario(stage)}
            if not client.killed:
                row["metrics"] = await asyncio.to_thread(at_rest, server)
                await client.settle()
            self._doubtful = client.doubtful
        tally = client.tally
        row |= {"requests": asdict(tally), "seconds": time.monotonic() - begin}
        compared = tally.answered + tally.ties + tally.wrong
        for what in ("wrong", "lost"):
            if count := getattr(tally, what):
                row["problems"].append(f"{count} requests were {what} ({tally.errors})")
        if tally.ties > MOST_TIES * compared:
            row["problems"].append(f"{tally.ties} of {compared} answers differ: too many for ties")
        return row


def main(
    model: Annotated[str, typer.Option(help="Directory or hub id.")],
    artifact: Annotated[list[str], typer.Option(help="NAME=DIR, for each policy.")],
    data: Annotated[list[Path], typer.Option(help="JSON lines, for each policy.")],
    template: Annotated[list[str], typer.Option(help="Of the prompts, for each policy.")],
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/faults.json"),
    text_artifact: Annotated[str, typer.Option(help="NAME=DIR, of generated text.")] = "",
    text_data: Annotated[Path | None, typer.Option(help="Prompts for it, JSON lines.")] = None,
    minutes: Annotated[float, typer.Option(help="How long the soak takes.")] = 5,
    text_minutes: Annotated[float, typer.Option(help="How long texts are generated.")] = 30,
    rows: Annotated[int, typer.Option(help="Of the data, for each policy.")] = 100,
) -> None:
    """Run all scenarios, and write JSON and a Markdown table beside each other."""
    if not len(artifact) == len(data) == len(template):
        raise typer.BadParameter("give --artifact, --data and --template as often as each other")
    if bool(text_artifact) != (text_data is not None):
        raise typer.BadParameter("give --text-artifact and --text-data, or neither")
    with tempfile.TemporaryDirectory() as folder:
        copies = {}
        questions: list[Question] = []
        for named, path, form in zip(artifact, data, template, strict=True):
            name, _, source = named.partition("=")
            copies[name] = Path(folder, name)
            shutil.copytree(source, copies[name])
            questions += questions_of(name, copies[name], path, read_template(form) or "", rows)
        first = next(iter(copies.values()))
        layers = load_artifact_config(str(first)).layers
        bench = Bench(questions, first, layers)
        adainfer = {"artifact": {name: str(copy) for name, copy in copies.items()}}
        server_of = partial(serving, model, adainfer, arguments=ARGUMENTS, environment=ENVIRONMENT)
        stopped = []
        try:
            all_in_turn(bench, server_of, Path(folder), 60 * minutes)
            if text_data is not None:
                name, _, source = text_artifact.partition("=")
                policies = {**copies, name: source}
                prompts = prompts_of(model, text_data)
                for kv in ("exact", "propagate"):
                    switch = {"artifact": {n: str(copy) for n, copy in policies.items()}, "kv": kv}
                    with_text = partial(texts, prompts=prompts, policy=name, kv=kv)
                    generate(
                        bench, model, switch, with_text, source, Path(folder), 30 * text_minutes
                    )
        except Exception as error:  # what was measured before it is a result
            stopped = [f"stopped before the end: {str(error).splitlines()[:1]}"]
    problems = stopped + [
        f"{row['name']}: {problem}" for row in bench.rows for problem in row["problems"]
    ]
    report = {
        "model": Path(model).name,
        "policies": list(copies),
        "questions": len(questions),
        "scenarios": bench.rows,
        "problems": problems,
        "provenance": provenance(),
    }
    write_whole(output, (json.dumps(report, indent=2) + "\n").encode())
    write_whole(output.with_suffix(".md"), table(report).encode())
    typer.echo(table(report))
    if problems:
        raise typer.Exit(1)


def all_in_turn(bench: Bench, server_of: Callable[..., Any], folder: Path, seconds: float) -> None:
    """Every scenario; a server that was killed is started again, as a supervisor would."""
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


def prompts_of(model: str, data: Path) -> list[list[int]]:
    """Prompts as token ids, short enough for a text and a next turn behind them."""
    _, tokenizer = load_config(model)
    examples = make_examples(read_rows(data), tokenizer, None, "label", 1 << 20)
    return [one.token_ids for one in examples if len(one.token_ids) <= LONGEST_PROMPT]


def generate(
    bench: Bench,
    model: str,
    switch: dict[str, Any],
    with_text: Callable[..., Any],
    source: str,
    folder: Path,
    seconds: float,
) -> None:
    """A server whose clients generate text, first without any that leave.

    Where keys and values are propagated all requests may exit, and some draw their tokens.
    """
    kv, config = switch["kv"], load_artifact_config(source)
    draws = kv == "propagate"
    if draws:
        switch["requests"] = "all"
    bench.longest = TEXT_LENGTH
    with serving(model, switch, folder / f"{kv}.log", TEXT_ARGUMENTS, ENVIRONMENT) as server:
        for name, leaves, share in (("texts", False, 1 - LEAVING), ("texts left", True, LEAVING)):
            scenario = partial(
                with_text, seconds=share * seconds, config=config, draws=draws, leaves=leaves
            )
            row = bench.run(f"{name}, {kv}", server, scenario)
            row["growth"] = growth(row["samples"])


if __name__ == "__main__":
    typer.run(main)
