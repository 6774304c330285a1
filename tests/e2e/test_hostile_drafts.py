"""Clients that send hostile grammars fill no memory, hold up nobody, and get vLLM's own errors."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from tests.byte_model import save_byte_model
from tests.e2e.drafted_engines import backend, drafting
from tests.e2e.drafted_traffic import Ask, an_object, counted_drafts, prompts, served
from tests.e2e.scripted import parts
from tests.triton_on_cpu import IS_V2
from vllm_adainfer.drafts.grammars import MOST_GRAMMARS

pytestmark = [pytest.mark.full, pytest.mark.skipif(IS_V2, reason="the scheduler is the same")]


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Any:
    model: Path = save_byte_model(tmp_path_factory.mktemp("bytes"))
    return drafting(model, **backend("xgrammar"))


def asking(structured: dict[str, Any], **more: Any) -> SamplingParams:
    given = {"temperature": 0, "max_tokens": 20, **more}
    return SamplingParams(structured_outputs=StructuredOutputsParams(**structured), **given)


def test_a_new_schema_with_each_request_is_never_drafted_and_hardly_remembered(engine):
    asks = [
        Ask(text, asking({"json": an_object(**{f"field{place}": {"type": "boolean"}})}))
        for place, text in enumerate(prompts(0, 8) * 20)
    ]
    with counted_drafts(engine) as counted:
        served(engine, asks)
    assert not counted.drafted
    assert not parts(engine)[2].drafts._grammars._known
    assert not parts(engine)[2].drafts._requests


def test_each_schema_sent_twice_is_remembered_up_to_a_limit(engine):
    asks = [
        Ask("abc", asking({"regex": f"{place} [a-z]+ the end"}), step=place)
        for place in range(2 * MOST_GRAMMARS)
        for _ in range(2)
    ]
    served(engine, asks)
    assert len(parts(engine)[2].drafts._grammars._known) == MOST_GRAMMARS


def test_answers_that_never_repeat_are_soon_left_alone(engine):
    asks = [
        Ask("abc", asking({"regex": "[a-z ]{60}"}, temperature=2.0, seed=place, max_tokens=60))
        for place in range(150)
    ]
    with counted_drafts(engine) as counted:
        found = served(engine, asks)
    written = sum(len(one.tokens[0]) for one in found)
    assert counted.drafted.total() < 0.1 * written


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "boolean"}
    for _ in range(depth):
        schema = an_object(a=schema)
    return schema


@pytest.mark.parametrize(
    "structured",
    [
        {"json": {"type": "object", "properties": 3}},
        {"json": '{"type": "obj'},
        {"regex": "(("},
        {"grammar": "root ::= nothing"},
        {"structural_tag": "{}"},
        {"json": nested(2000)},
    ],
    ids=["schema", "no JSON", "regex", "grammar", "tag", "nested"],
)
def test_bad_grammars_get_vllms_own_error_and_the_next_request_is_served(engine, structured):
    with pytest.raises(VLLMValidationError):  # a 400 of the server
        served(engine, [Ask("abc", asking(structured))])
    [got] = served(engine, [Ask("abc", asking({"choice": ["yes", "no"]}))])
    assert got.texts[0] in ("yes", "no")


@pytest.mark.parametrize("characters", [1_000, 1_000_000])
def test_a_large_schema_takes_the_scheduler_a_few_milliseconds(engine, characters):
    """vLLM parses, checks and compiles it, which takes it far longer."""
    large = json.dumps({"enum": ["x" * 1000 + str(one) for one in range(characters // 1000)]})
    drafts = parts(engine)[2].drafts
    taken = []
    for _ in range(5):
        start = time.process_time()
        drafts._grammars.arrived("", "JSON", large)
        taken.append(time.process_time() - start)
    assert min(taken) < 0.05
