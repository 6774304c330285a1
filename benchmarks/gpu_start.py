"""Start a Llama shape of 1B on a GPU once, and tell what the self-test and the start found.

    python3 benchmarks/gpu_start.py --model llama-1b

Weights are random, and exits follow a script. vLLM's log tells the time to compile and to capture,
and the memory of the graphs; `benchmarks/gpu_steps.py` gathers that.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parents[1]))  # imports start at the checkout

import typer

from benchmarks.offline.llama_shapes import SHAPES, write_shape
from benchmarks.offline.scripted_requests import random_prompts, scripted_request
from vllm_adainfer.offline.doctor.smoke import self_test_found
from vllm_adainfer.stats import stats

LENGTH, BATCH, TOKENS = 128, 64, 16


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-1b",
) -> None:
    """Start it, test it, and send it requests that exit and others that do not."""
    from vllm import LLM

    layers, vocabulary = SHAPES[model]["num_hidden_layers"], 128_256
    points = [int(layers) * part // 5 for part in range(1, 5)]
    started = time.monotonic()
    llm = LLM(
        str(write_shape(model, Path(tempfile.mkdtemp()))),
        load_format="dummy",
        max_model_len=2048,
        max_num_seqs=BATCH,
        gpu_memory_utilization=0.5,
        additional_config={"adainfer": {"exit_script": points}},
    )
    typer.echo(f"started in {time.monotonic() - started:.0f} s")
    prompts = random_prompts(BATCH, LENGTH, vocabulary)
    exits = [[None, *points][place % (1 + len(points))] for place in range(BATCH)]
    llm.generate(prompts, [scripted_request(layer, TOKENS) for layer in exits], use_tqdm=False)
    counted = stats(llm)
    found = self_test_found(counted["failed_parts"], counted["not_tested"])
    typer.echo(f"exits by layer: {dict(sorted(counted['exit_histogram'].items()))}")
    typer.echo(str(found))
    if found.failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
