"""The code of ``docs/structured.md``, as a reader copies it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from tests.in_docs import field_probabilities

SCHEMA = {
    "properties": {
        "mood": {"enum": ["bad", "good"]},
        "long": {"type": "boolean"},
        "reason": {"type": "string"},
    }
}


def place(shares: dict[str, float]) -> Any:
    """A place in ``choices[0].logprobs.content``, of which the first token was written."""
    best = [SimpleNamespace(token=one, logprob=math.log(share)) for one, share in shares.items()]
    masked = SimpleNamespace(token="<masked>", logprob=-9999.0)
    return SimpleNamespace(
        token=best[0].token, logprob=best[0].logprob, top_logprobs=[*best, masked]
    )


def test_the_probability_of_each_field_is_read_from_what_a_client_gets():
    content = [
        place({'{"mood": "': 1.0}),
        place({"good": 0.6, "g": 0.1, "b": 0.2, "bad": 0.1}),
        place({'", "long":': 1.0}),
        place({" true": 0.75, " false": 0.25}),
        place({', "reason": "why"}': 1.0}),
        place({"<end>": 1.0}),
    ]
    found = field_probabilities(content, SCHEMA)
    assert found == {
        "mood": pytest.approx({"good": 0.7, "bad": 0.3}),
        "long": pytest.approx({"true": 0.75, "false": 0.25}),
    }
