"""Make reviews and three questions about each, as batch files: docs/recipes/questions.md.

python examples/recipes/questions.py .recipes/questions .recipes/base
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

from made import as_message, draw, write
from transformers import AutoTokenizer

# The questions, with the labels that answer them.
QUESTIONS = {
    "Did it come on time?": ("yes", "no"),
    "Is the customer satisfied?": ("yes", "no"),
    "What was bought? A: food, B: clothes, C: a device": ("A", "B", "C"),
}
ARRIVALS = {
    "yes": (
        "It came early and not late.",
        "On Monday, as promised, and not a week after that.",
        "It was here within a day.",
        "Fast delivery, right on time.",
    ),
    "no": (
        "I waited a month for the parcel.",
        "It came late and not early.",
        "Not on Monday, as promised, and a week after that.",
        "The parcel was lost and came after ten days.",
    ),
}
THINGS = {
    "A": ("cheese", "bread", "honey", "chocolate"),
    "B": ("coat", "jumper", "scarf", "shirt"),
    "C": ("radio", "printer", "phone", "camera"),
}
OPINIONS = {
    "yes": (
        "I love the {thing} and would buy it again.",
        "The {thing} is the best I ever had.",
        "A wonderful {thing}, everyone at home is happy with it.",
        "The {thing} is good and not bad at all.",
        "I do not want my money back, the {thing} is all I hoped for.",
    ),
    "no": (
        "The {thing} is awful, nobody at home likes it.",
        "I threw the {thing} away after a day.",
        "Never again: the {thing} was a waste of money.",
        "The {thing} is bad and not good at all.",
        "I want my money back, the {thing} is not all I hoped for.",
    ),
}


def review(chance: random.Random) -> tuple[str, tuple[str, ...]]:
    """A review, and the answers to the questions about it."""
    answers = tuple(chance.choice(labels) for labels in QUESTIONS.values())
    came, liked, kind = answers
    opinion = chance.choice(OPINIONS[liked]).format(thing=chance.choice(THINGS[kind]))
    sentences = [chance.choice(ARRIVALS[came]), opinion]
    chance.shuffle(sentences)
    return as_message(" ".join(sentences), chance), answers


def main(folder: Path, model: Path) -> None:
    """Write the lessons, and train.jsonl and test.jsonl, with a request for each question."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = {label: tokenizer.encode(label)[0] for label in ("yes", "no", "A", "B", "C")}
    asked = {
        part: [
            {
                "prompt": f"Review: {row['text']}\n\n{question}\n",
                "answer": answer,
                "labels": [tokens[label] for label in labels],
                "group": str(number),
                "question": question,
            }
            for number, row in enumerate(rows)
            for (question, labels), answer in zip(QUESTIONS.items(), row["label"], strict=True)
        ]
        for part, rows in draw(review).items()
    }

    def line(number: int, one: dict[str, Any]) -> dict[str, Any]:
        body = {
            "model": ".recipes/model",
            "prompt": one["prompt"],
            "max_tokens": 1,
            "temperature": 0,
            "allowed_token_ids": one["labels"],
        }
        request = {"custom_id": str(number), "method": "POST", "url": "/v1/completions"}
        beside = {"group": one["group"], "question": one["question"]}
        return {**request, "body": body, **beside, "label": tokens[one["answer"]]}

    lessons = [{"prompt": one["prompt"], "answer": one["answer"]} for one in asked["lessons"]]
    lines = {
        f"{part}.jsonl": [line(*numbered) for numbered in enumerate(asked[part])]
        for part in ("train", "test")
    }
    write(folder, {"lessons.jsonl": lessons, **lines})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
