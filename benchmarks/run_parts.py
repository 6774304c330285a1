"""Measure again what pages quote, part by part; or say which parts are older than the code.

    .venv/bin/python benchmarks/run_parts.py measure --data-dir DATA [--only demo,rivals-cr]
    .venv/bin/python benchmarks/run_parts.py check [--strict]

`measure` runs the parts whose figures are stale, one after the other. Each is meant to take an hour
at most, and is ended after two: hosts with the same processor differ as much. What is done is not
done again, so it may be stopped at any time; a part that was cut short is begun again, and some
scripts go on from what they had measured. Results gather in ``.cache/results``, because the tree
must have no changes: `keep` copies them to ``benchmarks/results``, and writes the pages.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Annotated

sys.path.insert(0, str(Path(__file__).parents[1]))  # imports start at the checkout

import typer

from benchmarks.parts import RESULTS, ROOT, Manifest, Part, git, load_manifest, why_stale
from vllm_adainfer.cli.app import errors_as_sentences
from vllm_adainfer.cli.arguments import names_of
from vllm_adainfer.errors import AdaInferError

CACHE = ROOT / ".cache/results"
LONGEST = 7200  # seconds of a part, or of the training of a model
app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
@errors_as_sentences
def measure(
    data_dir: Annotated[Path, typer.Option(help="TASK/train.jsonl and test.jsonl of each task.")],
    only: Annotated[str, typer.Option(help="Comma-separated parts; by default all.")] = "",
    minutes: Annotated[float, typer.Option(help="Begin nothing new after so many.")] = 1e9,
) -> None:
    """Run the parts whose figures are older than the code."""
    manifest = load_manifest()
    check_clean()
    CACHE.mkdir(parents=True, exist_ok=True)
    started, failed = time.monotonic(), []
    for part in selected(manifest, names_of(only)):
        reason = why_stale(part, manifest) and why_not_measured(part, manifest)
        if reason is None:
            typer.echo(f"{part.name}: is of today's code")
            continue
        if part.by_hand or part.is_for_others:
            typer.echo(f"{part.name}: {reason}; {part.by_hand or f'needs {part.processor}'}")
            continue
        if time.monotonic() - started > 60 * minutes:
            typer.echo(f"{part.name}: {reason}; there is no time left for it")
            continue
        typer.echo(f"{part.name}: {reason}; {part.minutes} minutes", nl=False)
        begun = time.monotonic()
        if not run_part(part, manifest, data_dir.absolute()):
            failed.append(part.name)
        typer.echo(
            f" -> {'failed after ' * (part.name in failed)}{(time.monotonic() - begun) / 60:.0f}"
        )
    if failed:
        raise AdaInferError(f"{', '.join(failed)} failed: read {CACHE.relative_to(ROOT)}/NAME.log")


@app.command()
@errors_as_sentences
def keep() -> None:
    """Copy what was measured to the results, draw the figure, and write the pages that quote it."""
    unfinished = {part.result: part for part in load_manifest().parts if cut_short(part).exists()}
    for part in unfinished.values():
        typer.echo(f"{part.result} stays as it is: {part.name} was cut short")
    for file in sorted(CACHE.iterdir()):
        if file.suffix in (".json", ".md", ".png") and file.stem not in unfinished:
            shutil.copyfile(file, RESULTS / file.name)
    for script in "offline/throughput_report.py", "readme_table.py":
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / script)], check=True)


@app.command()
@errors_as_sentences
def check(
    strict: Annotated[bool, typer.Option("--strict", help="Fail if one is older.")] = False,
) -> None:
    """Say which quoted figures are older than the code that they are about."""
    manifest = load_manifest()
    parts = [part for part in manifest.parts if not part.is_for_others]
    stale = {part.name: reason for part in parts if (reason := why_stale(part, manifest))}
    if not stale:
        return
    told = f"{len(stale)} of {len(parts)} quoted results are older than the code"
    if strict:
        lines = "".join(f"\n  {name} {reason}" for name, reason in stale.items())
        raise AdaInferError(f"{told}: run `make results`.{lines}")
    typer.echo(f"warning: {told} ({', '.join(stale)}): `make results` measures them again")


def selected(manifest: Manifest, names: tuple[str, ...]) -> list[Part]:
    """The parts of these names, all by default; an AdaInferError if one is unknown."""
    known = {part.name: part for part in manifest.parts}
    for name in names:
        if name not in known:
            raise AdaInferError(f"there is no part {name!r}: choose among {', '.join(known)}")
    return [known[name] for name in names or known]


def why_not_measured(part: Part, manifest: Manifest) -> str | None:
    """Why the cache has no figures of today's code for a part; None if it has."""
    return "was cut short" if cut_short(part).exists() else why_stale(part, manifest, CACHE)


def cut_short(part: Part) -> Path:
    """A file that is there from when a part begins until it is done."""
    return CACHE / f"{part.name}.begun"


def check_clean() -> None:
    """Check that the commit says which code runs; an AdaInferError if it does not."""
    if git("status", "--porcelain") != "":
        raise AdaInferError("there are changes that no commit has: commit them, then measure")


def run_part(part: Part, manifest: Manifest, data: Path) -> bool:
    """Run the commands of a part, after those of its models; returns whether all went well."""
    cut_short(part).touch()
    output = CACHE / f"{part.result}.json"
    if not output.is_file() and part.entry and (RESULTS / output.name).is_file():
        shutil.copyfile(RESULTS / output.name, output)  # with the entries of other parts
    models = CACHE / "models"
    commands = [
        one.command
        for one in manifest.models
        if not (models / one.name).is_dir() and any(one.path in line for line in part.commands)
    ]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
        "DATA": str(data),
        "MODELS": str(models),
        "WORK": str(CACHE / "work"),
        "OUTPUT": str(output),
    }
    (CACHE / "work").mkdir(exist_ok=True)
    with (CACHE / f"{part.name}.log").open("w", encoding="utf-8") as log:
        steps = [*([command] for command in commands), part.commands]
        well = all(run_in_time(step, environment, log) for step in steps)
    if well:
        cut_short(part).unlink()
    return well


def run_in_time(commands: Sequence[str], environment: Mapping[str, str], log: IO[str]) -> bool:
    """Run commands one after the other; whether all went well, in `LONGEST` seconds together."""
    ends = time.monotonic() + LONGEST
    for command in commands:
        running = subprocess.Popen(
            ["bash", "-c", command],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            if running.wait(max(0.0, ends - time.monotonic())):
                return False
        except subprocess.TimeoutExpired:
            return False
        finally:
            end_session(running)
    return True


def end_session(started: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the processes that a command has started, engines among them."""
    with suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    started.wait()


if __name__ == "__main__":
    app()
