"""Runs a step of `gpu_steps.py` and reads what became of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import typer

from vllm_adainfer.offline.facts.document import markdown_grid

ROOT = Path(__file__).parents[1]
PASSED, FAILED = "passed", "failed"
SYNC = "called a synchronizing CUDA operation"  # torch's warning, as vLLM lets it through
SUMMARY = re.compile(r"^[= ]*(\d+ \w+.*) in [\d.]+s\b", re.MULTILINE)  # of pytest, its last line
COUNTS = re.compile(r"(\d+) (passed|failed|errors?|skipped)\b")
SKIPPED = re.compile(r"^SKIPPED \[\d+\] \S+ (.+)$", re.MULTILINE)
# What engines tell about their start, and ours about the device.
TOLD = re.compile(
    r"torch\.compile took .*|Graph capturing finished .*|Model loading took .*"
    r"|captured \d+ CUDA graphs of .*|Available KV cache memory.*|started in \d+ s"
    r"|(?:ok|FAIL|skip) +self-test: .*|the self-test on this device found .*"
    r"|layers and exits were not tested .*"
)
MOST_TOLD = 12  # lines of a step


@dataclass(frozen=True)
class Result:
    """What became of a step.

    Attributes:
        outcome: what to show.
        minutes: how long it took; None if it did not run.
        syncs: how often the host waited for the device where no one had allowed it; None if no one
            looked.
        told: lines of its engines' logs.

    """

    outcome: str
    minutes: float | None = None
    syncs: int | None = None
    told: Sequence[str] = ()

    def taking(self, minutes: float) -> Result:
        """The same, of a step that took so long."""
        return replace(self, minutes=minutes)


def run_command(
    command: Sequence[str], log: Path, seconds: float, environment: dict[str, str], quiet: bool
) -> int | None:
    """The exit status of `command`, or None if it took longer than `seconds`.

    Its output is kept in `log`, and shown unless `quiet`.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment, "PYTHONPATH": search_path()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # engines are processes of their own
    )
    ended = threading.Event()

    def end() -> None:
        ended.set()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, end)
    timer.start()
    assert process.stdout is not None
    with log.open("w") as file:
        for line in process.stdout:
            file.write(line)
            if not quiet:
                typer.echo(line, nl=False)
    code = process.wait()
    timer.cancel()
    return None if ended.is_set() else code


def read_result(code: int | None, output: str, tested: bool, watched: bool) -> Result:
    """What became of a command.

    `tested`: it ran pytest, which may have skipped tests. `watched`: its engines warn of waits.
    """
    told = dict.fromkeys(match.group() for match in TOLD.finditer(output))
    syncs = output.count(SYNC) if watched else None
    return Result(_outcome(code, output, tested), syncs=syncs, told=[*told][:MOST_TOLD])


def _outcome(code: int | None, output: str, tested: bool) -> str:
    if code is None:
        return f"{FAILED}: not done in its minutes"
    counts: dict[str, int] = {}
    if tested:
        last = SUMMARY.findall(output)[-1:]
        counts = {what: int(count) for line in last for count, what in COUNTS.findall(line)}
    told = ", ".join(f"{count} {what}" for what, count in counts.items())
    if code != 0:
        return f"{FAILED} ({code})" + (f": {told}" if told else "")
    if not tested or set(counts) == {PASSED}:
        return PASSED + (f": {told}" if told else "")
    reasons = "; ".join(dict.fromkeys(SKIPPED.findall(output))) or "no test ran"
    if counts.get(PASSED):
        return f"in part: {told} ({reasons})"
    return f"skipped: {reasons}"


def table(steps: Sequence[tuple[str, str, int, Result | None]]) -> str:
    """Markdown: a row for each step, its name, what it shows, its minutes and its result."""
    rows = []
    for name, shows, minutes, result in steps:
        took, syncs = "-", "-"
        if result is not None and result.minutes is not None:
            took = f"{result.minutes:.1f}"
        if result is not None and result.syncs is not None:
            syncs = str(result.syncs)
        outcome = "not run" if result is None else result.outcome
        rows.append([name, shows, outcome, f"{took} of {minutes}", syncs])
    columns = ["step", "what it shows", "result", "minutes", "waits that were not allowed"]
    told = [f"- {name}: {line}" for name, _, _, result in steps if result for line in result.told]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    total = sum(minutes for _, _, minutes, _ in steps)
    grid = markdown_grid(columns, rows, text_columns=3)
    parts = [f"{device}, torch {torch.__version__}; at most {total} minutes", grid, "\n".join(told)]
    return "\n\n".join(part for part in parts if part) + "\n"


def search_path() -> str:
    """Where Python finds this checkout's packages."""
    found = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(filter(None, found))
