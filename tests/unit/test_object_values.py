"""What full depth says of the fields of an object, by the log-probabilities of its tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch

from vllm_adainfer.artifact.outputs import DecidedField, Objects, Value
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.record.values import check_tells, values_of_answers
from vllm_adainfer.promise.changed import Changed
from vllm_adainfer.promise.gates import Gate, Gates
from vllm_adainfer.promise.tolerance import Tolerance

TEXTS = ['{"mood": "', "bad", "ba", "d", "bland", "good", '", "seen": ', "true", "false", "}", "go"]
TOKENS = {text: token for token, text in enumerate(TEXTS)}


class Logprob(NamedTuple):
    """As much of vLLM's as is read."""

    logprob: float


class Tokenizer:
    def decode(self, tokens):
        return "".join(TEXTS[token] for token in tokens)


def field(path: str, *values: str, written: Sequence[tuple[int, ...]] = ()) -> DecidedField:
    tokens = written or [(token,) for token in range(len(values))]
    found = [Value(text=one, written=own) for one, own in zip(values, tokens, strict=True)]
    return DecidedField(path=path, values=tuple(found), guess=0)


OBJECTS = Objects(
    schema_digest="0" * 64,
    start=(0,),
    fields=(field("mood", '"bad"', '"bland"', '"good"'), field("seen", "false", "true")),
)
CODE = {("bad", "true"): 1, ("good", "true"): 5, ("good", "false"): 4}


def answer(*tokens: tuple[str, float] | dict[str, float]):
    """The tokens of an answer, each with its probability, or with those of others as well."""
    places = [one if isinstance(one, dict) else dict([one]) for one in tokens]
    return [
        {
            TOKENS[text]: Logprob(math.log(share) if share else -math.inf)
            for text, share in one.items()
        }
        for one in places
    ]


def values(code: tuple[str, str], *tokens) -> list[float]:
    [row] = values_of_answers(OBJECTS, [CODE[code]], [answer(*tokens)], Tokenizer())
    return [round(one, 4) for one in row.tolist()]


def test_values_are_as_probable_as_the_tokens_that_decide_them():
    found = values(
        ("good", "true"),
        (TEXTS[0], 1.0),
        {"good": 0.6, "bad": 0.3, "bland": 0.1, "}": 0.0},
        ('", "seen": ', 1.0),
        {"true": 0.75, "false": 0.25},
        ("}", 1.0),
    )
    assert found == [0.3, 0.1, 0.6, 0.25, 0.75]


def test_several_tokens_may_begin_a_value_and_the_second_token_may_decide():
    found = values(
        ("bad", "true"),
        (TEXTS[0], 1.0),
        {"ba": 0.5, "bad": 0.2, "good": 0.2, "go": 0.1},
        ("d", 1.0),
        ('", "seen": ', 1.0),
        ("true", 1.0),
        ("}", 1.0),
    )
    assert found == [0.7, 0.0, 0.3, 0.0, 1.0]


def test_what_is_beyond_the_best_tokens_is_left_out_of_the_account():
    found = values(
        ("good", "false"),
        (TEXTS[0], 1.0),
        {"good": 0.6, "bad": 0.2},
        ('", "seen": ', 1.0),
        ("false", 1.0),
        ("}", 1.0),
    )
    assert found == [0.25, 0.0, 0.75, 1.0, 0.0]


def test_what_was_written_is_certain_where_tokens_do_not_tell(capfd):
    broken = answer((TEXTS[0], 1.0), {"good": 0.6, "bad": 0.4})  # a character in parts, say
    whole = answer((TEXTS[0], 1.0), ("good", 1.0), ('", "seen": ', 1.0), ("true", 1.0), ("}", 1.0))
    found = values_of_answers(OBJECTS, [4, 5], [broken, whole], Tokenizer())
    assert torch.equal(found[1], torch.tensor([0.0, 0, 1, 0, 1]))
    assert found[0, 3:].tolist() == [1, 0]
    assert "the probabilities of 1 of 4 values cannot be read" in capfd.readouterr().err


AT_ONE_TOKEN = [
    [(1, 5), (2, 5), (3, 5)],
    [(1, 2, 5), (1, 3, 5), (1, 4)],
]
LATER = [
    [(1, 2), (1, 3), (4, 5)],  # an object with the third says nothing of the first two
    [(1,), (1, 2), (1, 3)],
]


@pytest.mark.parametrize("written", [*AT_ONE_TOKEN, *LATER])
@pytest.mark.parametrize("gated", ["mood=1", "seen=true"])
def test_probabilities_are_promised_of_fields_whose_values_differ_at_one_token(written, gated):
    mood = field("mood", "1", "2", "3", written=written)
    objects = OBJECTS.model_copy(update={"fields": (mood, OBJECTS.fields[1])})
    gate = Gates(gates=(Gate(label=gated, probability=0.5),))
    check_tells(objects, Changed())
    for promise in gate, Tolerance(tolerance=0.1):
        if written in AT_ONE_TOKEN or (promise is gate and gated == "seen=true"):
            check_tells(objects, promise)
        else:
            with pytest.raises(AdaInferError, match="values of mood that differ at one"):
                check_tells(objects, promise)
