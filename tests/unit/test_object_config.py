"""What an artifact may say of objects, and what follows from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from tests.calibrations import OBJECTS
from tests.tiny import tiny_config
from tests.unit.test_pooled_policy import POOLED, QUESTIONS
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.fields import MOST_ANSWERS, LabelBound, LabelRisk, Level
from vllm_adainfer.artifact.outputs import DecidedField, Objects, Value
from vllm_adainfer.artifact.requested import Form, Output
from vllm_adainfer.artifact.words import outputs_in_words, probabilities_in_words
from vllm_adainfer.promise.links import ByField


def field(path: str, *values: str, guess: int = 0, token: int = 5) -> DecidedField:
    found = tuple(Value(text=one, written=(token, place)) for place, one in enumerate(values))
    return DecidedField(path=path, values=found, guess=guess)


def objects(*fields: DecidedField) -> Objects:
    return Objects(schema_digest="d", start=(1,), fields=fields)


def config_with(model: Any, output: Any = OBJECTS) -> ArtifactConfig:
    return ArtifactConfig.model_validate({**dict(tiny_config(model)), "output": output})


def test_objects_are_written_of_the_parts_of_their_values():
    assert OBJECTS.written([0, 0, 0]) == (1, 2, 7, 4, 12, 13, 4, 20, 21, 5)
    assert OBJECTS.written([1, 0, 1]) == (1, 2, 9, 9, 4, 12, 13, 4, 20, 5)
    assert OBJECTS.commonest == (2, 0, 1)
    assert OBJECTS.written([2, 0, 1]) == (1, 2, 3, 4, 12, 13, 4, 20, 5)


def test_a_field_is_read_at_the_row_that_decides_its_first_token():
    """Row 0 is the last one of the prompt, and decides the first token of the guess."""
    assert OBJECTS.rows([2, 0, 1]) == (2, 4, 7)
    assert OBJECTS.rows([1, 0, 1]) == (2, 5, 8)
    places = OBJECTS.commonest
    firsts = [
        own.values[place].written[0] for own, place in zip(OBJECTS.fields, places, strict=True)
    ]
    assert [OBJECTS.written(places)[row] for row in OBJECTS.rows(places)] == firsts


def test_the_longest_object_has_the_longest_part_of_each_field():
    assert OBJECTS.longest == 2 + 3 + 3 + 3


def test_each_value_is_a_label_that_promises_name():
    names = [label.name for label in OBJECTS.labels]
    assert names == [
        'mood="bad"',
        'mood="fine"',
        'mood="good"',
        'kind="film"',
        "part.seen=false",
        "part.seen=true",
    ]
    assert [label.token_id for label in OBJECTS.labels] == list(range(6))
    assert [OBJECTS.at(name) for name in names] == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]
    assert isinstance(OBJECTS.link, ByField)
    assert OBJECTS.link.sizes == (3, 1, 2)


def test_a_config_keeps_its_objects_and_reads_answers_by_field(tiny_model):
    config = config_with(tiny_model)
    again = ArtifactConfig.model_validate_json(config.model_dump_json())
    assert again == config
    assert again.objects == OBJECTS
    assert isinstance(again.promise.link, ByField)
    assert outputs_in_words(again) == "a JSON object that decides mood, kind, part.seen"


def test_requests_for_the_same_schema_alone_are_promised(tiny_model):
    config = config_with(tiny_model)
    asked = Output(Form.OBJECT, schema=OBJECTS.schema_digest)
    assert Output.of_config(config) == asked
    assert asked.is_promised_by(config)
    assert not Output(Form.OBJECT, schema="1" * 64).is_promised_by(config)
    assert not Output(Form.TOKEN).is_promised_by(config)
    assert not Output(Form.TOKEN, frozenset(config.label_ids)).is_promised_by(config)
    assert not asked.is_promised_by(tiny_config(tiny_model))


def test_a_sampled_object_is_not_promised(tiny_model):
    """An early one is the best."""
    sampled = Output(Form.OBJECT, schema=OBJECTS.schema_digest, is_greedy=False)
    assert not sampled.is_promised_by(config_with(tiny_model))


NEEDS = "objects need a label-head, max_tokens = 1 and a promise about changed answers or each valu"
RISK = LabelRisk(rows=100, risk=0.0, bound=0.04)
RISKY = Level(epsilon=0.05, disagreement=0, risk=0, bound=0.04, layers_saved=0, label_risks=(RISK,))
BAD = LabelBound(kind="recall", label="mood=bad", epsilon=0.05)


def about(promise: dict[str, Any]) -> dict[str, Any]:
    """Changes to a config for a promise about probabilities."""
    features = ("gate_distance", "gate_margin")
    if promise["kind"] == "tolerance":
        features = ("top_logit", "gap", "mass_logit")
    return {"promise": promise, "features": features}


MANY = [f'"{place}"' for place in range(200)]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"probe": "lens"}, NEEDS),
        ({"max_tokens": 2}, NEEDS),
        ({**POOLED, "branches": (2,)}, NEEDS),
        ({"promise": {"kind": "accuracy"}}, NEEDS),
        (about({"kind": "gates", "gates": [{"probability": 0.8}]}), NEEDS),
        (about({"kind": "tolerance", "tolerance": 0.1, "label_mass": True}), NEEDS),
        (
            {
                "by_question": True,
                "questions": [{**dict(one), "certified": (0.05,)} for one in QUESTIONS],
            },
            NEEDS,
        ),
        ({"output": objects(field("a", "1", "2", guess=2))}, "the guess of each field must be one"),
        ({"output": objects(field("a", "1", "2", token=1 << 20))}, "below vocab_size"),
        ({"output": objects(field("a", "1"), field("b", "2"))}, "one field of an object must have"),
        ({"output": objects(*(field(f"f{n}", "1", "2") for n in range(63)))}, "objects have at mo"),
        ({"output": objects(*(field(f"f{n}", *MANY) for n in range(6)))}, "objects have at most"),
        ({"output": objects(field("a", "1", "1"))}, "each value of an object needs a path and a t"),
        ({"output": objects(field("a", "1", "2"), field("a", "1"))}, "each value of an object nee"),
        ({"label_bounds": (BAD,), "levels": (RISKY,)}, "must name labels of the policy"),
        (
            {"never_early": tuple(label.name for label in OBJECTS.labels)},
            "some label must be allowed to leave early",
        ),
        ({"output": {**OBJECTS.model_dump(), "fields": []}}, "at least 1 item"),
        (
            {
                "output": {
                    **OBJECTS.model_dump(),
                    "fields": [field("a", "1", "2").model_dump()] * 65,
                }
            },
            "at most 64 items",
        ),
    ],
)
def test_a_config_whose_objects_do_not_go_with_it_is_refused(tiny_model, changes, sentence):
    config = config_with(tiny_model)
    with pytest.raises(ValidationError, match=sentence):
        ArtifactConfig.model_validate({**dict(config), **changes})


@pytest.mark.parametrize(
    ("promise", "wrong"),
    [
        (
            {"kind": "tolerance", "tolerance": 0.1},
            "another object than full depth's, or a value's probability that moves by more than",
        ),
        (
            {"kind": "gates", "gates": [{"label": "part.seen=true", "probability": 0.8}]},
            "another object than full depth's or the probability of part.seen=true among its "
            "field's values on the other side of 0.8 than at full depth",
        ),
    ],
)
def test_the_probabilities_of_values_may_be_promised_beside_the_object(tiny_model, promise, wrong):
    config = ArtifactConfig.model_validate({**dict(config_with(tiny_model)), **about(promise)})
    assert isinstance(config.promise.link, ByField)
    assert config.promise.words().startswith(wrong)
    assert config.promise.with_mass() is None
    assert probabilities_in_words(config).startswith("requests with logprobs may exit, too")
    plain, asked = (
        Output(form, schema=OBJECTS.schema_digest)
        for form in (Form.OBJECT, Form.OBJECT_PROBABILITIES)
    )
    assert plain.is_promised_by(config)
    assert asked.is_promised_by(config)
    assert Output.of_config(config) == asked
    assert not asked.is_promised_by(config_with(tiny_model))
    assert not replace(asked, is_greedy=False).is_promised_by(config)


def test_the_largest_objects_are_taken(tiny_model):
    of_two = objects(*(field(f"f{n}", "1", "2") for n in range(62)))
    assert config_with(tiny_model, of_two).objects == of_two
    wide = objects(*(field(f"f{n}", *MANY[: MOST_ANSWERS // 8]) for n in range(8)))
    assert config_with(tiny_model, wide).objects == wide
