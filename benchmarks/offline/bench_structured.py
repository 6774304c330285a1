r"""Structured answers: stock vLLM beside one that drafts them, by the number of requests in flight.

    .venv/bin/python benchmarks/offline/object_requests.py --data-dir DIR --output FILE.jsonl
    .venv/bin/python benchmarks/offline/bench_structured.py --model MODEL --requests FILE.jsonl

`train_writer.py` makes MODEL; any other works, too. Both engines are compiled, run in
this process on one thread, and take turns. For each kind of requests and each grammar backend, the
first objects of new grammars are measured apart from the rounds. Last, steps are timed whose drafts
are all refused.

Each part is written when it is done. The same command at the same commit goes on where it was cut.
"""

from __future__ import annotations

import os

# Set before libraries read them: one process and one thread, as in a server on two cores.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import typer

from benchmarks.common.report_files import write_report
from benchmarks.offline.refused_drafts import refusals
from benchmarks.offline.structured_engine import OURS, STOCK, engines
from benchmarks.offline.structured_report import table
from benchmarks.offline.structured_requests import bodies_by_kind, read
from benchmarks.offline.structured_rounds import of_kind
from vllm_adainfer.offline.evaluation.report import write_whole
from vllm_adainfer.offline.provenance import provenance

LONGEST = 512  # tokens of a prompt and its answer
SWITCHES: dict[str, dict[str, Any] | None] = {OURS: {"draft_structure": True}, STOCK: None}
FREE = "free text"  # the kind whose grammar has no fixed text
WITH_GUIDANCE = ("review", "reason last", FREE)


def main(
    model: Annotated[str, typer.Option()],
    requests: Annotated[Path, typer.Option(help="A batch file; object_requests.py writes one.")],
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/structured.json"),
    rounds: Annotated[int, typer.Option(min=2)] = 10,
    only: Annotated[str, typer.Option(help="Kinds to measure; all by default.")] = "",
    minutes: Annotated[float, typer.Option(help="Begin nothing new after so many.")] = 22,
    eager: Annotated[bool, typer.Option(help="Compile nothing, for a try.")] = False,
) -> None:
    """Measure what the report does not have yet, and write JSON and a Markdown table."""
    end = time.monotonic() + 60 * minutes
    kinds = bodies_by_kind(requests)
    report = begun(output, settings_of(model, requests, rounds, eager))
    with own_caches():
        for backend in "xgrammar", "guidance":
            wanted = [kind for kind in kinds if backend == "xgrammar" or kind in WITH_GUIDANCE]
            done = [part["kind"] for part in report["parts"] if part["backend"] == backend]
            missing = [
                kind
                for kind in wanted
                if kind not in done and (not only or kind in only.split(","))
            ]
            if not missing or time.monotonic() > end:
                continue
            settings = {"structured_outputs_config": {"backend": backend}, "enforce_eager": eager}
            with engines(model, SWITCHES, LONGEST, **settings) as both:
                for kind in missing:
                    if time.monotonic() > end:
                        typer.echo("time is up: the same command does the rest")
                        break
                    part = {"kind": kind, "backend": backend, **of_kind(both, kinds[kind], rounds)}
                    if backend == "xgrammar" and kind == FREE:
                        free = read(kinds[kind], both[OURS].llm.get_tokenizer())
                        report["refusals"] = refusals(both[OURS], free)
                    report["parts"].append(part)
                    write_whole(output, json.dumps(report, indent=1) + "\n")
    write_report(output, report, table(report))


@contextmanager
def own_caches() -> Iterator[None]:
    """Compile anew: code that was compiled from another checkout would be found, and fail."""
    with tempfile.TemporaryDirectory(prefix="bench-structured-") as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
        os.environ["VLLM_CACHE_ROOT"] = f"{folder}/vllm"
        yield


def settings_of(model: str, requests: Path, rounds: int, eager: bool) -> dict[str, Any]:
    """What all parts of a report have in common."""
    return {
        "model": Path(model).name,
        "requests": blake2b(requests.read_bytes(), digest_size=8).hexdigest(),
        "rounds": rounds,
        "eager": eager,
        "git": provenance()["git"],
    }


def begun(output: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The report in `output` if it has these settings, or a new one."""
    if output.is_file():
        found: dict[str, Any] = json.loads(output.read_text())
        if found["settings"] == settings:
            return found
    return {"settings": settings, "parts": [], "refusals": [], "provenance": provenance()}


if __name__ == "__main__":
    typer.run(main)
