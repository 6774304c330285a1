r"""How often a certified bound on objects is broken, over many draws of the rows.

    .venv/bin/python benchmarks/offline/bench_object_draws.py --model MODEL --requests TRAIN.jsonl \
        --requests TEST.jsonl

The files are those of `bench_objects.py`. All requests of a schema are recorded once, with guesses
that were learnt from some that no draw has. Then policies are made, each of other rows, and judged
on the rows that it has not seen: the early answer against full depth in the same pass, so that no
rounding counts.
"""

from __future__ import annotations

import os

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import numpy as np
import typer

from benchmarks.common.report_files import write_report
from benchmarks.offline.bench_structured import own_caches
from benchmarks.offline.draws import cells, of_draw
from benchmarks.offline.structured_requests import lines_of
from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact.outputs import Objects
from vllm_adainfer.offline.calibration.fit.choose import candidate_layers
from vllm_adainfer.offline.calibration.fit.guesser import fit_guesser
from vllm_adainfer.offline.calibration.options import CalibrationRequest
from vllm_adainfer.offline.calibration.prompts import Prompts, load_prompts
from vllm_adainfer.offline.calibration.record.collect import Plan
from vllm_adainfer.offline.calibration.record.objects import Untaught, recorded_objects
from vllm_adainfer.offline.calibration.record.rows import Rows
from vllm_adainfer.offline.facts.document import markdown_table
from vllm_adainfer.offline.progress import progress
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.policy.guesser import Guesser

TEACHING = 500  # rows that guesses are learnt from


def main(
    model: Annotated[str, typer.Option()],
    requests: Annotated[list[Path], typer.Option(help="Batch files; object_requests.py writes.")],
    schema: Annotated[str, typer.Option()] = "review",
    draws: Annotated[int, typer.Option(min=2)] = 20,
    rows: Annotated[int, typer.Option(help="Rows of a draw.")] = 1000,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/object_draws.json"),
) -> None:
    """Measure, and write JSON and a Markdown table."""
    with tempfile.TemporaryDirectory() as folder, own_caches():
        data = Path(folder, "requests.jsonl")
        data.write_text("".join(line for file in requests for line in lines_of(file, schema)))
        request = CalibrationRequest(model=model, data=data, output=Path(folder, "policy"))
        prompts, recording = recorded(request, load_prompts(request))
    seen: dict[tuple[int, ...], int] = {}
    for place, example in enumerate(prompts.examples):
        seen.setdefault(tuple(example.token_ids), place)
    pool = np.array([place for place in seen.values() if place >= TEACHING])
    found = []
    for draw in progress(range(draws), desc="draws", unit="draw"):
        order = np.random.default_rng(draw).permutation(pool)
        found.append(of_draw(request, prompts, recording, order[:rows], order[rows:]))
    report = {
        "model": Path(model).name,
        "schema": schema,
        "rows": rows,
        "epsilon": request.options.epsilon,
        "delta": request.options.delta,
        "draws": found,
        "provenance": provenance(),
    }
    write_report(output, report, table(report))


def recorded(request: CalibrationRequest, prompts: Prompts) -> tuple[Prompts, Rows]:
    """All prompts at full depth, each with a guess behind it, and what was learnt of objects."""
    tokens = [example.token_ids for example in prompts.examples]
    assert prompts.schema is not None, "the requests ask for objects"

    def teach(objects: Objects, answers: Ints) -> tuple[Guesser, Sequence[Sequence[int]]]:
        guesser = fit_guesser(objects, prompts.shared, tokens[:TEACHING], answers)
        return guesser, [guesser.places(one) for one in tokens]

    layers = candidate_layers(prompts.hf_config.num_hidden_layers, None, prompts.probe)
    rows, guesser = recorded_objects(
        request.model,
        prompts.hf_config,
        prompts.examples,
        Plan(layers, pooled_from=prompts.pooled_from),
        prompts.schema,
        prompts.tokenizer,
        Untaught(np.arange(TEACHING), teach),
    )
    return replace(prompts, output=guesser.objects, guesser=guesser), rows


def table(report: Mapping[str, Any]) -> str:
    """Markdown: a row for the schema."""
    return markdown_table([{"objects": report["schema"], **cells(report)}], text_columns=2)


if __name__ == "__main__":
    typer.run(main)
