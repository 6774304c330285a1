r"""Latency of good clients while a hostile one sends ever larger requests.

    .venv/bin/python benchmarks/soak/bench_hostile_growth.py --model MODEL --label after \
        --artifact sst2=policies/sst2 --data sst2.jsonl --template $'Review: {text}\nSentiment:' \
        --artifact choices=policies/choices

`hostile_growth.py` defines what grows. One client sends each thing in four sizes for some seconds,
while eight others ask for one label at a time in a closed loop: first on a stock server, then on
one with the policies and with request capture. Stock vLLM is slow for some of these requests, so
ours is judged by stock's worst latency at the same size. A worse latency is measured up to twice
more, and the best result counts, because other work on the machine causes outliers. Artifacts
beyond the number of `--data` files are served but not asked.

The output file keeps results by label (`stock` and `--label`), so runs of two commits can be
compared. Exits with code 1 and a sentence per problem.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import typer

from benchmarks.common.report_files import write_report
from benchmarks.common.server import Server, serving
from benchmarks.soak.hostile_growth import (
    CLIENTS,
    DEADLINE,
    FACTORS,
    THINGS,
    Thing,
    growth,
    quiet,
    recovers,
)
from benchmarks.soak.load_client import TEXT, Client, Question, Tally, client_of, quiet_pass
from benchmarks.soak.soak import ENVIRONMENT, tasks
from vllm_adainfer.offline.facts.document import markdown_grid
from vllm_adainfer.offline.provenance import provenance

STOCK = "stock"
ARGUMENTS = ("--max-model-len", "8192")
CAPTURED = {"rate": 0.1, "limit": 10_000}
WORSE_FACTOR, WORSE_MS = 2.0, 250.0  # ours may exceed stock by the larger of the two
PATIENCE = 2 * DEADLINE  # how long a good client waits
TRIES = 3
Servers = Callable[[], AbstractContextManager[Server]]


def main(
    model: Annotated[str, typer.Option(help="Directory or hub id.")],
    artifact: Annotated[list[str], typer.Option(help="NAME=DIR, once per policy.")],
    data: Annotated[list[Path], typer.Option(help="JSON lines, one file per asked policy.")],
    template: Annotated[list[str], typer.Option(help="Prompt template, one per data file.")],
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/hostile_growth.json"),
    label: Annotated[str, typer.Option(help="Name for the results with policies.")] = "ours",
    stock: Annotated[bool, typer.Option(help="Measure the stock server too.")] = True,
    seconds: Annotated[float, typer.Option(help="Seconds per thing and size.")] = 4,
    rows: Annotated[int, typer.Option(help="Rows per data file.")] = 50,
    eager: Annotated[bool, typer.Option(help="Skip vLLM's compiler, which takes minutes.")] = False,
    only: Annotated[str, typer.Option(help="Only things whose title contains this.")] = "",
    note: Annotated[str, typer.Option(help="Remark on the run, for the table.")] = "",
) -> None:
    """Measure, and write JSON and a Markdown table next to each other."""
    _, asked = tasks(artifact[: len(data)], data, template, rows)
    questions = [one for one in asked if one.kind != TEXT]
    things = [thing for thing in THINGS if only in thing.title]
    report = {"model": Path(model).name, "clients": CLIENTS, "seconds": seconds, "servers": {}}
    if output.exists():
        report["servers"] = json.loads(output.read_text())["servers"]
    with tempfile.TemporaryDirectory() as folder:
        switch = {
            "artifact": dict(named.split("=", 1) for named in artifact),
            "capture": {"directory": str(Path(folder, "captured")), **CAPTURED},
        }
        switches: dict[str, Any] = {**({STOCK: None} if stock else {}), label: switch}
        for name, one in switches.items():
            environment = {**ENVIRONMENT, **({} if one else {"VLLM_PLUGINS": ""})}
            log = Path(folder, f"{name}.log")
            flags = (*ARGUMENTS, *(["--enforce-eager"] if eager else []))
            servers = partial(serving, model, one, log, flags, environment)
            stocks = {} if one is None else report["servers"].get(STOCK, {"things": {}})["things"]
            report["servers"][name] = {
                **Growth(name, questions, seconds, stocks).measure(servers, things),
                "note": note,
                "provenance": provenance(),
            }
    problems = {name: problems_of(name, report["servers"]) for name in report["servers"]}
    report["problems"] = problems
    write_report(output, report, table(report))
    if problems[label]:
        raise typer.Exit(1)


@dataclass
class Growth:
    """Measures all things in all sizes on one kind of server.

    `stock` are the results of a stock server by thing, to compare with; empty measures each size
    once. `doubtful` are indices of questions that were answered differently in a batch.
    """

    name: str
    questions: Sequence[Question]
    seconds: float
    stock: Mapping[str, Any]
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    quiet: dict[str, float] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    doubtful: list[int] = field(default_factory=list)

    def measure(self, servers: Servers, things: Sequence[Thing]) -> dict[str, Any]:
        """Measure everything; start another server when one stays busy."""
        self.rows = {thing.title: {"base": thing.base, "cells": []} for thing in things}
        started = 0
        while left := [thing for thing in things if not self._is_done(thing)]:
            started += 1
            with servers() as server:
                asyncio.run(self._on(server, left))
        results = {"quiet": self.quiet, "things": self.rows, "servers": started}
        return {**results, "requests": asdict(self.tally)}

    def _is_done(self, thing: Thing) -> bool:
        row = self.rows[thing.title]
        return "stopped" in row or len(row["cells"]) == len(FACTORS)

    async def _on(self, server: Server, things: Sequence[Thing]) -> None:
        """Measure on one server until everything is done or the server stays busy."""
        expected, _ = await quiet_pass(server.url, self.questions)
        async with client_of(server.url, self.questions, expected, PATIENCE) as client:
            client.tally, client.doubtful = self.tally, self.doubtful
            await quiet(client, self.seconds)  # warm up: the first batches compile
            self.quiet = self.quiet or await quiet(client, self.seconds)
            for thing in things:
                await growth(server, client, thing, FACTORS[0], 0)  # warm up
                while not self._is_done(thing):
                    if not await self._one_size(server, client, thing):
                        return
            await client.settle()

    async def _one_size(self, server: Server, client: Client, thing: Thing) -> bool:
        """Measure the next size; returns whether the server recovers from it."""
        row = self.rows[thing.title]
        place = len(row["cells"])
        stock = self.stock.get(thing.title, {"cells": []})["cells"][place : place + 1]
        tries: list[dict[str, Any]] = []
        recovered = True
        while recovered and (not tries or (len(tries) < TRIES and is_worse(tries[-1], stock))):
            typer.echo(f"{self.name}: {thing.title} x {FACTORS[place]}", err=True)
            tries.append(await growth(server, client, thing, FACTORS[place], self.seconds))
            recovered = await recovers(server)
        cell = min(tries, key=lambda one: float(one["worst_ms"]))
        row["cells"].append({**cell, "tries": len(tries)})
        if not recovered:
            row["stopped"] = f"the server stays busy after x {FACTORS[place]}"
        elif cell["worst_ms"] >= 1000 * DEADLINE:
            row["stopped"] = f"{DEADLINE:.0f} s gone at x {FACTORS[place]}"
        return recovered


def is_worse(ours: Mapping[str, Any], stock: Sequence[Mapping[str, Any]]) -> bool:
    """Whether good clients wait longer than on stock, by more than noise explains."""
    return any(
        ours["worst_ms"] > max(WORSE_FACTOR * one["worst_ms"], one["worst_ms"] + WORSE_MS)
        for one in stock
    )


def problems_of(name: str, servers: Mapping[str, Any]) -> list[str]:
    """Sentences on what a server did wrong, or worse than stock."""
    found = servers[name]
    problems = [
        f"{count} requests of good clients were {what} ({found['requests']['errors']})"
        for what in ("wrong", "lost")
        if (count := found["requests"][what])
    ]
    if name == STOCK or STOCK not in servers:
        return problems
    for title, row in found["things"].items():
        stock = servers[STOCK]["things"].get(title)
        if stock is None:
            continue
        if "stopped" in row and "stopped" not in stock:
            problems.append(f"{title}: {row['stopped']}")
        for ours, theirs in zip(row["cells"], stock["cells"], strict=False):
            where = f"{title}, {ours['size']:,}"
            if is_worse(ours, [theirs]):
                worst = f"{ours['worst_ms']:,.0f} ms, stock {theirs['worst_ms']:,.0f} ms"
                problems.append(f"{where}: {worst}")
            if ours["hostile"].keys() - theirs["hostile"].keys() - {"HTTP 200"}:
                problems.append(f"{where}: {ours['hostile']}, stock {theirs['hostile']}")
    return problems


def table(report: Mapping[str, Any]) -> str:
    """Markdown: worst and median latencies by thing and size, for all servers."""
    servers = report["servers"]
    beside = " / ".join(servers)
    lines = [
        f"Worst latency of {report['clients']} good clients in milliseconds ({beside}), while one "
        f"hostile client sends a thing for {report['seconds']:g} s in one size; - was not tried, "
        "because the size before held them for a minute.",
        "",
        sizes_table(servers, "worst_ms"),
        "",
        f"Median latency ({beside}):",
        "",
        sizes_table(servers, "median_ms"),
        "",
        f"What the hostile client got ({beside}), and its longest wait in seconds:",
        "",
        sizes_table(servers, "hostile"),
        "",
    ]
    for name, found in servers.items():
        source = found["provenance"]
        note = f"; {found['note']}" if found["note"] else ""
        lines += [f"{name}: {source['git']}, {source['cpu']}, {source['time']}{note}.", ""]
    for name, problems in report["problems"].items():
        lines += [line for problem in problems for line in (f"**{name}: {problem}**", "")]
    return "\n".join(lines[:-1]) + "\n"


def sizes_table(servers: Mapping[str, Any], key: str) -> str:
    """A row per thing, a column per size."""
    rows = []
    if key != "hostile":
        alone = shown([found["quiet"] for found in servers.values()], key)
        rows.append(["nothing", "", alone, *[""] * (len(FACTORS) - 1)])
    for title in (thing.title for thing in THINGS):
        found = [one["things"].get(title, {"cells": []})["cells"] for one in servers.values()]
        if any(found):
            base = next(cells[0]["size"] for cells in found if cells)
            by_size = zip_longest(*found, [None] * len(FACTORS))
            rows.append([title, f"{base:,}", *(shown(cells[:-1], key) for cells in by_size)])
    return markdown_grid(["thing", "size", *(f"x {factor:,}" for factor in FACTORS)], rows)


def shown(cells: Sequence[Mapping[str, Any] | None], key: str) -> str:
    """A cell of the table, with the values of all servers."""
    texts = []
    for cell in cells:
        if cell is None:
            texts.append("-")
        elif key == "hostile":
            ends = ", ".join(end.removeprefix("HTTP ") for end in cell["hostile"])
            texts.append(f"{ends} ({cell['hostile_longest_seconds']:.1f})")
        else:
            texts.append(f"{cell[key]:,.0f}")
    return " / ".join(texts)


if __name__ == "__main__":
    typer.run(main)
