"""How long engines take to start, and how much memory they use.

    .venv/bin/python benchmarks/offline/bench_startup.py --model .demo/SmolLM2-135M-Instruct

Stock vLLM and a scripted engine with four exit points (six compiled segments) start one after the
other: first with an empty compile cache, then with the cache those starts filled.
"""

from __future__ import annotations

import os
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
from vllm_adainfer.offline.facts.document import markdown_table
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.offline.provenance import provenance

MAX_LENGTH = 1024
STOCK, FOUR = "stock", "four exit points"


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
    found: dict[str, dict[str, float]] = {name: {} for name in plans}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["VLLM_CACHE_ROOT"] = cache
        for state in ("cold", "warm"):
            for name, adainfer in plans.items():
                found[name][f"{state}_seconds"], found[name]["bytes"] = start(model, adainfer)
    report = {
        "model": Path(model).name,
        "engines": found,
        "ratios": {key: found[FOUR][key] / found[STOCK][key] for key in found[STOCK]},
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
    """Markdown: a row per engine, then the ratios."""
    rows = [
        {
            "engine": name,
            "start, nothing compiled, s": f"{engine['cold_seconds']:.1f}",
            "start, compiled before, s": f"{engine['warm_seconds']:.1f}",
            "memory, MiB": f"{engine['bytes'] / 2**20:.0f}",
        }
        for name, engine in report["engines"].items()
    ]
    ratios = report["ratios"]
    rows.append(
        {
            "engine": "ratio",
            "start, nothing compiled, s": f"{ratios['cold_seconds']:.2f}",
            "start, compiled before, s": f"{ratios['warm_seconds']:.2f}",
            "memory, MiB": f"{ratios['bytes']:.3f}",
        }
    )

    return markdown_table(rows) + "\n"


if __name__ == "__main__":
    typer.run(main)
