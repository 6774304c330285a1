"""Evaluation of policies for objects: what is asked, what is compared, and what is reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.byte_model import byte_tokenizer
from tests.objects import BAD, FAIR, FAIR_SEEN, GOOD, GOOD_SEEN, SCHEMA, object_config, two_fields
from tests.tiny import LAYERS
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.outputs import NO_OBJECT
from vllm_adainfer.artifact.requested import Output
from vllm_adainfer.engine.admission.requested_output import requested_output
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.data.served_schema import (
    in_words,
    served_schema,
)
from vllm_adainfer.offline.evaluation import changed
from vllm_adainfer.offline.evaluation.prompts import load_examples
from vllm_adainfer.offline.evaluation.report import build_report
from vllm_adainfer.offline.evaluation.requests import engine_settings, most_tokens, request_params
from vllm_adainfer.offline.evaluation.run import NEVER_EXIT, Run
from vllm_adainfer.offline.facts.document import as_text
from vllm_adainfer.offline.reports.evaluation_facts import evaluation_facts
from vllm_adainfer.offline.reports.views import View

TEXT = json.dumps(SCHEMA)
OTHER = json.dumps({**SCHEMA, "properties": {**SCHEMA["properties"], "seen": {"const": True}}})
OURS = 0.05


def test_answers_are_compared_by_their_values():
    objects = two_fields()
    same = '{"mood": "good", "seen": false}', '{ "mood":"good",\n"seen":false }'
    assert [objects.code_of(text) for text in same] == [GOOD, GOOD]
    assert objects.code_of('{"mood": "fair", "seen": true}') == FAIR_SEEN
    assert in_words(objects, FAIR_SEEN) == 'mood="fair", seen=true'


@pytest.mark.parametrize(
    "answer", ['{"mood": "good", "se', '{"mood": "great", "seen": true}', '{"mood": "good"}', "7"]
)
def test_an_answer_that_is_no_such_object_is_none_of_them(answer):
    assert two_fields().code_of(answer) == NO_OBJECT
    assert in_words(two_fields(), NO_OBJECT) == "no object of the schema"


def test_an_evaluation_asks_for_the_object_with_room_for_white_space(tiny_model):
    config = object_config(tiny_model)
    params: Any = request_params(config, None, {"adainfer_epsilon": OURS}, schema=TEXT)
    assert params.structured_outputs.json == TEXT
    assert params.temperature == 0
    assert params.max_tokens == most_tokens(config, 1) > 2 * two_fields().longest


@pytest.mark.parametrize(("temperature", "promised"), [(0, True), (0.7, False)])
def test_the_policy_serves_what_is_asked_if_it_is_greedy(tiny_model, temperature, promised):
    """An early object is the best one, also where a server lets sampled answers be early."""
    config = object_config(tiny_model)
    params: Any = request_params(config, None, None, schema=TEXT)
    params._eos_token_id, params.temperature = 2, temperature
    asked = requested_output(params, "raw_logprobs", any_temperature=True)
    assert asked is not None
    assert asked.is_promised_by(config) is promised


def test_the_schema_is_that_of_a_file_or_of_the_calibration(tmp_path):
    objects, file = two_fields(), tmp_path / "schema.json"
    assert served_schema(objects, {"schema": TEXT}) == TEXT
    titled = json.dumps({**SCHEMA, "title": "A review"}, indent=2)
    file.write_text(titled)
    assert served_schema(objects, {}, file) == titled
    file.write_text(OTHER)
    with pytest.raises(AdaInferError, match=r"schema\.json is not the one.*decides mood, seen"):
        served_schema(objects, {"schema": TEXT}, file)
    with pytest.raises(AdaInferError, match=r"no schema in its calibration\.json"):
        served_schema(objects, {})


@pytest.fixture
def read(tiny_model, tmp_path) -> Any:
    """The examples of some rows, for a policy for objects."""
    config, tokenizer = object_config(tiny_model), byte_tokenizer()
    hf_config = SimpleNamespace(vocab_size=len(tokenizer), architectures=["LlamaForCausalLM"])
    model: Any = SimpleNamespace(tokenizer=tokenizer, hf_config=hf_config)

    def examples(rows: list[dict[str, Any]], template: str | None = None) -> list[Example]:
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_examples(data, template, None, "label", (), config, model, 99, TEXT)

    return examples


def request(schema: str) -> dict[str, Any]:
    body = {"model": "m", "prompt": "So so.", "structured_outputs": {"json": json.loads(schema)}}
    return {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body}


def test_requests_with_another_schema_are_left_out(read):
    titled = json.dumps({**SCHEMA, "title": "A review"})
    found = read([request(OTHER), request(TEXT), request(titled)])
    assert [json.loads(one.schema) for one in found] == [SCHEMA, json.loads(titled)]
    with pytest.raises(AdaInferError, match=r"no request of .* the schema of the artifact"):
        read([request(OTHER)])


def test_rows_ask_for_the_object_of_the_artifact_whatever_their_labels_are(read):
    found = read([{"text": "Fine.", "label": "good"}], "{text}")
    assert [one.schema for one in found] == [TEXT]


def run(codes: list[int], exits: dict[int, int], texts: list[str]) -> Run:
    written = [[*text.encode()] for text in texts]
    return Run(1.0, [[one] for one in codes], 40, 60, exit_histogram=exits, written=written)


@pytest.fixture
def report(tiny_model) -> dict[str, Any]:
    """Of four objects, one changes in one field, one in its white space, and one has no end."""
    full = run([BAD, FAIR, GOOD_SEEN, NO_OBJECT], {LAYERS: 20}, ["a", "b", "c", "d"])
    early = run([BAD, GOOD, GOOD_SEEN, NO_OBJECT], {2: 2, LAYERS: 10}, ["a ", "x", "c", "d"])
    ours = {NEVER_EXIT: full, 0.02: full, OURS: early}
    examples = [Example(f"line {number}", "", [1], None) for number in range(4)]
    config = object_config(tiny_model)
    return build_report(
        "policy", Path("data.jsonl"), config, examples, lambda _: None, [(full, ours)]
    )


def test_the_bound_is_about_values_and_texts_are_reported_beside(report):
    assert (report["disagreement"], report["text_differs"]) == (0.25, 0.5)
    assert {one["field"]: one["differs"] for one in report["by_field"]} == {"mood": 0.25, "seen": 0}
    strict = report["levels"][0]
    assert (strict["disagreement"], strict["text_differs"]) == (0, 0)


def test_each_value_has_its_recall_and_precision(report):
    rows = {row["label"]: row for row in report["by_label"]}
    assert set(rows) == {
        *map('mood="{}"'.format, ("bad", "fair", "good")),
        "seen=false",
        "seen=true",
    }
    good = rows['mood="good"']
    assert (good["full_depth"], good["answered"]) == (1, 2)
    assert (good["recall"], good["precision"]) == (1, 0.5)
    assert rows["seen=false"]["full_depth"] == 2  # the answer without an end has no value


def test_objects_that_are_not_early_count_once_however_many_tokens_they_have(report):
    assert report["adainfer"]["exit_histogram"] == {"2": 0.5, str(LAYERS): 0.5}
    assert report["stock"]["tokens_per_second"] == 4 + 4  # prompts and what was written


def test_a_table_shows_the_fields_and_says_what_is_bounded(report):
    lines = as_text(evaluation_facts(report)).splitlines()
    assert [line.split()[:2] for line in lines if line.startswith(("mood  ", "seen  "))] == [
        ["mood", "25.0%"],
        ["seen", "0.0%"],
    ]
    assert any(line.startswith("Never exit: drafts alone, in segments") for line in lines)
    [said] = [line for line in lines if "any field differs" in line]
    assert "differ in 50.0%" in said


PROMISES = [
    {"kind": "tolerance", "tolerance": 0.1},
    {"kind": "gates", "gates": [{"label": "seen=true", "probability": 0.5}]},
]


def promising(tiny_model: Path, promise: dict[str, Any]) -> ArtifactConfig:
    features = ("gate_distance", "gate_margin")
    if promise["kind"] == "tolerance":
        features = ("top_logit", "gap", "mass_logit")
    return object_config(tiny_model, promise=promise, features=features)


@pytest.mark.parametrize("promise", PROMISES)
def test_log_probabilities_are_asked_for_where_they_are_promised(tiny_model, promise):
    config = promising(tiny_model, promise)
    params: Any = request_params(config, None, {"adainfer_epsilon": OURS}, schema=TEXT)
    params._eos_token_id = 2
    asked = requested_output(params, "raw_logprobs")
    assert asked == Output.of_config(config)
    assert asked.is_promised_by(config)
    assert engine_settings(config)["max_logprobs"] == params.logprobs >= 3


VALUES = [[0.7, 0.2, 0.1, 0.6, 0.4], [0.1, 0.5, 0.4, 0.6, 0.4], [0.1, 0.1, 0.8, 0.2, 0.8]]
# The second moves too far in one field, the third stays on its side in the other and moves less.
MOVED = [[0.7, 0.2, 0.1, 0.6, 0.4], [0.3, 0.4, 0.3, 0.6, 0.4], [0.1, 0.1, 0.8, 0.28, 0.72]]
CROSSED = [[0.7, 0.2, 0.1, 0.45, 0.55], *MOVED[1:]]


def with_values(one: Run, values: list[list[float]]) -> Run:
    return replace(one, logprobs=np.log(np.array(values, dtype=np.float32)))


def compared(config: ArtifactConfig, values: list[list[float]], label: str | None) -> Any:
    """Of three objects, none differs: only probabilities do."""
    answers = run([BAD, FAIR, GOOD_SEEN], {LAYERS: 20}, ["a", "b", "c"])
    full, early = with_values(answers, VALUES), with_values(answers, values)
    ours = {NEVER_EXIT: full, 0.02: full, OURS: early}
    examples = [Example(f"line {number}", "", [1], label) for number in range(3)]
    return build_report(
        "policy", Path("data.jsonl"), config, examples, lambda _: None, [(full, ours)]
    )


@pytest.mark.parametrize(
    ("promise", "values", "wrong"),
    [
        (PROMISES[0], VALUES, 0),
        (PROMISES[0], MOVED, 1 / 3),
        (PROMISES[1], MOVED, 0),
        (PROMISES[1], CROSSED, 1 / 3),
    ],
)
def test_what_is_promised_of_probabilities_is_compared_answer_by_answer(
    tiny_model, promise, values, wrong
):
    report = compared(promising(tiny_model, promise), values, None)
    section = "probabilities" if promise["kind"] == "tolerance" else "gates"
    assert report["disagreement"] == 0
    assert [row["wrong"] for row in report[section]["levels"]] == [0, pytest.approx(wrong)]
    assert as_text(evaluation_facts(report))


def test_each_field_has_its_moves_and_its_calibration_error(tiny_model):
    """Right is a good mood, which is likeliest once, and what was seen."""
    label = '{"mood": "good", "seen": true}'
    config = promising(tiny_model, PROMISES[0])
    mood, seen = compared(config, MOVED, label)["by_field"]
    assert (mood["move_mean"], mood["move_max"]) == pytest.approx((0.2 / 3, 0.2))
    assert (seen["move_mean"], seen["move_max"]) == pytest.approx((0.08 / 3, 0.08))
    assert mood["ece"] == pytest.approx((0.7 + 0.4 + 0.2) / 3)
    assert seen["ece"] == pytest.approx((0.6 + 0.6 + 0.28) / 3)
    without = compared(config, MOVED, None)
    assert [row["ece"] for row in without["by_field"]] == [None, None]
    lines = as_text(evaluation_facts(without)).splitlines()
    [said] = [line.split() for line in lines if line.startswith("mood  ")]
    assert said[-3:] == ["0.067", "0.200", "-"]


def test_a_changed_object_is_shown_as_both_were_written_with_what_the_policy_saw(
    monkeypatch, tiny_model
):
    """Of an answer that was cut short there is no view."""
    config = object_config(tiny_model)
    one_level = config.model_copy(update={"levels": config.levels[1:]})
    view = View(2, 'mood="good", seen=false', 0.9, 0.8, least_sure="seen")
    monkeypatch.setattr(changed, "load_artifact", lambda _: SimpleNamespace(config=config))
    monkeypatch.setattr(changed, "decided_by", lambda artifact, *_: (artifact, 0, OURS))
    monkeypatch.setattr(changed, "views_of_prompts", lambda *asked: [[view]] * len(asked[-1]))
    full, early = run([BAD, FAIR, NO_OBJECT], {}, []), run([BAD, GOOD, GOOD], {}, [])
    examples = [Example(f"line {number}", "", [1], None) for number in range(3)]
    model: Any = SimpleNamespace(tokenizer=byte_tokenizer())
    runs = {NEVER_EXIT: full, OURS: early}
    shown, _ = changed.changed_prompts(model, "policy", one_level, examples, runs, 1)
    assert [(row["place"], row["full"], row["early"], row["views"]) for row in shown] == [
        ("line 1", 'mood="fair", seen=false', 'mood="good", seen=false', [view]),
        ("line 2", "no object of the schema", 'mood="good", seen=false', ()),
    ]
