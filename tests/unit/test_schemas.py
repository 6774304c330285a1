"""Schemas have the same digest if they ask for the same object, by what they say."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from vllm_adainfer.drafts.schemas import LONGEST_SCHEMA, MOST_PARTS, digest_of, plain_schema

MOOD = {"type": "string", "enum": ["good", "bad"]}


def an_object(**changes: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"mood": MOOD, "seen": {"type": "boolean"}},
        "required": ["mood", "seen"],
        "additionalProperties": False,
        **changes,
    }


def digest(schema: Any) -> str | None:
    return digest_of(json.dumps(schema))


def mood_is(mood: Any, **more: Any) -> dict[str, Any]:
    return an_object(properties={"mood": mood, "seen": {"type": "boolean"}}, **more)


SAME = {
    "white space": json.dumps(an_object(), indent=4),
    "what is said to people": json.dumps(
        mood_is({**MOOD, "title": "Mood", "description": "of whom", "examples": ["bad"]}, title="T")
        | {"$schema": "https://json-schema.org/draft/2020-12/schema", "$comment": "v2"}
    ),
    "the order of keywords": json.dumps(dict(reversed(an_object().items()))),
    "the order of values": json.dumps(mood_is({**MOOD, "enum": ["bad", "good"]})),
    "the order of required names": json.dumps(an_object(required=["seen", "mood"])),
    "a reference": json.dumps(mood_is({"$ref": "#/$defs/Mood"}, **{"$defs": {"Mood": MOOD}})),
    "an older reference, said to people": json.dumps(
        mood_is(
            {"$ref": "#/definitions/Mood", "description": "of whom"}, definitions={"Mood": MOOD}
        )
    ),
    "a definition that nothing refers to": json.dumps(an_object(**{"$defs": {"Plot": MOOD}})),
}
OTHER = {
    "the order of properties": an_object(properties={"seen": {"type": "boolean"}, "mood": MOOD}),
    "another value": mood_is({**MOOD, "enum": ["good", "bad", "none"]}),
    "a value of another type": mood_is({"enum": ["good", 1]}),
    "another name": an_object(properties={"tone": MOOD, "seen": {"type": "boolean"}}),
    "a field that may be missing": an_object(required=["mood"]),
    "other fields": an_object(additionalProperties=True),
    "a field that is named like an annotation": an_object(
        properties={"mood": MOOD, "seen": {"type": "boolean"}, "title": {"const": 1}}
    ),
}


@pytest.mark.parametrize("text", SAME.values(), ids=SAME)
def test_what_does_not_change_the_answers_does_not_change_the_digest(text):
    assert digest_of(text) == digest(an_object()) is not None


def test_all_that_may_change_the_answers_changes_the_digest():
    digests = [digest(an_object()), *map(digest, OTHER.values())]
    assert None not in digests
    assert len(set(digests)) == len(digests)


def test_true_is_not_one():
    assert digest(mood_is({"const": True})) != digest(mood_is({"const": 1}))


def nested(levels: int) -> str:
    return '{"properties": {"a": ' * levels + "{}" + "}}" * levels


def exploding() -> dict[str, Any]:
    """Each definition refers to the next ten times: written out it has 10^12 parts."""
    ten = {f"f{number}": {"$ref": "#/$defs/%d"} for number in range(10)}
    text = {
        str(level): json.loads(json.dumps({"properties": ten}).replace("%d", str(level + 1)))
        for level in range(12)
    }
    return mood_is({"$ref": "#/$defs/0"}, **{"$defs": {**text, "12": MOOD}})


TREE = {"$ref": "#/$defs/A"}
NONE = {
    "a schema that is itself": json.dumps({**TREE, "$defs": {"A": TREE}}),
    "a tree": json.dumps(mood_is(TREE, **{"$defs": {"A": {"anyOf": [MOOD, TREE]}}})),
    "references that explode": json.dumps(exploding()),
    "a reference to nowhere": json.dumps(mood_is({"$ref": "#/$defs/Mood"})),
    "a reference to elsewhere": json.dumps(mood_is({"$ref": "https://example.com/mood.json"})),
    "a thousand levels": nested(1000),
    "levels beyond what Python reads": "[" * 30_000,
    "many parts": json.dumps(an_object(properties={str(n): {} for n in range(MOST_PARTS)})),
    "many values": json.dumps(mood_is({"enum": list(range(MOST_PARTS))})),
    "a long text": json.dumps(an_object(description="x" * LONGEST_SCHEMA)),
    "no JSON": '{"type": ',
    "a number of many digits": "1" * 60_000,
    "nothing": "",
    "no object": "true",
    "a list": "[{}]",
}


@pytest.mark.parametrize("text", NONE.values(), ids=NONE)
def test_a_schema_that_is_none_or_has_too_many_parts_has_no_digest_and_takes_no_time(text):
    digest_of.cache_clear()
    start = time.perf_counter()
    assert digest_of(text) is None
    assert time.perf_counter() - start < 1


def test_the_largest_schema_takes_no_time_either():
    schema = an_object(description="")
    schema["description"] = "é" * ((LONGEST_SCHEMA - len(json.dumps(schema))) // 6)
    digest_of.cache_clear()
    start = time.perf_counter()
    assert digest(schema) == digest(an_object())
    assert time.perf_counter() - start < 1


def test_odd_but_legal_schemas_have_a_digest():
    for odd in ({}, {"properties": 3}, {"$defs": 4, "enum": 5}, {"required": [["x"]]}):
        assert digest(odd) is not None
    assert digest({"enum": ["\ud800"]}) is not None


def test_a_plain_schema_names_properties_in_their_order_and_values_as_json():
    plain = plain_schema(json.dumps(an_object(title="Film")))
    assert plain == {
        "additionalProperties": False,
        "properties": [
            ["mood", {"enum": ['"bad"', '"good"'], "type": "string"}],
            ["seen", {"type": "boolean"}],
        ],
        "required": ['"mood"', '"seen"'],
        "type": "object",
    }
