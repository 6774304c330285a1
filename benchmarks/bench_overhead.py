"""What the plugin costs where it saves nothing: installed but idle, and never exiting.

    .venv/bin/python benchmarks/bench_overhead.py --model .demo/SmolLM2-135M-Instruct \
        --artifact .demo/artifact --output benchmarks/results/overhead.json

Three engines on the same prompts, interleaved, each round in another order: vLLM without the
plugin (VLLM_PLUGINS=""), with the plugin installed but not configured, and configured with
requests that ask for full depth. Ratios are throughput over the first engine's, paired by round.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_adainfer.calibration.calibrate import load_config
from vllm_adainfer.calibration.collect import one_token
from vllm_adainfer.calibration.data import Row, find_labels, make_examples
from vllm_adainfer.calibration.engine import start_engine, stop_engine
from vllm_adainfer.calibration.report import write_whole
from vllm_adainfer.demo.run import LABELS
from vllm_adainfer.plugin import register
from vllm_adainfer.provenance import provenance
from vllm_adainfer.runtime.admission import EXIT_ARG
from vllm_adainfer.stats import stats

TEMPLATE = "Review: {text}\nSentiment:"


def main(
    model: Annotated[str, typer.Option()],
    artifact: Annotated[str, typer.Option()],
    output: Annotated[Path, typer.Option()],
    rounds: Annotated[int, typer.Option(min=1)] = 6,
) -> None:
    """Measure the three engines and write the result."""
    hf_config, tokenizer = load_config(model)
    lines = files("vllm_adainfer.demo").joinpath("calibration.jsonl").read_text().splitlines()
    rows = [Row("demo", json.loads(line)) for line in lines]
    longest = hf_config.max_position_embeddings - 1
    examples = make_examples(rows, tokenizer, TEMPLATE, "label", longest)
    labels = find_labels(LABELS, examples[0], tokenizer)
    prompts = [{"prompt_token_ids": example.token_ids} for example in examples]

    os.environ["VLLM_PLUGINS"] = ""
    engines = {"stock": start_engine(model, examples)}
    del os.environ["VLLM_PLUGINS"]
    register()  # vLLM asks for plugins once in a process, and this one has had none
    engines["installed_idle"] = start_engine(model, examples)
    engines["never_exit"] = start_engine(model, examples, {"artifact": artifact})
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    tokens: dict[str, Any] = {}
    for round_number in range(rounds + 1):
        names = list(engines)
        for name in names[round_number % 3 :] + names[: round_number % 3]:
            engines[name].reset_prefix_cache()
            params = one_token(labels, {EXIT_ARG: 0})
            start = time.perf_counter()
            outputs = engines[name].generate(prompts, params, use_tqdm=False)
            if round_number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
            tokens[name] = [out.outputs[0].token_ids[0] for out in outputs]
    counters = stats(engines["never_exit"])  # an error if the plugin is not in it
    assert counters["layers_run"] == counters["layers_possible"], "a request left early"
    for engine in engines.values():
        stop_engine(engine)

    result: dict[str, Any] = {
        "model": Path(model).name,
        "n": len(examples),
        "prompt_tokens_mean": statistics.mean(len(e.token_ids) for e in examples),
        "rounds": rounds,
        "engines": {},
        "provenance": provenance(),
    }
    for name, runs in seconds.items():
        ratios = [base / run for base, run in zip(seconds["stock"], runs, strict=True)]
        result["engines"][name] = {
            "requests_per_second": len(examples) / statistics.median(runs),
            "ratio_to_stock": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "same_tokens_as_stock": sum(
                a == b for a, b in zip(tokens[name], tokens["stock"], strict=True)
            )
            / len(examples),
        }
    write_whole(output, (json.dumps(result, indent=2) + "\n").encode())
    typer.echo(json.dumps(result["engines"], indent=2))


if __name__ == "__main__":
    typer.run(main)
