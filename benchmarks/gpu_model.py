r"""Predicts the cost and savings of exits on an H100, before anyone has measured them.

    .venv/bin/python benchmarks/gpu_model.py

A model, not a measurement: a simulation of two queues, host and device (`gpu_queue.py`), of steps
as they were, are and might become (`gpu_designs.py`). Layers take what their shapes and the data
sheet say; launches, copies and reads of our own code are counted on this machine, and its Python is
timed here. All that is assumed is in `gpu_costs.py`. The first measured run is to be compared with
this, and users see for which models exits cannot pay.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # imports start at the checkout

import torch
import typer
from torch import Tensor

from benchmarks.common.budgets import (
    ALWAYS,
    EXIT_POINTS,
    NEVER,
    Layers,
    compacted_batch,
    decode_step,
    loop_of,
    staging,
    step_of,
)
from benchmarks.common.report_files import write_report
from benchmarks.gpu_costs import ASSUMED, Counted, Llama, number, outside_graphs
from benchmarks.gpu_designs import Step, decoding, prompts
from benchmarks.gpu_tables import tables
from benchmarks.offline.llama_shapes import SHAPES
from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.offline.provenance import provenance

BATCHES = (1, 8, 32, 64, 128, 256)
MIDDLE = 64
MODELS = {"llama-1b": 1, "llama-8b": 1, "llama-70b": 4}  # ranks
PROMPTS = ((64, 16), (64, 128), (32, 256))  # of a step, and their length


def counted() -> Counted:
    """What is counted and timed on this machine."""
    builder = number("launches of an attention builder")
    asked = decode_step(NEVER).asked
    once = {name: count // len(EXIT_POINTS) for name, count in asked.items()}
    half = decode_step(ALWAYS, full_depth=8, compaction_cost=1).asked
    ask, decide = measured_ask()
    return Counted(
        staging=outside_graphs(staging(1)[0].asked, builder),
        question=outside_graphs(once),
        cut=outside_graphs({name: half[name] - once[name] for name in once}),
        tables=outside_graphs(compacted_batch(1).asked, builder),
        ask=ask,
        decide=decide,
    )


def measured_ask(repeats: int = 1000) -> tuple[float, float]:
    """Seconds of Python at an exit point where 16 requests are asked, before and after the read.

    The kernels' work on 16 rows of 64 numbers is negligible. Of all times the tenth percentile:
    other work may share this machine.
    """
    before, after, last = [], [], time.perf_counter()

    class Timed(Layers):
        def run(self, segment: int, states: HiddenStates) -> HiddenStates:
            nonlocal last
            if segment:
                after.append(time.perf_counter() - last)
            states = super().run(segment, states)
            last = time.perf_counter()
            return states

    def read(values: Tensor) -> Any:
        nonlocal last
        before.append(time.perf_counter() - last)
        array = values.numpy()
        last = time.perf_counter()
        return array

    loop, ids = loop_of(NEVER, 16, read=read), torch.zeros(16, dtype=torch.int64)
    for _ in range(repeats):
        loop.run(Timed(), ids, step_of(16))
    return statistics.quantiles(before, n=10)[0], statistics.quantiles(after, n=10)[0]


def main(
    output: Annotated[Path, typer.Option(help="JSON; the tables go beside it.")] = Path(
        "benchmarks/results/gpu_model.json"
    ),
) -> None:
    """Predict decode steps and steps of prompts on an H100."""
    own = counted()
    models = {name: Llama(SHAPES[name], ranks) for name, ranks in MODELS.items()}
    report = {
        "predicted": "nothing here was measured on a GPU",
        "assumed": ASSUMED,
        "counted_us": {name: 1e6 * seconds for name, seconds in vars(own).items()},
        "decoding": {
            name: {batch: decoding(partial(Step, model, own, requests=batch)) for batch in BATCHES}
            for name, model in models.items()
        },
        "prompts": {
            name: {
                f"{count} x {length}": prompts(
                    partial(Step, model, own, requests=count, tokens=length)
                )
                for count, length in PROMPTS
            }
            for name, model in models.items()
        },
        "slower_host": {
            "batch": MIDDLE,
            "decoding": {
                name: {
                    f"x {slower:g}": decoding(
                        partial(Step, model, own, requests=MIDDLE, slower=slower)
                    )
                    for slower in (0.5, 1.0, 1.5, 2.0)
                }
                for name, model in models.items()
            },
        },
        "provenance": provenance(),
    }
    write_report(output, report, tables(report))


if __name__ == "__main__":
    typer.run(main)
