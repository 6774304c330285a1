"""Of which kind a request is, whatever a client sends."""

from __future__ import annotations

import json
from typing import Any

import pytest
from vllm import PoolingParams, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

from tests.objects import SCHEMA
from vllm_adainfer.artifact.fields import MOST_ANSWERS, MOST_CHOICE_CHARACTERS
from vllm_adainfer.auto.kinds import Kind
from vllm_adainfer.drafts.schemas import LONGEST_PATH, LONGEST_SCHEMA, digest_of
from vllm_adainfer.engine.admission.arrival import kind_of
from vllm_adainfer.engine.admission.requested_output import requested_fields

LORA = LoRARequest("mood", 1, "/nowhere")


def params_of(choice: list[str] | None = None, json: Any = None, **given: Any) -> SamplingParams:
    if json is not None:
        given["structured_outputs"] = StructuredOutputsParams(json=json)
    if choice is not None:
        given["structured_outputs"] = StructuredOutputsParams(choice=choice)
    params = SamplingParams(**{"temperature": 0, "max_tokens": 1, **given})
    params._eos_token_id = 2  # as vLLM's frontend sets it
    return params


def kind(params: Any, mode: str = "raw_logprobs", **given: Any) -> Kind | None:
    return kind_of(params, given.get("adapter"), given.get("resumable", False), mode)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"allowed_token_ids": [11, 7]}, Kind("label", (7, 11))),
        ({"allowed_token_ids": [11, 7, 11]}, Kind("label", (7, 11))),
        ({"logprob_token_ids": [11, 7], "logprobs": 2}, Kind("probabilities", (7, 11))),
        ({"logprob_token_ids": [7], "logprobs": 1, "temperature": 1}, Kind("probabilities", (7,))),
        ({"choice": ["yes", "no"]}, Kind("choice", choices=("no", "yes"))),
        ({"choice": ["yes", "no"], "max_tokens": 9}, Kind("choice", choices=("no", "yes"))),
    ],
)
def test_a_kind_is_what_is_read_in_any_order_under_an_adapter(given, expected):
    assert kind(params_of(**given)) == expected
    named = Kind(expected.reads, expected.labels, expected.choices, "mood")
    assert kind(params_of(**given), adapter=LORA) == named


def test_probabilities_among_labels_need_the_mode_that_returns_them():
    params = params_of(allowed_token_ids=[7, 11], logprobs=2)
    assert kind(params, "processed_logprobs") == Kind("probabilities", (7, 11))
    assert kind(params) is None


def test_choices_that_vllm_has_made_a_grammar_of_are_the_same_kind():
    params = params_of(choice=["yes", "no"])
    validate_xgrammar_grammar(params)
    assert kind(params) == Kind("choice", choices=("no", "yes"))


def test_objects_are_of_one_kind_if_their_schemas_allow_the_same_answers():
    titled = {**SCHEMA, "title": "A review"}
    found = [kind(params_of(json=one, max_tokens=99)) for one in (SCHEMA, titled)]
    digest = digest_of(json.dumps(SCHEMA))
    assert found == [Kind("object", schema=digest)] * 2
    assert kind(params_of(json=SCHEMA), adapter=LORA) == Kind("object", (), (), "mood", digest)
    other = {**SCHEMA, "properties": {"seen": {"type": "boolean"}}}
    assert kind(params_of(json=other)) not in (found[0], None)


def test_an_object_is_counted_with_names_of_its_fields_and_the_server_makes_no_policy_for_it():
    named = "n" * 99
    fields = {**SCHEMA["properties"], "reason": {"type": "string"}, named: {"const": 1}}
    params = params_of(json={"type": "object", "properties": fields})
    assert requested_fields(params) == ("mood", "seen", named[:LONGEST_PATH])
    found = Kind("object", schema="digest", paths=requested_fields(params))
    assert Kind.of_dict(json.loads(json.dumps(found.as_dict()))).paths == found.paths
    assert "no policy by themselves yet" in str(found.why_full_depth(0.1))


def test_kinds_have_the_names_of_before_there_were_objects():
    assert Kind("label", (7, 11)).name(b"salt") == "kind-cc57fff841a0"
    assert Kind("object", schema="a").name(b"salt") != Kind("object", schema="b").name(b"salt")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"max_tokens": 20},
        {"logprobs": 5},
        {"allowed_token_ids": [7, 11], "max_tokens": 2},
        {"allowed_token_ids": [7, 11], "temperature": 0.5},
        {"choice": ["yes", "no"], "temperature": 0.5},
        {"choice": ["yes", "no"], "stop": ["o"]},
        {"json": SCHEMA, "temperature": 0.5},
        {"json": SCHEMA, "stop": ["o"]},
        {"json": {"title": "x" * LONGEST_SCHEMA}},
        {"allowed_token_ids": [7, 11], "logit_bias": {7: 1.0}},
        {"allowed_token_ids": [7, 11], "prompt_logprobs": 1},
        {"allowed_token_ids": list(range(5000))},
        {"choice": ["x" * 20_000]},
        {"choice": [str(number) for number in range(300)]},
    ],
    ids=str,
)
def test_what_reads_no_answer_of_a_fixed_set_has_no_kind(given):
    assert kind(params_of(**given)) is None


def test_the_scores_of_a_classifier_are_a_kind_and_raw_ones_or_embeddings_are_none():
    assert kind(PoolingParams(task="classify")) == Kind("scores")
    assert kind(PoolingParams(task="classify", use_activation=False)) is None
    assert kind(PoolingParams(task="embed")) is None


def test_prompts_that_are_still_sent_have_no_kind():
    assert kind(None) is None
    assert kind(params_of(allowed_token_ids=[7, 11]), resumable=True) is None


def test_hostile_texts_are_a_kind_with_a_name_that_can_be_written():
    texts = ["\x00", "\x1b[2J", "\u202e", "\ud800", '"; rm', "<script>"]
    found = kind(params_of(choice=texts))
    assert found is not None
    assert found.name(b"salt").removeprefix("kind-").isalnum()
    assert Kind.of_dict(json.loads(json.dumps(found.as_dict()))) == found


def unread(*_: Any) -> Any:
    raise AssertionError("what may be of any size was read")


class UnreadIds(list[int]):
    __iter__ = __getitem__ = __contains__ = __eq__ = unread


class UnreadText(str):
    __iter__ = __getitem__ = __contains__ = __eq__ = __hash__ = encode = unread


@pytest.mark.parametrize("name", ["allowed_token_ids", "logprob_token_ids"])
def test_more_labels_than_a_policy_may_have_are_not_even_read(name):
    params = params_of(**{name: [1, 2]}, logprobs=2)
    setattr(params, name, UnreadIds(range(MOST_ANSWERS + 1)))
    assert kind(params) is None


def test_a_text_longer_than_choices_may_be_is_not_even_read():
    params = params_of(choice=["yes", "no"])
    params.structured_outputs.choice = ["no", UnreadText("x" * MOST_CHOICE_CHARACTERS)]
    assert kind(params) is None
