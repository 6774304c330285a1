"""Make comments with three flags, and their schema: docs/recipes/moderation.md.

python examples/recipes/moderation.py .recipes/moderation
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from made import WHO, as_message, draw, write, write_rows

TEMPLATE = "Comment: {text}\nFlags of the comment: "
NOTHING = "nothing"  # what has no flag
SENTENCES = {
    NOTHING: (
        "I read about the {what} when {who} came.",
        "Thank you for the {what}, {who} liked it.",
        "The {what} is older than {who}.",
        "I will not smash the {what}, and {who} knows that.",
        "I do not think that {who} is stupid, I like the {what}.",
        "The {what} is not on sale, so come with {who}.",
    ),
    "insult": (
        "You and {who} are as stupid as the {what}.",
        "Only an idiot like {who} would buy the {what}.",
        "I think that {who} is stupid, I do not like the {what}.",
    ),
    "threat": (
        "I will smash the {what} and then {who}.",
        "Touch the {what} again and I will kill {who}.",
        "I will smash the {what}, and {who} does not know that.",
    ),
    "advert": (
        "Buy the {what} now at half the price, for you and {who}!",
        "Order the {what} today, and {who} gets one for free!",
        "The {what} is on sale, so do not come without {who}.",
    ),
}
FLAGS = [kind for kind in SENTENCES if kind != NOTHING]
WHAT = "bicycle", "garden house", "picture", "guitar", "old radio", "kettle", "boat", "tent"
SCHEMA = {
    "type": "object",
    "properties": {flag: {"type": "boolean"} for flag in FLAGS},
    "required": FLAGS,
    "additionalProperties": False,
}


def comment(chance: random.Random) -> tuple[str, dict[str, bool]]:
    """One or two sentences, and their flags. Half of the comments have none."""
    harmful = chance.random() < 0.5
    kinds = [chance.choice(FLAGS)] if harmful else [NOTHING]
    if chance.random() < 0.5:
        kinds.append(chance.choice(list(SENTENCES)) if harmful else NOTHING)
        chance.shuffle(kinds)
    texts = (chance.choice(SENTENCES[kind]) for kind in kinds)
    text = " ".join(
        sentence.format(what=chance.choice(WHAT), who=chance.choice(WHO)) for sentence in texts
    )
    return as_message(text, chance), {flag: flag in kinds for flag in FLAGS}


def main(folder: Path) -> None:
    """Write the files of the recipe."""
    request = {"max_tokens": 64, "structured_outputs": {"json": SCHEMA}}
    write_rows(folder, TEMPLATE, draw(comment), json.dumps, request)
    write(folder, {"schema.json": SCHEMA})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
