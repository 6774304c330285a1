r"""Predicts the cost and savings of exits on an H100, before anyone has measured them.

    .venv/bin/python benchmarks/gpu_model.py

A model, not a measurement: bytes and products of the layers from their shapes, the H100's peaks
from its data sheet, and the launches, copies and reads of our own code, counted on this machine
(`benchmarks/common/budgets.py`). `ASSUMED` holds all that is guessed. The first measured run is to
be compared with this, and users see for which models exits cannot pay.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # imports start at the checkout

import torch
import typer

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
from benchmarks.offline.llama_shapes import SHAPES, VOCABULARY
from vllm_adainfer.offline.facts.document import markdown_grid, markdown_table
from vllm_adainfer.offline.provenance import provenance

FLOPS, BYTES = 989.4e12, 3.35e12  # per second: H100 SXM, bf16 without sparsity, HBM3
NVLINK = 450e9  # bytes per second in one direction
MICRO = 1e-6
ASSUMED: dict[str, float] = {
    "share of the peak of products": 0.65,
    "share of the peak of memory": 0.80,
    "kernels of a layer": 10,  # norms, products, rotary, cache, attention, activation
    "us of a kernel inside a graph, beside its work": 1.5,
    "us of a kernel outside a graph": 3.0,
    "us of a graph's launch": 8.0,
    "us of a small upload": 5.0,
    "us of a read that the host waits for": 15.0,
    "us of a collective of ranks": 9.0,
    "us of vLLM's own input and sampling": 80.0,
    "launches of an attention builder": 3,
}
CONTEXT = 512  # tokens that each request attends to
BATCHES = (1, 8, 32, 128, 256)
MODELS = {"llama-1b": 1, "llama-8b": 1, "llama-70b": 4}  # ranks
POINTS = 4  # exit points, after a fifth of the layers each
PROMPTS, LENGTH = 32, 256  # of a step of prompts


@dataclass(frozen=True)
class Llama:
    """One rank's part of a model, which is spread over so many."""

    shape: dict[str, Any]
    ranks: int

    @property
    def layers(self) -> int:
        """The number of layers."""
        return int(self.shape["num_hidden_layers"])

    @property
    def kv_width(self) -> int:
        """Numbers that a token has in the cache of a layer."""
        return 2 * int(self.shape["num_key_value_heads"] * self.shape["head_dim"]) // self.ranks

    @property
    def layer_weights(self) -> int:
        """Numbers in the products of a layer."""
        hidden, inner = self.shape["hidden_size"], self.shape["intermediate_size"]
        heads = self.shape["num_attention_heads"] * self.shape["head_dim"]
        attention = hidden * (2 * heads) + hidden * self.kv_width * self.ranks
        return int((attention + 3 * hidden * inner) // self.ranks)

    def layer(self, rows: int, attended: float) -> float:
        """Seconds of a layer for so many rows, which read so many tokens of the cache each."""
        weights, hidden = self.layer_weights, self.shape["hidden_size"]
        heads = self.shape["num_attention_heads"] * self.shape["head_dim"] // self.ranks
        products = 2 * rows * weights + 4 * rows * attended * heads
        cache = min(rows, BATCHES[-1]) * attended * self.kv_width  # prompts share their reads
        read = 2 * (weights + cache + 8 * rows * hidden)
        seconds = max(
            products / (FLOPS * ASSUMED["share of the peak of products"]),
            read / (BYTES * ASSUMED["share of the peak of memory"]),
        )
        gaps = (
            ASSUMED["kernels of a layer"]
            * ASSUMED["us of a kernel inside a graph, beside its work"]
        )
        return seconds + gaps * MICRO + self.collectives(2, rows)

    def collectives(self, count: int, rows: int) -> float:
        """Seconds of `count` sums over ranks."""
        if self.ranks == 1:
            return 0.0
        sent = 2 * rows * self.shape["hidden_size"] * 2 * (self.ranks - 1) / self.ranks
        return count * (ASSUMED["us of a collective of ranks"] * MICRO + sent / NVLINK)

    def head(self, rows: int) -> float:
        """Seconds of the LM head."""
        weights = VOCABULARY * self.shape["hidden_size"] // self.ranks
        return max(
            2 * rows * weights / (FLOPS * ASSUMED["share of the peak of products"]),
            2 * weights / (BYTES * ASSUMED["share of the peak of memory"]),
        )


def outside_graphs(asked: dict[str, int], launches: float = 0) -> float:
    """Seconds on the device of what `Launches.asked` counts, and of some more launches."""
    return MICRO * (
        (asked["launches"] + launches) * ASSUMED["us of a kernel outside a graph"]
        + asked["uploads"] * ASSUMED["us of a small upload"]
        + asked["reads"] * ASSUMED["us of a read that the host waits for"]
    )


def decoding(model: Llama, batch: int, ask_us: float) -> dict[str, float]:
    """Milliseconds of a decode step."""
    layer, fixed = model.layer(batch, CONTEXT), ASSUMED["us of vLLM's own input and sampling"]
    own = fixed * MICRO + model.head(batch)
    stock = own + model.layers * layer
    staged = outside_graphs(staging(1)[0].asked, ASSUMED["launches of an attention builder"])
    boundary = MICRO * (
        ASSUMED["us of a graph's launch"]
        + 2 * ASSUMED["us of a kernel inside a graph, beside its work"]  # states are stored
    )
    nobody = stock + staged + (POINTS + 1) * boundary
    asked = {name: n / len(EXIT_POINTS) for name, n in decode_step(NEVER).asked.items()}
    question = outside_graphs(asked) + ask_us * MICRO + model.collectives(1, 1)  # type: ignore[arg-type]
    left = 3  # all leave together at the third point, after three fifths of the layers
    early = (
        fixed * MICRO
        + staged
        + left / (POINTS + 1) * model.layers * layer
        + left * (boundary + question)
        + outside_graphs(decode_step(ALWAYS).asked)
    )
    overhead = nobody - stock + POINTS * question
    return {
        "stock": 1e3 * stock,
        "nobody may exit": 1e3 * nobody,
        "asked, none leaves": 1e3 * (nobody + POINTS * question),
        "40 % saved": 1e3 * early,
        "breaks even at": overhead / (model.layers * layer),
    }


def prompts(model: Llama, ask_us: float) -> dict[str, float]:
    """Milliseconds of a step of prompts that are answered with labels, a fifth at each depth."""
    rows = PROMPTS * LENGTH
    own = ASSUMED["us of vLLM's own input and sampling"] * MICRO
    stock = own + model.layers * model.layer(rows, LENGTH / 2) + model.head(PROMPTS)
    asked = {name: n / len(EXIT_POINTS) for name, n in decode_step(NEVER).asked.items()}
    half = decode_step(ALWAYS, full_depth=8, compaction_cost=1).asked
    regroup = outside_graphs(half) + outside_graphs(
        compacted_batch(1).asked, ASSUMED["launches of an attention builder"]
    )
    early = own + model.head(PROMPTS // (POINTS + 1))
    for segment in range(POINTS + 1):
        part = rows * (POINTS + 1 - segment) // (POINTS + 1)
        early += model.layers / (POINTS + 1) * model.layer(part, LENGTH / 2)
    early += POINTS * (outside_graphs(asked) + regroup + 2 * ask_us * MICRO)  # type: ignore[arg-type]
    return {"stock": 1e3 * stock, "40 % saved": 1e3 * early}


def measured_ask() -> float:
    """Microseconds of Python where requests are asked, timed here.

    The kernels' work on 16 rows of 64 numbers is negligible.
    """
    loop, ids = loop_of(NEVER, 16), torch.zeros(16, dtype=torch.int64)

    def run(full_depth: int) -> None:
        loop.run(Layers(), ids, step_of(16, full_depth))

    none, all_asked = timed(partial(run, 16)), timed(partial(run, 0))
    return 1e6 * (all_asked - none) / len(EXIT_POINTS)


def timed(run: Callable[[], object], repeats: int = 200) -> float:
    """The median of the seconds that `run` takes."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main(
    output: Annotated[Path, typer.Option(help="JSON; the table goes beside it.")] = Path(
        "benchmarks/results/gpu_model.json"
    ),
) -> None:
    """Predict decode steps and steps of prompts on an H100."""
    ask_us = measured_ask()
    report = {
        "predicted": "nothing here was measured on a GPU",
        "assumed": ASSUMED,
        "host_us": {"ask": ask_us},
        "decoding": {
            name: {batch: decoding(Llama(SHAPES[name], ranks), batch, ask_us) for batch in BATCHES}
            for name, ranks in MODELS.items()
        },
        "prompts": {
            name: prompts(Llama(SHAPES[name], ranks), ask_us) for name, ranks in MODELS.items()
        },
        "provenance": provenance(),
    }
    write_report(output, report, table(report))


def table(report: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    rows = [
        [
            f"{name}{f', {MODELS[name]} ranks' if MODELS[name] > 1 else ''}",
            str(batch),
            *(f"{case[column]:.2f}" for column in list(case)[:-1]),
            f"{case['breaks even at']:.0%}",
        ]
        for name, cases in report["decoding"].items()
        for batch, case in cases.items()
    ]
    columns = ["model", "batch", "stock", "nobody may exit", "asked, none leaves", "40 % saved"]
    of_prompts = [
        {
            "model": name,
            "stock": f"{case['stock']:.1f}",
            "with exits": f"{case['40 % saved']:.1f}",
            "speed-up": f"{case['stock'] / case['40 % saved']:.2f}x",
        }
        for name, case in report["prompts"].items()
    ]
    assumed = "\n".join(f"- {name}: {value:g}" for name, value in report["assumed"].items())
    ask = report["host_us"]["ask"]
    return f"""# What exits should cost and save on an H100

**Predicted, not measured** (`benchmarks/gpu_model.py`).

## Decode steps, milliseconds

{CONTEXT} tokens of context, label heads at {POINTS} exit points, a fifth of the layers apart. "40 %
saved": all requests leave together after three fifths of the layers. The last column is the share
of the layers' time that all requests must skip together before exits pay.

{markdown_grid([*columns, "breaks even at"], rows)}

## A step of {PROMPTS} prompts of {LENGTH} tokens, milliseconds

A fifth of the prompts leaves at each exit point, so that 40 % of the layers are saved.

{markdown_table(of_prompts)}

## Assumptions

H100 SXM by its data sheet: {FLOPS / 1e12:.0f} TFLOP/s in bf16, {BYTES / 1e12:.2f} TB/s, NVLink
{NVLINK / 1e9:.0f} GB/s each way. Launches, uploads and reads of our own code are counted; Python
takes {ask:.0f} us at an exit point on {report["provenance"]["cpu"]}, during which the GPU waits.

{assumed}
"""


if __name__ == "__main__":
    typer.run(main)
