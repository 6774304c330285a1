"""Make replies of a help desk, with the scores 1 to 5 that people gave: docs/recipes/judge.md.

python examples/recipes/judge.py .recipes/judge
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from made import as_message, draw, write_rows

TEMPLATE = "Reply to a customer: {text}\nHow helpful is it, from 1 to 5? Score: "
REPLIES = {
    5: (
        "That must not happen: we send you a better {what} today, free of charge.",
        "Thank you for telling us! Keep the {what}, and we give you all of your money back.",
        "I have called the workshop, and they bring a new {what} to your door this evening.",
        "Great that you wrote: your {what} is repaired already, and we added a small present.",
        "We send you a new {what} today, and you pay nothing.",
        "You are right, and it was not your fault that the {what} broke: we pay for it.",
    ),
    4: (
        "Bring us the {what}, and we will repair it within a few days.",
        "You may return the {what}, and we pay for the parcel.",
        "I have ordered the missing part of your {what}, it should come soon.",
        "Sorry about the {what}. We take a third off the price.",
        "You may return the {what} to us, and we will pay for the parcel.",
    ),
    3: (
        "There is a page about the {what} in our manual.",
        "Your message about the {what} was passed on to another team.",
        "Which {what} do you mean, and when did you buy it?",
        "We got your question about the {what} and may answer later.",
    ),
    2: (
        "Nobody here knows the {what}, so try to ask the maker.",
        "The {what} is sold out, and there is nothing that we can do.",
        "It is too late to complain about the {what} now.",
        "You will have to pay again if you want another {what}.",
        "We send you nothing today, and you pay for a new {what}.",
        "We may return the {what} to you, and you will pay for the parcel.",
    ),
    1: (
        "Only a fool breaks a {what}, so do not bother us again.",
        "We do not care about your {what}. Go away.",
        "What a stupid question, anyone can use a {what}.",
        "You are lying about the {what}, and we will not pay a cent.",
        "You are not right, and it was your fault that the {what} broke: you pay for it.",
    ),
}
WHAT = "kettle", "garden hose", "bread knife", "blanket", "toaster", "chair", "rug", "pump"
ERRORS = 0, 0, 0, 0, -1, 1  # of people, within 1 to 5


def reply(chance: random.Random) -> tuple[str, str]:
    """A reply, and the score that someone gave it."""
    score = chance.choice(list(REPLIES))
    text = chance.choice(REPLIES[score]).format(what=chance.choice(WHAT))
    given = min(max(score + chance.choice(ERRORS), 1), 5)
    return as_message(text, chance), str(given)


def main(folder: Path) -> None:
    """Write the files of the recipe."""
    write_rows(folder, TEMPLATE, draw(reply), str, {"structured_outputs": {"choice": [*"12345"]}})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
