"""Make messages to a shop with one of 20 intents, and their schema: docs/recipes/routing.md.

python examples/recipes/routing.py .recipes/routing
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from made import as_message, draw, write, write_rows

TEMPLATE = "Message: {text}\nIts intent: "
INTENTS = {
    "order_status": ("Has my order of the {what} been packed?", "What became of my {what}?"),
    "order_change": ("Swap the colour of the {what} I ordered.", "I meant two of the {what}."),
    "order_cancel": ("I no longer want the {what}, call it off.", "Do not send the {what}."),
    "order_repeat": ("Send the {what} once more, as last time.", "Another {what}, like before."),
    "card_lost": (
        "I cannot find the gift card for the {what} anywhere.",
        "My card fell out of the {what}.",
    ),
    "card_blocked": (
        "My card was declined when I paid the {what}.",
        "Your till refused my card for a {what}.",
    ),
    "card_balance": (
        "Is my card enough for the {what}?",
        "What is left on my card after the {what}?",
    ),
    "card_expired": (
        "May I still buy the {what} with an old card?",
        "My card ran out before I chose a {what}.",
    ),
    "delivery_late": (
        "I have waited for the {what} since Monday.",
        "The {what} should have come last week.",
    ),
    "delivery_address": (
        "I moved, so send the {what} elsewhere.",
        "Bring the {what} to my office instead.",
    ),
    "delivery_damaged": (
        "The {what} arrived broken in two.",
        "There is a deep scratch in the {what}.",
    ),
    "delivery_missing": (
        "The box came without the {what}.",
        "The parcel was empty, no {what} inside.",
    ),
    "refund_request": (
        "Take the {what} back and return my money.",
        "I want my money for the {what}.",
    ),
    "refund_status": (
        "Where is the refund for the {what}?",
        "You promised money for the {what}, nothing came.",
    ),
    "refund_amount": (
        "You refunded less than the {what} had cost.",
        "The money for the {what} is five euros short.",
    ),
    "refund_refused": (
        "You denied me a refund for the {what}.",
        "Why do I get nothing back for the {what}?",
    ),
    "account_open": (
        "I am new and want to register to buy the {what}.",
        "How do I join, to order a {what}?",
    ),
    "account_close": (
        "Close my account, I only came for the {what}.",
        "Delete all you know of me and the {what}.",
    ),
    "account_email": (
        "Write to my other email about the {what}.",
        "News of the {what} go to my old address.",
    ),
    "account_password": (
        "I cannot log in to see the {what}.",
        "What was my password? I need the {what}.",
    ),
}
WHAT = (
    "red kettle", "garden hose", "desk lamp", "bread knife", "wool blanket", "toaster",
    "folding chair", "small rug", "bicycle pump", "coffee mug",
)  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {"intent": {"enum": list(INTENTS)}},
    "required": ["intent"],
    "additionalProperties": False,
}


def message(chance: random.Random) -> tuple[str, dict[str, str]]:
    """A message and its intent."""
    intent = chance.choice(list(INTENTS))
    text = chance.choice(INTENTS[intent]).format(what=chance.choice(WHAT))
    return as_message(text, chance), {"intent": intent}


def main(folder: Path) -> None:
    """Write the files of the recipe."""
    request = {"max_tokens": 32, "structured_outputs": {"json": SCHEMA}}
    write_rows(folder, TEMPLATE, draw(message), json.dumps, request)
    write(folder, {"schema.json": SCHEMA})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
