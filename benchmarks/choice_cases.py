"""What `bench_choices` asks: rows of tasks as prompts, or decision requests as chats."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_probabilities import TASKS
from transformers import AutoTokenizer

from vllm_adainfer.offline.calibration.data import read_rows
from vllm_adainfer.offline.calibration.options import CalibrationRequest

MOST_TOKENS = 32


@dataclass(frozen=True)
class Case:
    """Requests that all have the same choices.

    Attributes:
        title: what is asked, for the table.
        choices: their texts.
        path: the endpoint.
        bodies: of the requests, in random order.
        calibration: of a policy for them; the choices are left out.
        test: what the bodies are made from, as `evaluate` reads it.

    """

    title: str
    choices: tuple[str, ...]
    path: str
    bodies: list[dict[str, Any]]
    calibration: CalibrationRequest
    test: Path


def task_cases(model: str, data_dir: Path, folder: Path) -> list[Case]:
    """The raw templates of tasks, with choices of a token and of a sentence each."""
    trec = tuple(f" {label}" for label in TASKS["trec"].labels)
    asked = [
        ("SST-2, a token each", "sst2", (" negative", " positive")),
        ("TREC, a token each", "trec", trec),
        ("SST-2, sentences", "sst2", (" negative, as a whole.", " positive, as a whole.")),
    ]
    cases = []
    for number, (title, task, choices) in enumerate(asked):
        template = TASKS[task].template
        test = data_dir / task / "test.jsonl"
        bodies = [
            asking(choices, prompt=template.format_map(row.fields)) for row in read_rows(test)
        ]
        calibration = CalibrationRequest(
            model=model,
            data=data_dir / task / "train.jsonl",
            template=template,
            label_field="",  # the right answers are not needed, and named otherwise
            output=folder / f"policy-{number}",
        )
        cases.append(Case(title, choices, "/v1/completions", shuffled(bodies), calibration, test))
    return cases


def chat_cases(model: str, data_dir: Path, folder: Path) -> list[Case]:
    """The chats of train.jsonl and test.jsonl, a case for each set of labels.

    Both are lines of a batch file that name their labels in `logprob_token_ids`; the texts of these
    tokens are the choices.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)

    def chats(part: str) -> Iterator[dict[str, Any]]:
        for line in (data_dir / f"{part}.jsonl").read_text().splitlines():
            body = json.loads(line)["body"]
            choices = tuple(tokenizer.decode(token) for token in body["logprob_token_ids"])
            yield asking(choices, messages=body["messages"])

    path = "/v1/chat/completions"
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    tests = list(chats("test"))
    for file, bodies in ((train, chats("train")), (test, tests)):
        lines = (json.dumps({"url": path, "body": body}) + "\n" for body in bodies)
        file.write_text("".join(lines))
    cases = []
    for number, choices in enumerate(Counter(choices_of(body) for body in tests)):
        bodies = [body for body in tests if choices_of(body) == choices]
        title = f"chats, {', '.join(choices)}"
        calibration = CalibrationRequest(model=model, data=train, output=folder / f"chats-{number}")
        cases.append(Case(title, choices, path, shuffled(bodies), calibration, test))
    return cases


def asking(choices: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """The body of a request."""
    return {
        "model": "model",
        "temperature": 0,
        "max_tokens": MOST_TOKENS,
        "structured_outputs": {"choice": list(choices)},
        **more,
    }


def choices_of(body: dict[str, Any]) -> tuple[str, ...]:
    """Those of a request."""
    return tuple(body["structured_outputs"]["choice"])


def shuffled(bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same in an order that is the same each time."""
    bodies = list(bodies)
    random.Random(0).shuffle(bodies)
    return bodies
