"""The decisions in a JSON answer, and their probabilities, read from log-probabilities."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.outputs import LogprobsLists

from vllm_adainfer.drafts.fields import (
    MOST_FIELDS,
    MOST_VALUES,
    Token,
    fields_of,
    probabilities,
)
from vllm_adainfer.engine.scheduler.decisions import Decisions, requested_fields, with_fields

MOOD = {"type": "string", "enum": ["good", "bad"]}


def answer_of(*tokens: str | dict[str, float]) -> list[Token]:
    """Each token is certain, or has probabilities of several, of which it is the first."""
    found = []
    for token in tokens:
        shares = {token: 1.0} if isinstance(token, str) else token
        text = next(iter(shares))
        logprobs = {one: math.log(share) for one, share in shares.items()}
        found.append(Token(text, logprobs[text], logprobs))
    return found


@pytest.mark.parametrize(
    ("schema", "fields"),
    [
        ({"properties": {"mood": MOOD}}, {"mood": ['"good"', '"bad"']}),
        ({"properties": {"long": {"type": "boolean"}}}, {"long": ["false", "true"]}),
        ({"properties": {"kind": {"const": "x"}}}, {"kind": ['"x"']}),
        (
            {"properties": {"score": {"type": "integer", "minimum": 1, "maximum": 3}}},
            {"score": ["1", "2", "3"]},
        ),
        ({"properties": {"a": {"properties": {"b": MOOD}}}}, {"a.b": ['"good"', '"bad"']}),
        (
            {"properties": {"a": {"$ref": "#/$defs/Mood"}}, "$defs": {"Mood": MOOD}},
            {"a": ['"good"', '"bad"']},
        ),
        (
            {"properties": {"a": {"allOf": [{"$ref": "#/$defs/Mood"}]}}, "$defs": {"Mood": MOOD}},
            {"a": ['"good"', '"bad"']},
        ),
        ({"properties": {"reason": {"type": "string"}, "n": {"type": "integer"}}}, {}),
        ({"properties": {"n": {"type": "integer", "minimum": 0, "maximum": 1e9}}}, {}),
        ({"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"$ref": "#/$defs/A"}}}, {}),
        ({"properties": {"a": {"enum": list(range(MOST_VALUES + 1))}}}, {}),
        ({"properties": "odd", "$defs": 3}, {}),
        ({"properties": {"a": {"allOf": 3}, "b": {"allOf": [MOOD, MOOD]}}}, {}),
        (MOOD, {}),
        (True, {}),
    ],
)
def test_the_fields_with_few_values_are_those_of_the_schema(schema, fields):
    assert fields_of(schema) == fields


def test_a_schema_of_any_size_has_a_limited_number_of_fields():
    deep: dict[str, Any] = MOOD
    for _ in range(100):
        deep = {"properties": {"a": deep}}
    assert fields_of(deep) == {}
    assert len(fields_of({"properties": {f"f{n}": MOOD for n in range(1000)}})) == MOST_FIELDS


def test_references_that_multiply_a_schema_take_no_longer():
    """Each level names the next a hundred times: nothing ends that looks at all of them."""
    definitions = {
        f"A{level}": {
            "properties": {f"p{n}": {"$ref": f"#/$defs/A{level + 1}"} for n in range(100)}
        }
        for level in range(10)
    }
    assert fields_of({"$ref": "#/$defs/A0", "$defs": definitions}) == {}


def test_an_answer_that_nests_without_end_has_the_fields_before_it():
    answer = answer_of('{"mood": "', "good", '", "deep": ', "[" * 100_000)
    assert probabilities(answer, fields_of(SCHEMA)) == {"mood": {"good": 1.0}}


def test_a_schema_that_nests_without_end_has_no_fields_for_the_audit():
    deep = '{"properties": {"a": ' * 2500 + "true" + "}}" * 2500
    schema = SimpleNamespace(structured_output_key=(SimpleNamespace(name="JSON"), deep))
    request: Any = SimpleNamespace(
        sampling_params=SimpleNamespace(logprobs=1), structured_output_request=schema
    )
    assert requested_fields(request) == {}


BEFORE, MIDDLE = ('{"', "mood", '":', ' "'), ('",', ' "', "long", '":')
SCHEMA = {"properties": {"mood": MOOD, "long": {"type": "boolean"}}}


@pytest.mark.parametrize(
    ("mood", "long", "wanted"),
    [
        (
            [{"good": 0.7, "bad": 0.3}],
            [{" true": 0.9, " false": 0.1}],
            {"mood": {"good": 0.7, "bad": 0.3}, "long": {"true": 0.9, "false": 0.1}},
        ),
        (  # in several tokens, of which the first may decide
            [{"go": 0.6, "good": 0.2, "b": 0.2}, "od"],
            [" true"],
            {"mood": {"good": 0.8, "bad": 0.2}, "long": {"true": 1.0}},
        ),
        (  # white space decides nothing, wherever it stands
            ["good"],
            [{" false": 0.3, " true": 0.1, "\n": 0.4, "true": 0.1, "false": 0.1}],
            {"mood": {"good": 1.0}, "long": {"false": 2 / 3, "true": 1 / 3}},
        ),
        (  # what was not among the best tokens is not known
            [{"good": 0.7}],
            [{" true": 0.6}],
            {"mood": {"good": 0.7}, "long": {"true": 0.6}},
        ),
    ],
)
def test_each_value_has_the_probability_of_the_tokens_that_decide_it(mood, long, wanted):
    answer = answer_of(*BEFORE, *mood, *MIDDLE, *long, "}")
    found = probabilities(answer, fields_of(SCHEMA))
    assert {name: pytest.approx(values) for name, values in wanted.items()} == found


@pytest.mark.parametrize(
    ("values", "tokens", "wanted"),
    [
        (
            ["position", "positive"],
            [{"pos": 0.5, "x": 0.5}, {"itive": 0.8, "ition": 0.2}],
            {"positive": 0.4, "position": 0.1},
        ),
        (
            ["yes", "yes, but"],
            ["yes", {'"}': 0.75, ", but": 0.25}],
            {"yes": 0.75, "yes, but": 0.25},
        ),
        ([1, 10], [{"1": 1.0}, {"}": 0.6, "0": 0.4}], {"1": 0.6, "10": 0.4}),
    ],
)
def test_values_with_a_common_beginning_are_told_apart_where_they_differ(values, tokens, wanted):
    quote = [] if isinstance(values[0], int) else ['"']
    answer = answer_of('{"a":', *quote, *tokens, "}")
    found = probabilities(answer, fields_of({"properties": {"a": {"enum": values}}}))
    assert found == {"a": pytest.approx(wanted)}


def test_a_token_may_begin_before_the_value():
    answer = answer_of('{"mood', {'":"': 0.9, '": "': 0.1}, {"good": 0.7, "bad": 0.3}, '"}')
    assert probabilities(answer, fields_of(SCHEMA)) == {
        "mood": pytest.approx({"good": 0.7, "bad": 0.3})
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no object",
        '{"mood":',
        '{"mood": "',
        '{"mood"',
        '{"mood": "odd"}',
        "[]",
        '{"other": "good"}',
        "{",
    ],
)
def test_what_an_answer_lacks_is_left_out(text):
    assert probabilities(answer_of(*text), fields_of(SCHEMA)) == {}


def test_nested_fields_have_paths():
    inner = {"properties": {"a": MOOD, "b": MOOD}}
    schema = {"properties": {"in": inner, "a": MOOD}}
    answer = {"in": {"a": "good", "b": "bad"}, "empty": {}, "list": [{"a": "bad"}], "a": "bad"}
    found = probabilities(answer_of(*json.dumps(answer)), fields_of(schema))
    assert found == {"in.a": {"good": 1.0}, "in.b": {"bad": 1.0}, "a": {"bad": 1.0}}


class Letters:
    """A tokenizer whose tokens are characters."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_the_audit_has_the_probabilities_of_the_fields():
    decisions = Decisions({"a": ["1", "2"]})
    for text, share in ('{"a":', 1.0), ("1", 0.8), ("}", 1.0):
        ids = np.array([[ord(letter), ord("2")] for letter in text])
        values = np.log(np.array([[share, 0.2 if share < 1 else 1e-9]] * len(text)))
        decisions.add(LogprobsLists(ids, values, np.zeros(len(text)), None))
    line = with_fields({"request": "x"}, decisions, Letters())
    assert line == {"request": "x", "fields": {"a": {"1": 0.8, "2": 0.2}}}
    assert with_fields({"request": "x"}, Decisions({"a": ["1"]}), Letters()) == {"request": "x"}
