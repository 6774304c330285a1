"""How long engines take to start, and how much memory they use.

    .venv/bin/python benchmarks/offline/bench_startup.py --model .demo/SmolLM2-135M-Instruct

Stock vLLM and a scripted engine with four exit points (six compiled segments) start in turn: each
with an empty compile cache, then with the cache that this start has filled.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import psutil
import typer

from benchmarks.common.report_files import write_report
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.record.engine import start_engine, stop_engine
from vllm_adainfer.offline.evaluation.rounds import turns
from vllm_adainfer.offline.facts.document import markdown_table
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.offline.reports.speedup import Speedup

MAX_LENGTH = 1024
STOCK, FOUR = "stock", "four exit points"
ROUNDS = 3  # starts of each in turn, with nothing compiled and then compiled


def main(
    model: Annotated[str, typer.Option(help="Only its config is used, not its weights.")],
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/startup.json"),
) -> None:
    """Measure, and write JSON and a Markdown table next to each other."""
    depth = load_config_and_tokenizer(model)[0].num_hidden_layers
    plans: dict[str, Any] = {
        STOCK: None,
        FOUR: {"exit_script": [depth * part // 5 for part in range(1, 5)]},
    }
    start(model, None)  # warms the page cache
    found: dict[str, dict[str, list[float]]] = {
        name: {key: [] for key in ("cold_seconds", "warm_seconds", "bytes")} for name in plans
    }
    for _, name in turns([*plans], ROUNDS):
        with tempfile.TemporaryDirectory() as cache:
            os.environ["VLLM_CACHE_ROOT"] = cache
            for state in ("cold", "warm"):
                seconds, used = start(model, plans[name])
                found[name][f"{state}_seconds"].append(seconds)
            found[name]["bytes"].append(used)
    ratios: dict[str, Any] = {}
    for key, ours in found[FOUR].items():
        ratios |= Speedup.of(ours, found[STOCK][key]).entries(key)
    report = {
        "model": Path(model).name,
        "engines": found,
        "ratios": ratios,
        "provenance": provenance(),
    }
    write_report(output, report, table(report))


def start(model: str, adainfer: dict[str, Any] | None) -> tuple[float, int]:
    """Start and stop an engine; returns seconds, and the bytes unique to its processes (USS)."""
    begin = time.perf_counter()
    engine = start_engine(
        model, [Example("", "", [0] * MAX_LENGTH, None)], adainfer, load_format="dummy"
    )
    seconds = time.perf_counter() - begin
    children = psutil.Process().children(recursive=True)
    memory = sum(child.memory_full_info().uss for child in children)
    stop_engine(engine)
    return seconds, memory


def table(report: dict[str, Any]) -> str:
    """Markdown: a row per engine with medians, then the ratios of pairs of starts."""
    columns = {
        "start, nothing compiled, s": ("cold_seconds", 1, 1),
        "start, compiled before, s": ("warm_seconds", 1, 1),
        "memory, MiB": ("bytes", 2**20, 0),
    }
    rows = [
        {
            "engine": name,
            **{
                title: f"{statistics.median(engine[key]) / unit:.{digits}f}"
                for title, (key, unit, digits) in columns.items()
            },
        }
        for name, engine in report["engines"].items()
    ]
    ratios = {title: Speedup.read(report["ratios"], key) for title, (key, *_) in columns.items()}
    rows.append({"engine": "ratio", **{title: one.text for title, one in ratios.items()}})
    return markdown_table(rows) + "\n"


if __name__ == "__main__":
    typer.run(main)
