"""What a student costs for a prompt, by size, beside its arithmetic at this processor's peak.

    .venv/bin/python benchmarks/offline/bench_student.py --student MINILM --data train.jsonl

On one thread: the texts of a file, so many in a step. "padded" reads them in padded batches of 32,
as every student did before. The peak is the fastest product of a matrix of this encoder with as
many rows as a step has tokens. Times are those of the thread, medians of several calls.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import numpy as np
import torch
import typer
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel

from benchmarks.common.report_files import write_report
from vllm_adainfer.offline.calibration.fit.students import FIRST_LAYERS
from vllm_adainfer.offline.calibration.fit.training import SERVED_DTYPE
from vllm_adainfer.offline.facts.document import markdown_table
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.policy.text_encoders import BagEncoder, LayersEncoder, TextEncoder

CPU = torch.device("cpu")
ROUNDS = 15


def main(
    student: Annotated[Path, typer.Option(help="The encoder, as transformers saves one.")],
    data: Annotated[Path, typer.Option(help="Lines with a text each, under `text`.")],
    together: Annotated[int, typer.Option(help="Texts in a step.")] = 64,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/student.json"),
) -> None:
    """Measure, and write the table."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(student / "tokenizer.json"))
    tokenizer.no_padding()
    lines = data.read_text(encoding="utf-8").splitlines()[:together]
    texts = [tokenizer.encode(json.loads(line)["text"]).ids for line in lines]
    tokens = sum(map(len, texts))
    model = AutoModel.from_pretrained(student, dtype=torch.float32)
    sizes: dict[str, TextEncoder] = {
        "a bag of tokens": BagEncoder(model.get_input_embeddings().weight.detach()),
        f"first {FIRST_LAYERS} layers": LayersEncoder.first_layers(model, FIRST_LAYERS),
        "whole encoder": LayersEncoder(model),
    }
    rows = []
    with torch.inference_mode():
        for name, encoder in sizes.items():
            encoder.eval().to(SERVED_DTYPE).served(CPU)
            rows.append({"student": name, **measured(encoder, texts)})
    report = {
        "encoder": student.name,
        "data": data.parent.name,
        "texts": len(texts),
        "tokens": tokens,
        "sizes": rows,
        "provenance": provenance(),
    }
    write_report(output, report, table(report))


def measured(encoder: TextEncoder, texts: list[list[int]]) -> dict[str, Any]:
    """Milliseconds a prompt: padded, as served, and the arithmetic at the peak; the peak."""
    weights = [one.weight for one in encoder.modules() if isinstance(one, nn.Linear)]
    of_words = isinstance(encoder, BagEncoder)
    rows = len(texts) if of_words else sum(map(len, texts))
    peak = max(products_a_second(weight, rows) for weight in {w.shape: w for w in weights}.values())
    products = 2 * rows * sum(weight.numel() for weight in weights)
    found = {
        "dtype": str(weights[0].dtype).removeprefix("torch."),
        "served": seconds(lambda: encoder(texts)) / len(texts) * 1e3,
        "at_peak": products / peak / len(texts) * 1e3,
        "peak_gflops": peak / 1e9,
    }
    if isinstance(encoder, LayersEncoder):
        assert encoder.packs
        encoder.packs = False
        found["padded"] = seconds(lambda: encoder(texts)) / len(texts) * 1e3
    return found


def products_a_second(weight: Tensor, rows: int) -> float:
    """Floating-point operations in a second, of a product with a matrix."""
    read = torch.from_numpy(np.random.default_rng(0).normal(size=(rows, weight.shape[1])))
    given = read.to(weight.dtype)
    taken = seconds(lambda: nn.functional.linear(given, weight))
    return 2 * rows * weight.numel() / taken


def seconds(call: Callable[[], object]) -> float:
    """The median time of this thread in a call."""
    call()
    times = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return statistics.median(times)


def table(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    rows = [
        {
            "student": f"{one['student']} ({one['dtype']})",
            "padded, ms a prompt": f"{one['padded']:.2f}" if "padded" in one else "",
            "now": f"{one['served']:.3f}",
            "its matrix products at the peak": f"{one['at_peak']:.3f}",
            "peak, GFLOP/s": f"{one['peak_gflops']:.0f}",
        }
        for one in report["sizes"]
    ]
    said = (
        f"{report['encoder']} on {report['texts']} texts of {report['data']} in a step, "
        f"{report['tokens']} tokens, one thread of {report['provenance']['cpu']}.\n\n"
    )
    return said + markdown_table(rows, 1)


if __name__ == "__main__":
    typer.run(main)
