"""The requests of `bench_choices.py`: task rows as prompts, or decision requests as chats."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.common.tasks import TASKS
from vllm_adainfer.offline.calibration.data.examples import read_rows
from vllm_adainfer.offline.calibration.options import CalibrationRequest

MOST_TOKENS = 32


@dataclass(frozen=True)
class Case:
    """Requests that share their choices, in random order.

    `calibration` says how to calibrate a policy for them, without the choices; the bodies are made
    from the file `test`.
    """

    title: str
    choices: tuple[str, ...]
    path: str
    bodies: list[dict[str, Any]]
    calibration: CalibrationRequest
    test: Path


def task_cases(model: str, data_dir: Path, folder: Path) -> list[Case]:
    """Raw prompts of SST-2 and TREC, with single-token choices and with sentences."""
    trec = tuple(f" {label}" for label in TASKS["trec"].labels.values())
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
            label_field="",  # right answers are not needed, and have other names
            output=folder / f"policy-{number}",
        )
        cases.append(Case(title, choices, "/v1/completions", shuffled(bodies), calibration, test))
    return cases


def chat_cases(model: str, data_dir: Path, folder: Path) -> list[Case]:
    """The chats of train.jsonl and test.jsonl, one case per set of labels.

    Both are batch files whose requests name their labels in `logprob_token_ids`; the texts of these
    tokens become the choices.
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
    """The body of a request with these choices."""
    return {
        "model": "model",
        "temperature": 0,
        "max_tokens": MOST_TOKENS,
        "structured_outputs": {"choice": list(choices)},
        **more,
    }


def choices_of(body: dict[str, Any]) -> tuple[str, ...]:
    """The choices of a request."""
    return tuple(body["structured_outputs"]["choice"])


def shuffled(bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`bodies` in a fixed random order."""
    bodies = list(bodies)
    random.Random(0).shuffle(bodies)
    return bodies
