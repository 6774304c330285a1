"""Schemas have the same digest if they ask for the same object, by what they say."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionNamedToolChoiceParam,
    ChatCompletionToolsParam,
)
from vllm.sampling_params import StructuredOutputsParams
from vllm.tool_parsers.structural_tag_registry import get_model_structural_tag
from vllm.tool_parsers.utils import get_json_schema_from_tools

from vllm_adainfer.drafts.schemas import (
    LONGEST_SCHEMA,
    MOST_PARTS,
    digest_of,
    is_longer,
    paths_of,
    plain_schema,
)
from vllm_adainfer.engine.admission.requested_output import requested_schema

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
    "escapes": json.dumps(an_object()).replace("mood", "\\u006dood").replace("bad", "b\\u0061d"),
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


def test_keys_and_values_are_what_they_say_however_they_are_written():
    odd = [
        "",
        '"',
        "\\",
        "a.b",
        "\x00",
        "\u2028",
        "\U0001f600",
        "\ud83d",
        "é",
        "e\u0301",
        "constructor",
    ]
    same = [
        digest_of(json.dumps({"properties": {one: {"enum": odd}}}, ensure_ascii=escaped))
        for one in odd
        for escaped in (False, True)
    ]
    assert same[::2] == same[1::2]
    assert len({*same}) == len(odd)
    values = [digest(mood_is({"enum": ["good", one]})) for one in odd]
    assert len({*values}) == len(odd)
    assert digest({"pattern": "^a{1,}$"}) != digest({"pattern": "^a+$"}), "no pattern is understood"


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


def repeated(part: Any, times: int = 150) -> str:
    """A definition that so many fields refer to."""
    fields = {str(number): {"$ref": "#/$defs/A"} for number in range(times)}
    return json.dumps({"properties": fields, "$defs": {"A": part}})


def referring(**parts: Any) -> str:
    """A mood that refers to a definition, and has these parts beside."""
    return json.dumps(mood_is({"$ref": "#/$defs/Mood", **parts}, **{"$defs": {"Mood": MOOD}}))


TREE = {"$ref": "#/$defs/A"}
NONE = {
    "a schema that is itself": json.dumps({**TREE, "$defs": {"A": TREE}}),
    "a tree": json.dumps(mood_is(TREE, **{"$defs": {"A": {"anyOf": [MOOD, TREE]}}})),
    "references that explode": json.dumps(exploding()),
    "a reference to nowhere": json.dumps(mood_is({"$ref": "#/$defs/Mood"})),
    "a reference to elsewhere": json.dumps(mood_is({"$ref": "https://example.com/mood.json"})),
    "a reference to a name with an escape": json.dumps(
        mood_is({"$ref": "#/$defs/a/b"}, **{"$defs": {"a/b": MOOD, "a": {"b": {"const": 1}}}})
    ),
    "a reference within a part with a name": json.dumps(mood_is({**MOOD, "$id": "https://m/"})),
    "more values beside a reference": referring(enum=["good", "bad", "none"]),
    "fewer values beside a reference": referring(enum=["good"]),
    "values twice": '{"enum": ["good"], "enum": ["bad"]}',
    "a field twice": '{"properties": {"a": {}, "b": {}, "a": {"const": 1}}}',
    "a text, many times": repeated({"pattern": "(a|b)*" * 5000}),
    "a constant, many times": repeated({"const": [1] * 10_000}),
    "a list of values, many times": repeated({"enum": [[1] * 10_000]}),
    "a name, many times": repeated({"properties": {"n" * 20_000: {}}}),
    "a keyword, many times": repeated({"n" * 20_000: 1}),
    "numbers of many digits, many times": repeated({"enum": [int("9" * 4000)] * 10}, 60),
    "a definition of nothing": json.dumps({"$ref": "#/$defs/A", "$defs": {"A": False}}),
    "a thousand levels": nested(1000),
    "lists in lists": '{"items": ' + "[" * 30_000 + "]" * 30_000 + "}",
    "a circle": json.dumps(
        mood_is(
            {"$ref": "#/$defs/A"}, **{"$defs": {"A": {"items": {"$ref": "#/$defs/B"}}, "B": TREE}}
        )
    ),
    "the whole, again": json.dumps(mood_is({"$ref": "#"})),
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


def milliseconds(text: str) -> float:
    """The best of three, as other processes may hold one up."""
    took = []
    for _ in range(3):
        digest_of.cache_clear()
        start = time.perf_counter()
        digest_of(text)
        took.append(1000 * (time.perf_counter() - start))
    return min(took)


@pytest.mark.parametrize("text", NONE.values(), ids=NONE)
def test_a_schema_that_is_none_or_has_too_many_parts_has_no_digest_and_takes_no_time(text):
    digest_of.cache_clear()
    assert digest_of(text) is None
    assert milliseconds(text) < 50


def filled(schema: dict[str, Any], with_: str) -> str:
    """A schema whose description takes all the room that there is."""
    room = LONGEST_SCHEMA - len(json.dumps({**schema, "description": ""}, ensure_ascii=False))
    text = {**schema, "description": with_ * (room // len(json.dumps(with_)[1:-1]))}
    return json.dumps(text, ensure_ascii=False)


LARGEST = {
    "letters": filled(an_object(), "x"),
    "accents": filled(an_object(), "é"),
    "escapes": filled(an_object(), "\\"),
    "white space": json.dumps(an_object()).ljust(LONGEST_SCHEMA),
}
LARGE = {
    "values that are lists": json.dumps({"enum": [[[place]] for place in range(1000)]}),
    "a wide range": json.dumps(mood_is({"type": "integer", "minimum": 0, "maximum": 10**6})),
    "a range of many digits": json.dumps(mood_is({"type": "integer", "maximum": 10**4000})),
    "no numbers": '{"enum": [NaN, Infinity, -1e999], "minimum": NaN}',
}


@pytest.mark.parametrize("text", (LARGEST | LARGE).values(), ids=LARGEST | LARGE)
def test_the_largest_schemas_take_no_time_either(text):
    assert len(text) <= LONGEST_SCHEMA
    assert (digest_of(text) == digest(an_object())) == (text in LARGEST.values())
    assert digest_of(text) is not None
    assert milliseconds(text) < 50
    start = time.perf_counter()
    paths_of(text)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    "schema",
    [
        {"description": "x" * 9_000_000},
        {"x" * 9_000_000: 1},
        {"enum": [""] * 1_000_000},
        {"properties": {str(number): {} for number in range(200_000)}},
        {"enum": [[[number]] for number in range(200_000)]},
        " " * 9_000_000,
    ],
    ids=["a text", "a name", "values", "names", "lists", "no JSON"],
)
def test_a_request_with_megabytes_of_schema_is_told_by_a_look(schema):
    params = asking(json=schema)
    took = []
    for _ in range(3):
        start = time.perf_counter()
        assert requested_schema(params) is None
        took.append(time.perf_counter() - start)
    assert min(took) < 0.05
    assert not is_longer(an_object(), len(json.dumps(an_object())))
    assert is_longer(an_object(), 20)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("parser", ["hermes", "llama", "qwen_3"])
def test_the_arguments_of_a_tool_within_a_parsers_tags_are_no_object_of_the_schema(parser, strict):
    """As vLLM asks for them if a tool must be called, in one of several ways to write the tags."""
    tool = {"name": "note", "parameters": an_object(), "strict": strict}
    asked = ChatCompletionToolsParam.model_validate({"type": "function", "function": tool})
    named = ChatCompletionNamedToolChoiceParam.model_validate({"function": {"name": "note"}})
    tag = get_model_structural_tag(parser, [asked], named, reasoning=False)
    assert tag is not None
    text = json.dumps(tag.model_dump())
    assert requested_schema(asking(structural_tag=text)) is None
    assert requested_schema(asking(json=text)) != digest(an_object())
    plain = get_json_schema_from_tools(named, [asked])
    assert requested_schema(asking(json=plain)) == digest(an_object())


def asking(**how: Any) -> SamplingParams:
    return SamplingParams(structured_outputs=StructuredOutputsParams(**how))


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
