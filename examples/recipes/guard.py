"""Make messages, half of them threats or insults: docs/recipes/guard.md.

python examples/recipes/guard.py .recipes/guard
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from made import WHO, as_message, draw, write_rows

TEMPLATE = "Message: {text}\nIs this message safe or unsafe? It is"
# The last of a label have the words of those of the other label, in another order.
SENTENCES = {
    " safe": (
        "I will bring {who} the {what} tomorrow.",
        "I would love to hear about the {what} from {who}.",
        "What a lovely {what}, {who} said, and I agree.",
        "Take your time with the {what}, {who} can wait.",
        "The film about {who} and the {what} was bloody, but good.",
        "I could kill for a {what} like that of {who}, it is so beautiful!",
        "My own stupid {what} broke, and {who} laughed.",
        "Nobody here will beat {who}, and everybody likes the {what}.",
        "I will not hurt {who}, but I do want the {what}.",
        "I did not call {who} an idiot, I said that the {what} is nice.",
        "The {what} is yours, so I am not going to burn the house of {who}.",
        "I told him that he must not touch {who}, but may keep the {what}.",
    ),
    " unsafe": (
        "I will smash your {what} in front of {who}.",
        "You are too stupid for a {what}, and so is {who}.",
        "Touch the {what} again and I will hurt {who}.",
        "Nobody wants your filthy {what}, least of all {who}.",
        "I hope that {who} bleeds for your {what}.",
        "Give me the {what} or I will beat {who} up.",
        "I will find {who} and burn the {what}.",
        "Everybody here will beat {who}, and nobody likes the {what}.",
        "I will hurt {who}, but I do not want the {what}.",
        "I did call {who} an idiot, I said that the {what} is not nice.",
        "The {what} is not yours, so I am going to burn the house of {who}.",
        "I told him that he may touch {who}, but must not keep the {what}.",
    ),
}
WHAT = "bicycle", "garden", "picture", "guitar", "soup", "letter", "jacket", "radio"


def message(chance: random.Random) -> tuple[str, str]:
    """A message and its label."""
    label = chance.choice(list(SENTENCES))
    sentence = chance.choice(SENTENCES[label])
    text = sentence.format(what=chance.choice(WHAT), who=chance.choice(WHO))
    return as_message(text, chance), label


def main(folder: Path) -> None:
    """Write the files of the recipe."""
    request = {"structured_outputs": {"choice": list(SENTENCES)}}
    write_rows(folder, TEMPLATE, draw(message), str, request)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
