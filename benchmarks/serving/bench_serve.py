r"""Throughput and latency of a classification server by request rate, with and without the plugin.

    .venv/bin/python benchmarks/serving/bench_serve.py --model MODEL --artifact POLICY \
        --data test.jsonl --template $'Review: {text}\nSentiment:'

A stock server and one with the plugin run side by side with the same flags, but only one at a time
gets requests: on a CPU both compute on the same core, and the API servers and the client use the
other. In a round, both get the same prompts in the same order at the same times; order and times
differ between rounds. Each run starts from an empty prefix cache and sends each row of the data
once, so only prefixes that different prompts share are ever hit.

A policy for probabilities (`calibrate --tolerance`) is asked for scores at ``/generative_scoring``,
any other policy for one label at ``/v1/completions``.

The benchmark fails if a request fails, if an answer is not exactly one label or a score not a
probability, or if no layers are skipped. Answers are compared outside the load, see
`compare_answers` and `compare_scores`.
"""

from __future__ import annotations

import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import typer

from benchmarks.common.report_files import write_report
from benchmarks.common.server import Server
from benchmarks.serving.label_requests import Load, ask, bench, post, tokens_of
from benchmarks.serving.scoring_requests import bench as bench_scores
from benchmarks.serving.scoring_requests import compare_scores
from benchmarks.serving.serve_report import FIGURES, NEVER, OURS, STOCK, plot, rate_row, table
from benchmarks.serving.side_by_side import side_by_side
from vllm_adainfer.artifact.files import load_artifact_config
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import (
    Example,
    make_examples,
    read_rows,
    read_template,
)
from vllm_adainfer.offline.calibration.record.engine import BLOCK
from vllm_adainfer.offline.evaluation.rounds import ROUNDS, in_rounds
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.promise.tolerance import Tolerance

COUNTERS = "layer_rows_executed_total", "layer_rows_skipped_total", "exit_layer_count"
COUNT_SECONDS = 30  # how long counters may lag behind the last answer


Send = Callable[[Server, Load, float, int], dict[str, Any]]


def main(
    model: Annotated[str, typer.Option()],
    artifact: Annotated[str, typer.Option(help="Calibrated with labels.")],
    data: Annotated[Path, typer.Option(help="JSON lines.")],
    template: Annotated[str, typer.Option(help="As for `vllm-adainfer evaluate`.")],
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/serve.json"),
    rates: Annotated[str, typer.Option(help="Requests per second; inf sends all at once.")] = (
        "5,10,20,40,inf"
    ),
    requests: Annotated[int, typer.Option(min=1, help="Requests per rate and round.")] = 300,
    rounds: Annotated[int, typer.Option(min=1)] = ROUNDS,
) -> None:
    """Measure, and write JSON, a Markdown table and a plot next to each other."""
    config = load_artifact_config(artifact)
    hf_config, tokenizer = load_config_and_tokenizer(model)
    config.check_served_by(hf_config)
    longest = hf_config.max_position_embeddings - 1
    rows = read_rows(data)
    examples = make_examples(rows, tokenizer, read_template(template), "label", longest)
    random.Random(0).shuffle(examples)  # a file may be sorted by label
    if not isinstance(config.promise, Tolerance) and find_spec("pandas") is None:
        raise AdaInferError("vllm bench serve reads its data set with pandas: pip install pandas")
    if not config.labels:
        raise AdaInferError(f"{artifact} has no labels: calibrate with --labels")
    if len(examples) < requests:
        raise AdaInferError(
            f"--data {data} has {len(examples)} rows: ask for at most that many --requests"
        )
    asked_rates = [float(rate) for rate in rates.split(",")]
    tokens = 1 + max(len(example.token_ids) for example in examples)
    flags = ["--max-model-len", str(-(-tokens // BLOCK) * BLOCK), *config.engine_options.flags]
    with (
        tempfile.TemporaryDirectory() as folder,
        side_by_side(model, {"artifact": artifact}, flags, control=True) as servers,
    ):
        load = Load(
            model,
            examples[:requests],
            Path(folder, "prompts.jsonl"),
            config.label_ids,
            frozenset(tokenizer.decode([token]).strip() for token in config.label_ids),
        )
        lines = (json.dumps({"prompt": example.text}) + "\n" for example in load.examples)
        load.file.write_text("".join(lines))
        if not isinstance(config.promise, Tolerance):
            answers = compare_answers(servers, load, examples)
            measured = measure(servers, load, asked_rates, rounds, bench)
        else:
            answers = compare_scores(servers, load, examples, config.promise.tolerance)
            measured = measure(servers, load, asked_rates, rounds, bench_scores)
    report = {
        "model": config.base_model,
        "artifact": Path(artifact).name,
        "data": data.name,
        "requests": requests,
        "prompt_tokens_mean": tokens_of(load.examples) / requests,
        "prefix_cache": "on, reset before each run",
        "rounds": rounds,
        "epsilon": config.epsilon,
        "delta": config.delta,
        "layers_total": config.layers,
        "answers": answers,
        "rates": [rate_row(rate, runs) for rate, runs in measured],
        "provenance": provenance(),
    }
    write_report(output, report, table(report), plot(report))


def compare_answers(
    servers: Mapping[str, Server], load: Load, examples: Sequence[Example]
) -> dict[str, Any]:
    """Shares of prompts that early exits, full depth and stock vLLM answer differently.

    Each pass sends the same prompts together, so that batching does not change the rounding. This
    also warms up both.
    """
    stock = ask(servers[STOCK], load, examples)
    full = ask(servers[OURS], load, examples, {"vllm_xargs": {"adainfer": 0}})
    early = ask(servers[OURS], load, examples)

    def differing(some: Sequence[str], others: Sequence[str]) -> float:
        return sum(a != b for a, b in zip(some, others, strict=True)) / len(examples)

    return {
        "n": len(examples),
        "disagreement": differing(early, full),
        "disagreement_with_stock": differing(early, stock),
        "full_depth_disagreement_with_stock": differing(full, stock),
    }


def measure(
    servers: Mapping[str, Server],
    load: Load,
    rates: Sequence[float],
    rounds: int,
    send: Send,
) -> list[tuple[float, dict[str, list[dict[str, Any]]]]]:
    """Measure interleaved rounds at each rate with `send`; returns the runs by server."""
    send(servers[NEVER], load, math.inf, 0)  # the others are warm
    measured = []
    for rate in rates:
        seeds = {name: iter(range(rounds)) for name in servers}

        def once(name: str, rate: float = rate, seeds: dict[str, Any] = seeds) -> dict[str, Any]:
            return one_run(name, servers[name], load, rate, next(seeds[name]), send)

        measured.append((rate, in_rounds([*servers], rounds, once, f"{rate:g} a second")))
    return measured


def one_run(
    name: str,
    server: Server,
    load: Load,
    rate: float,
    seed: int,
    send: Send,
) -> dict[str, Any]:
    """Measure one run at one rate; for our server, with the share of layers saved.

    A RuntimeError if the server was busy, our server skipped no layers, or stock has our metrics.
    """
    if not post(server, "/reset_prefix_cache")["success"]:
        raise RuntimeError("the prefix cache is in use by a server that should be idle")
    before = counters(server)
    result = send(server, load, rate, seed)
    run = {key: result[key] for key in (*FIGURES, "duration", "completed", "failed")}
    if name == OURS:
        executed, skipped = counted(server, before, run["completed"])
        if not skipped:
            raise RuntimeError(
                "the server with the plugin skipped no layers: no request left early"
            )
        run["layers_saved"] = skipped / (executed + skipped)
    elif name == STOCK and before:
        raise RuntimeError("the stock server has the plugin's metrics")
    return run


def counters(server: Server) -> dict[str, float]:
    """The plugin's counters, summed over policies; empty for a stock server."""
    series = server.metrics()
    return {
        name: sum(value for key, value in series.items() if key.startswith(f"adainfer:{name}{{"))
        for name in COUNTERS
        if series
    }


def counted(server: Server, before: Mapping[str, float], requests: int) -> tuple[float, float]:
    """Token-layers executed and skipped since `before`, once all `requests` are counted.

    A RuntimeError if the counters did not reach `requests` in time.
    """
    end = time.monotonic() + COUNT_SECONDS
    while True:
        executed, skipped, decided = (value - before[k] for k, value in counters(server).items())
        if decided == requests:
            return executed, skipped
        if time.monotonic() > end:
            raise RuntimeError(f"{decided:g} of {requests} requests were counted")
        time.sleep(0.5)


if __name__ == "__main__":
    typer.run(main)
