"""Which schemas a policy can decide, and how the model writes their objects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken

from tests.byte_model import byte_tokenizer
from tests.e2e.drafted_traffic import an_object
from vllm_adainfer.artifact.fields import MOST_FIELDS
from vllm_adainfer.artifact.outputs import Objects
from vllm_adainfer.drafts.fields import MOST_VALUES
from vllm_adainfer.drafts.schemas import LONGEST_SCHEMA, digest_of
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.data.objects import (
    Schema,
    common_schema,
    objects_of,
    read_schema,
)
from vllm_adainfer.offline.calibration.options import (
    CalibrationRequest,
    PolicyOptions,
    check_objects,
    check_options,
)
from vllm_adainfer.promise.accuracy import Accuracy
from vllm_adainfer.promise.gates import Gates
from vllm_adainfer.promise.tolerance import Tolerance

MOOD = {"type": "string", "enum": ["good", "bad"]}
YES_OR_NO = {"type": "boolean"}
OF_MOOD = an_object(mood=MOOD)


def schema_of(schema: Any) -> Schema:
    return Schema.of(json.dumps(schema), "--schema s.json")


@pytest.mark.parametrize(
    ("properties", "fields"),
    [
        ({"mood": MOOD}, {"mood": ('"bad"', '"good"')}),
        ({"seen": YES_OR_NO}, {"seen": ("false", "true")}),
        ({"n": {"enum": [3, "3", None, 0.5]}}, {"n": ('"3"', "0.5", "3", "null")}),
        ({"n": {"type": "integer", "minimum": -1, "maximum": 1}}, {"n": ("-1", "0", "1")}),
        ({"mood": {"anyOf": [MOOD, {"type": "null"}]}}, {"mood": ('"bad"', '"good"', "null")}),
        ({"n": {"oneOf": [{"const": 1}, YES_OR_NO]}}, {"n": ("1", "false", "true")}),
        ({"seen": {"type": ["boolean", "null"]}}, {"seen": ("false", "true", "null")}),
        (
            {"n": {"type": ["null", "integer"], "minimum": 0, "maximum": 1}},
            {"n": ("0", "1", "null")},
        ),
        (
            {"mood": {"type": ["string", "null"], "enum": ["good", None]}},
            {"mood": ('"good"', "null")},
        ),
        ({"mood": {"allOf": [MOOD]}}, {"mood": ('"bad"', '"good"')}),
        (
            {"kind": {"const": "é"}, "film": an_object(plot=an_object(mood=MOOD), seen=YES_OR_NO)},
            {
                "kind": ('"é"',),
                "film.plot.mood": ('"bad"', '"good"'),
                "film.seen": ("false", "true"),
            },
        ),
    ],
    ids=lambda one: ",".join(one),
)
def test_fields_of_few_values_are_decided_in_the_order_of_the_answer(properties, fields):
    schema = schema_of(an_object(**properties))
    assert schema.fields == fields
    assert list(schema.fields) == list(fields)
    assert schema.digest == digest_of(json.dumps(an_object(**properties)))
    names = [f"{path}={value}" for path, values in fields.items() for value in values]
    assert [(label.name, label.token_id) for label in schema.labels] == [
        (name, place) for place, name in enumerate(names)
    ]


def test_definitions_count_as_if_they_stood_where_they_are_referred_to():
    schema = an_object(mood={"$ref": "#/$defs/Mood"})
    assert schema_of({**schema, "$defs": {"Mood": MOOD}}).fields == schema_of(OF_MOOD).fields


TOO_MANY = {"enum": list(range(MOST_VALUES + 1))}
DRAFTED = "drafted and verified all the same"


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        ([], "is no JSON schema of at most"),
        ({"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}}, "references to itself"),
        ({**OF_MOOD, "title": "x" * LONGEST_SCHEMA}, f"at most {LONGEST_SCHEMA} characters"),
        (an_object(why={"type": "string"}, mood=MOOD), f"^why of .* no free text.*{DRAFTED}"),
        (an_object(n={"type": "integer"}), "^n of .* not one of few values"),
        (an_object(n={"type": "integer", "minimum": 0, "maximum": 999}), "^n of .* few values"),
        (an_object(n={"type": "number", "minimum": 0, "maximum": 1}), "^n of .* few values"),
        (an_object(n=TOO_MANY), f"^n of .* at most {MOST_VALUES} integers"),
        (an_object(tags={"type": "array", "items": MOOD}), "^tags of .* or lists"),
        (an_object(mood={"anyOf": [MOOD, {"type": "string"}]}), "^mood of .* few values"),
        (an_object(mood={"anyOf": [MOOD, True]}), "^mood of .* few values"),
        (an_object(mood={"type": ["string", "null"]}), "^mood of .* few values"),
        (an_object(mood={}), "^mood of .* few values"),
        (an_object(mood=True), "^mood of .* few values"),
        (MOOD, "^the answer of --schema s.json is not one of few values"),
        ({**an_object(mood=MOOD, seen=YES_OR_NO), "required": ["mood"]}, "name all of them in req"),
        (an_object(film={**OF_MOOD, "required": []}), "^film of .* may be missing"),
        ({**OF_MOOD, "additionalProperties": True}, "^the answer of .* may have other fields"),
        ({**OF_MOOD, "patternProperties": {"^x": YES_OR_NO}}, "may have other fields"),
        (an_object(**{"a.b": MOOD}), "'a.b' of .* has a dot or an = in its name"),
        (an_object(**{"a=b": MOOD}), "'a=b' of .* has a dot or an = in its name"),
        (an_object(a={"const": 1}, b={"enum": ["x"]}), "allows one object alone"),
        (
            an_object(**{f"f{place}": YES_OR_NO for place in range(MOST_FIELDS + 1)}),
            f"must have 1 to {MOST_FIELDS} fields with values, and has {MOST_FIELDS + 1}",
        ),
        (an_object(**{f"f{place}": YES_OR_NO for place in range(63)}), "126 values in all"),
        (
            an_object(**{f"f{n}": {"enum": list(range(100))} for n in range(11)}),
            f"no JSON schema|1100 values in all.*{DRAFTED}",
        ),
    ],
    ids=lambda one: None if isinstance(one, str) else json.dumps(one)[:60],
)
def test_a_schema_that_no_policy_decides_is_refused_by_one_sentence(schema, sentence):
    with pytest.raises(AdaInferError, match=sentence) as refused:
        schema_of(schema)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 450


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"labels": ("good", "bad")}, "--labels"),
        ({"label_pool": ("good", "bad")}, "--label-pool"),
        ({"choices": ("good", "bad")}, "--choices"),
        ({"probe": "lens"}, "--probe lens"),
        ({"probe": "branch"}, "--probe branch"),
        ({"options": PolicyOptions(max_tokens=5)}, "--max-tokens"),
        ({"options": PolicyOptions(by_question=True)}, "--by question"),
        ({"options": PolicyOptions(promise=Accuracy())}, "--risk accuracy"),
        ({"options": PolicyOptions(promise=Gates.asked(["best:0.8"]))}, "--gate urgent=true:0.8"),
    ],
    ids=lambda one: one if isinstance(one, str) else None,
)
def test_options_that_are_not_for_objects_are_named(tmp_path, given, option):
    request = CalibrationRequest("model", tmp_path, tmp_path, **given)
    with pytest.raises(AdaInferError, match=option):
        check_objects(request)
    check_objects(CalibrationRequest("model", tmp_path, tmp_path, student="minilm"))


def test_promises_about_values_go_with_a_schema_for_rows_of_text(tmp_path):
    """They name values of the schema, as they name --labels elsewhere."""
    promises = [Tolerance(tolerance=0.1), Gates.asked(["urgent=true:0.8"])]
    given = [
        *(PolicyOptions(promise=one) for one in promises),
        PolicyOptions(never_early=("urgent=true",)),
    ]
    for options in given:
        request = CalibrationRequest("model", tmp_path, tmp_path, options=options)
        with pytest.raises(AdaInferError, match="give --labels"):
            check_options(request, holds_requests=False)
        check_objects(with_schema := replace(request, schema=tmp_path / "schema.json"))
        check_options(with_schema, holds_requests=False)


def test_a_schema_file_is_read_or_refused(tmp_path):
    path = tmp_path / "schema.json"
    with pytest.raises(AdaInferError, match=f"cannot read --schema {path}"):
        read_schema(path)
    path.write_bytes(b"\xff")
    with pytest.raises(AdaInferError, match=f"cannot read --schema {path}"):
        read_schema(path)
    path.write_text("{")
    with pytest.raises(AdaInferError, match=f"^--schema {path} is no JSON schema"):
        read_schema(path)
    path.write_text(json.dumps(OF_MOOD))
    assert read_schema(path) == schema_of(OF_MOOD)


def example(place: int, schema: Any) -> Example:
    text = None if schema is None else json.dumps(schema)
    return Example(f"line {place}", "text", [1], None, schema=text)


def test_a_policy_is_for_the_schema_that_all_requests_have_or_the_one_asked_for():
    ours = [example(1, OF_MOOD), example(2, {**OF_MOOD, "title": "Film"})]
    others = [example(3, an_object(seen=YES_OR_NO)), example(4, None)]
    assert common_schema(ours, None, "d") == (ours, Schema.of(str(ours[0].schema), "line 1"))
    assert common_schema([others[1]], None, "d") == ([others[1]], None)
    asked = schema_of(OF_MOOD)
    assert common_schema([*others, *ours], asked, "d") == (ours, asked)
    with pytest.raises(AdaInferError, match=r"3 different answers \(2, 1, 1 requests each\)"):
        common_schema([*ours, *others], None, "d")
    with pytest.raises(AdaInferError, match="no request of d has the schema of --schema"):
        common_schema(others, asked, "d")
    with pytest.raises(AdaInferError, match=r"^why of line 5"):
        common_schema([example(5, an_object(why={"type": "string"}))], None, "d")


REVIEW = an_object(
    of=an_object(m={"enum": ["good", "positive", "é"]}, x={"const": "x"}),
    n={"type": "integer", "minimum": -1, "maximum": 10},
    it={"anyOf": [{"enum": ["one", "it"]}, {"type": "null"}]},
    s=YES_OR_NO,
)
ANSWERS: list[dict[str, Any]] = [
    {"of": {"m": "positive", "x": "x"}, "n": 10, "it": "it", "s": True},
    {"of": {"m": "good", "x": "x"}, "n": 3, "it": None, "s": True},
    {"of": {"m": "positive", "x": "x"}, "n": 10, "it": "it", "s": True},
]
TOKENIZER = byte_tokenizer()


def assert_written(objects: Objects, schema: Schema, tokenizer: Any = TOKENIZER) -> None:
    """Every object is written as JSON with the values that it has."""
    for places in product(*(range(len(values)) for values in schema.fields.values())):
        assert schema.places(tokenizer.decode(objects.written(places))) == places


def encoded(*answers: Any, tokenizer: Any = TOKENIZER, **how: Any) -> list[list[int]]:
    return [tokenizer.encode(json.dumps(one, ensure_ascii=False, **how)) for one in answers]


@pytest.mark.parametrize("how", [{}, {"separators": (",", ":")}, {"indent": 0}], ids=str)
def test_objects_are_written_as_the_model_writes_them_also_with_values_that_it_never_gave(how):
    schema, answers = schema_of(REVIEW), encoded(*ANSWERS, **how)
    objects = objects_of(schema, [TOKENIZER.encode("sorry"), *answers], TOKENIZER)
    assert objects.written(objects.commonest) == tuple(answers[0])
    assert_written(objects, schema)
    places = schema.places(TOKENIZER.decode(answers[1]))
    assert places is not None
    assert objects.written(places) == tuple(answers[1])
    assert objects.schema_digest == schema.digest
    assert {field.path: tuple(one.text for one in field.values) for field in objects.fields} == (
        schema.fields
    )


def test_each_field_is_read_at_the_row_before_its_value():
    schema = schema_of(REVIEW)
    objects = objects_of(schema, encoded(*ANSWERS), TOKENIZER)
    guess, rows = objects.written(objects.commonest), objects.rows(objects.commonest)
    before = [TOKENIZER.decode(guess[:row]) for row in rows]
    text = '{"of": {"m": "positive", "x": "x"}, "n": 10, "it": "it", "s": true}'
    ends = ['"m": "', '"x": "', '"n": ', '"it": ', '"s": ']
    assert before == [text[: text.index(end) + len(end)] for end in ends]


def test_the_commonest_way_to_write_a_value_is_taken():
    """The tokenizer writes "positive" in one token, but the model mostly spells it."""
    schema = schema_of(an_object(mood={"enum": ["positive", "good"]}))
    whole, good = encoded({"mood": "positive"}, {"mood": "good"})
    spelt = [token for letter in TOKENIZER.decode(whole) for token in TOKENIZER.encode(letter)]
    objects = objects_of(schema, [good, spelt, whole, spelt, good, good, good], TOKENIZER)
    assert objects.written(objects.commonest) == tuple(good)
    assert objects.written((1,)) == tuple(spelt)


def with_tokens(*texts: str) -> Any:
    """A tokenizer that writes these texts in one token wherever they stand."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])
    return tokenizer


def test_a_value_whose_first_token_reaches_back_to_other_text_is_written_alone():
    """The quote is a token with "good" but not with "bad", so no row is before both values."""
    tokenizer = with_tokens('"good')
    schema = schema_of(an_object(seen=YES_OR_NO, mood=MOOD))
    answers = encoded({"seen": True, "mood": "bad"}, {"seen": True, "mood": "good"})
    merged = tokenizer.encode('{"seen": true, "mood": "good"}')
    assert merged != answers[1]
    for seen in (answers, [answers[0], merged], answers[:1]):
        objects = objects_of(schema, seen, tokenizer)
        assert_written(objects, schema, tokenizer)
        assert objects.written((1, 1)) == tuple(answers[1])


def test_a_tokenizer_that_writes_no_value_alone_is_an_error():
    """Such as those that put a blank before each text."""
    merging = with_tokens('"good')
    tokenizer: Any = SimpleNamespace(
        decode=merging.decode, encode=lambda text, **how: merging.encode(f" {text}", **how)
    )
    [answer] = encoded({"mood": "bad"})
    with pytest.raises(AdaInferError, match=f'not write the value "good" of mood in .*{DRAFTED}'):
        objects_of(schema_of(OF_MOOD), [answer], tokenizer)


def test_a_guess_that_is_longer_than_a_draft_is_refused():
    names: Sequence[str] = [f"a rather long name of a field {place}" for place in range(3)]
    schema = schema_of(an_object(**dict.fromkeys(names, YES_OR_NO)))
    with pytest.raises(AdaInferError, match=f"takes 1.. tokens, and at most 63 .*{DRAFTED}"):
        objects_of(schema, encoded(dict.fromkeys(names, True)), TOKENIZER)


def test_answers_of_which_none_is_an_object_are_an_error():
    with pytest.raises(AdaInferError, match=r"none of 2 answers .* such as 'sorry'"):
        objects_of(
            schema_of(OF_MOOD), [TOKENIZER.encode("sorry"), *encoded({"mood": 1})], TOKENIZER
        )


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "[]",
        "3",
        '{"mood": "fine"}',
        '{"mood": ["good"]}',
        '{"mood": "good"',
        '{"tone": "good"}',
    ],
)
def test_an_answer_that_is_no_object_of_the_schema_has_no_places(answer):
    assert schema_of(OF_MOOD).places(answer) is None


def test_values_of_another_type_are_other_values():
    schema = schema_of(an_object(n={"enum": [1, True, "1"]}))
    assert {schema.places(f'{{"n": {one}}}') for one in ("1", "true", '"1"')} == {(0,), (1,), (2,)}
    assert schema.places('{"n": 1.0}') is None
