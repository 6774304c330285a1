"""Make headlines to label, as batch files and as rows: docs/recipes/batch_labels.md.

python examples/recipes/batch_labels.py .recipes/batch_labels .recipes/base
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

from made import draw, write
from transformers import AutoTokenizer

HEADLINES = {
    "weather": (
        "Storm over {place} {when}",
        "Snow closes in on {place} {when}",
        "{place} expects fog and frost {when}",
        "The wind turns north near {place} {when}",
    ),
    "money": (
        "Shares of the mill in {place} fall {when}",
        "{place} cuts taxes for small shops {when}",
        "Prices of flats in {place} rise {when}",
        "The budget of {place} is short of two million {when}",
    ),
    "travel": (
        "By bus to {place} and back {when}",
        "Where to stay in {place} {when}",
        "A walk along the old walls of {place} {when}",
        "Tourists fill the hotels of {place} {when}",
    ),
    "food": (
        "The best pancakes of {place} {when}",
        "How {place} cooks its lentils {when}",
        "Fresh cheese at the market of {place} {when}",
        "A kitchen in {place} serves only mushrooms {when}",
    ),
}
PLACE = "Altau", "Brenford", "Cormin", "Dunhaven", "Estmar", "Felsen", "Gralle", "Hollin"
WHEN = (
    "this week", "in spring", "on Sunday", "again", "for a month", "at last", "before Easter",
    "after all", "by night", "in May",
)  # fmt: skip
QUESTION = "Headline: {text}\nWhich section is it for: weather, money, travel or food?"


def headline(chance: random.Random) -> tuple[str, str]:
    """A headline and its section."""
    section = chance.choice(list(HEADLINES))
    words = chance.choice(HEADLINES[section])
    return words.format(place=chance.choice(PLACE), when=chance.choice(WHEN)), section


def main(folder: Path, model: Path) -> None:
    """Write the lessons, and train.jsonl, test.jsonl and new.jsonl as batch files.

    The requests of new.jsonl are those of test.jsonl without the labels. Their headlines are in
    rows.jsonl, for Ray Data, with the same prompt in template.txt.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = {section: tokenizer.encode(section)[0] for section in HEADLINES}
    template = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    rows = draw(headline)

    def line(number: int, row: dict[str, Any]) -> dict[str, Any]:
        body = {
            "model": ".recipes/model",
            "messages": [{"role": "user", "content": QUESTION.format_map(row)}],
            "max_completion_tokens": 1,
            "temperature": 0,
            "allowed_token_ids": list(tokens.values()),
        }
        url = "/v1/chat/completions"
        return {"custom_id": str(number), "method": "POST", "url": url, "body": body}

    lines = {part: [line(*numbered) for numbered in enumerate(rows[part])] for part in rows}
    labelled = {
        f"{part}.jsonl": [
            {**line, "label": tokens[row["label"]]}
            for line, row in zip(lines[part], rows[part], strict=True)
        ]
        for part in ("train", "test")
    }
    lessons = [
        {"prompt": template.format_map(row), "answer": row["label"]} for row in rows["lessons"]
    ]
    texts = [{"text": row["text"]} for row in rows["test"]]
    files = {"lessons.jsonl": lessons, "new.jsonl": lines["test"], "rows.jsonl": texts, **labelled}
    write(folder, {"template.txt": template, **files})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
