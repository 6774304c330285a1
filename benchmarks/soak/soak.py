"""Runs a soak on one server after another, and reports it."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from benchmarks.common.report_files import write_report
from benchmarks.common.server import Server
from benchmarks.soak.load_client import (
    Client,
    Question,
    Tokens,
    client_of,
    questions_of,
    quiet_pass,
)
from benchmarks.soak.measures import at_rest, counter_problems, counters, memory
from benchmarks.soak.soak_report import table
from benchmarks.soak.soak_verdict import summaries
from vllm_adainfer.artifact.files import load_artifact_config
from vllm_adainfer.offline.calibration.data.examples import read_template
from vllm_adainfer.offline.provenance import provenance

ENVIRONMENT = {
    "VLLM_PLUGINS": "adainfer",  # provides /adainfer/reload
    "OMP_WAIT_POLICY": "passive",
    "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
}
MOST_TIES = 0.03  # share of compared answers; more ties than this are not just rounding
SAMPLE_SECONDS = 30
STREAM = {"max_tokens": 64, "stream": True}


@dataclass
class Stage:
    """A healthy server, a client that sends requests and counts the replies, and seeded dice."""

    server: Server
    client: Client
    dice: random.Random

    def to_leave(self, index: int, stream: bool) -> dict[str, Any]:
        """The body of a question, for a client that disconnects before the end."""
        body = dict(self.client.questions[index].body)
        if stream:
            body.pop("allowed_token_ids", None)
            body |= STREAM
        return body


Scenario = Callable[[Stage], Awaitable[dict[str, Any]]]


class Bench:
    """Runs scenarios on one server after another, and collects a report per scenario."""

    def __init__(self, questions: list[Question], artifact: Path) -> None:
        """Take the questions, and the artifact of one of the policies."""
        self.rows: list[dict[str, Any]] = []
        self._questions = questions
        self._layers = load_artifact_config(str(artifact)).layers
        self._expected: dict[int, Tokens] = {}
        self.longest = 0

    def quiet(self, server: Server) -> None:
        """Learn the right answers from an idle server."""
        self._expected, self.longest = asyncio.run(quiet_pass(server.url, self._questions))

    def run(self, name: str, server: Server, scenario: Scenario) -> dict[str, Any]:
        """Run a scenario; returns its row of the report."""
        before, held = at_rest(server), memory(server)
        row = asyncio.run(self._play(name, server, scenario))
        after = Counter(row.pop("metrics")) + Counter(row.pop("gone", {}))
        row["memory"] = {"before": held, "after": memory(server)}
        if any(name.startswith("adainfer:") for name in before):  # not on stock
            row["counters"] = counters(before, after, self._layers)
            left = row["requests"]["left"]
            row["problems"] += counter_problems(row["counters"], left, self.longest)
        self.rows.append(row)
        return row

    async def _play(self, name: str, server: Server, scenario: Scenario) -> dict[str, Any]:
        typer.echo(f"{name} ...")
        begin = time.monotonic()
        async with client_of(server.url, self._questions, self._expected) as client:
            stage = Stage(server, client, random.Random(0))
            row: dict[str, Any] = {"name": name, "problems": [], **await scenario(stage)}
            row["metrics"] = await asyncio.to_thread(at_rest, server)
            await client.settle()
        tally = client.tally
        row |= {"requests": asdict(tally), "seconds": time.monotonic() - begin}
        if client.waits:
            row["waits"] = summaries(client.waits)
        compared = tally.answered + tally.ties + tally.wrong
        for what in ("wrong", "lost"):
            if count := getattr(tally, what):
                row["problems"].append(f"{count} requests were {what} ({tally.errors})")
        if tally.ties > MOST_TIES * compared:
            row["problems"].append(f"{tally.ties} of {compared} answers differ: too many for ties")
        return row

    @contextmanager
    def written_to(self, output: Path, model: str, policies: Sequence[str]) -> Iterator[None]:
        """Write JSON and a Markdown table next to each other, even after an error.

        A typer.Exit if there are problems.
        """
        stopped = []
        try:
            yield
        except Exception as error:  # keep what was measured before
            stopped = [f"stopped before the end: {type(error).__name__}: {str(error)[:200]}"]
        problems = stopped + [
            f"{row['name']}: {problem}" for row in self.rows for problem in row["problems"]
        ]
        report = {
            "model": Path(model).name,
            "policies": list(policies),
            "questions": len(self._questions),
            "scenarios": self.rows,
            "problems": problems,
            "provenance": provenance(),
        }
        write_report(output, report, table(report))
        if problems:
            raise typer.Exit(1)


@asynccontextmanager
async def sampled_memory(stage: Stage) -> AsyncIterator[list[dict[str, float]]]:
    """Sample the server's memory every half minute, and once when the context ends."""
    begin = time.monotonic()
    samples: list[dict[str, float]] = []

    async def sample() -> None:
        held = await asyncio.to_thread(memory, stage.server)
        sent = stage.client.tally.sent
        samples.append({"seconds": time.monotonic() - begin, "sent": sent, **held})

    async def sample_now_and_then() -> None:
        while True:
            await sample()
            await asyncio.sleep(SAMPLE_SECONDS)

    async with in_background(sample_now_and_then()):
        yield samples
    await sample()


@asynccontextmanager
async def in_background(endless: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `endless` while the context lasts; raises its error at the end."""
    task = asyncio.create_task(endless)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def tasks(
    artifact: Sequence[str], data: Sequence[Path], template: Sequence[str], rows: int
) -> tuple[dict[str, str], list[Question]]:
    """The directories of policies by name, and the questions for all of them.

    A typer.BadParameter if there are not as many artifacts as data files and templates.
    """
    if not len(artifact) == len(data) == len(template):
        raise typer.BadParameter("give --artifact, --data and --template equally often")
    sources: dict[str, str] = {}
    questions: list[Question] = []
    for named, path, form in zip(artifact, data, template, strict=True):
        name, _, source = named.partition("=")
        sources[name] = source
        questions += questions_of(name, Path(source), path, read_template(form) or "", rows)
    return sources, questions
