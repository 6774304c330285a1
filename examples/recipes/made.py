"""Draw rows, and write the files of a recipe."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

GREETINGS = (
    "", "", "", "Hi. ", "Hello, ", "Good morning. ", "Me again: ", "To whom it may concern: ",
    "Short note, as I am on the train. ", "Hope you are well. ", "So... ", "Re: last week. ",
)  # fmt: skip
ENDINGS = (
    "", "", "", " Thanks.", " Best wishes, Kim", " Sent from my phone.", " It rains here.",
    " That is all.", " Well, you know.", " Have a nice day!", " Bye.", " (Excuse my typing.)",
)  # fmt: skip
# Whom messages and comments are about.
WHO = (
    "your brother", "your boss", "my sister", "the dog", "the whole class", "your mother",
    "the new neighbour", "our coach", "Aunt Rosa", "your friend",
)  # fmt: skip
PARTS = {"lessons": 400, "train": 1000, "test": 250}  # rows; none comes twice
Row = dict[str, Any]


def draw(make: Callable[[random.Random], tuple[str, Any]]) -> dict[str, list[Row]]:
    """The rows of each part: texts that `make` draws, with typing errors, and their labels."""
    chance = random.Random(0)
    labels: dict[str, Any] = {}
    while len(labels) < sum(PARTS.values()):
        text, label = make(chance)
        labels[" ".join(swap(word, chance) for word in text.split(" "))] = label
    rows = iter([{"text": text, "label": label} for text, label in labels.items()])
    return {part: [next(rows) for _ in range(count)] for part, count in PARTS.items()}


def as_message(text: str, chance: random.Random) -> str:
    """`text` between a greeting and an ending."""
    return chance.choice(GREETINGS) + text + chance.choice(ENDINGS)


def swap(word: str, chance: random.Random) -> str:
    """`word`, and one time in eight, if it has four letters or more, with two of them swapped."""
    if not word.isalpha() or len(word) < 4 or chance.random() > 1 / 8:
        return word
    at = chance.randrange(len(word) - 1)
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def write_rows(
    folder: Path,
    template: str,
    rows: Mapping[str, list[Row]],
    answer: Callable[[Any], str],
    request: Mapping[str, Any],
) -> None:
    """Write template.txt, train.jsonl, test.jsonl, the lessons, and a request about a test row.

    `answer` says how the model is to write a label.
    """
    asked = {"model": folder.name, "prompt": template.format_map(rows["test"][0]), "temperature": 0}
    lessons = [
        {"prompt": template.format_map(row), "answer": answer(row["label"])}
        for row in rows["lessons"]
    ]
    files = {"template.txt": template, "request.json": {**asked, **request}}
    data = {"lessons.jsonl": lessons, "train.jsonl": rows["train"], "test.jsonl": rows["test"]}
    write(folder, {**files, **data})


def write(folder: Path, files: Mapping[str, Any]) -> None:
    """Write `files` by their names: a text as it is, a list as JSON lines, anything else as JSON.

    An OSError if the folder is not writable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        if isinstance(value, list):
            value = "".join(json.dumps(line) + "\n" for line in value)
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
