"""Queries with documents, rendered as vLLM renders them for `/score` and `/rerank`."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from tests.tiny import word_tokenizer
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import Row
from vllm_adainfer.offline.calibration.data.pairs import Pairs, are_pairs, read_pairs
from vllm_adainfer.offline.calibration.data.read_examples import read_examples

TEMPLATE = "Review : {{ messages[0].content }} Sentiment : {{ messages[1].content }}"
GOOD = {"query": "good", "documents": ["bad", "positive negative"], "labels": ["no", "yes"]}


def read(*fields: dict[str, Any], template: str | None = None, longest: int = 64) -> Any:
    rows = [Row(f"line {number}", one) for number, one in enumerate(fields, start=1)]
    return read_pairs(rows, Pairs.of(word_tokenizer(), LlamaConfig(), template), longest)


def test_each_document_is_a_prompt_with_its_query_and_those_of_a_query_are_a_group():
    first, second, third = read(GOOD, {"query": "bad", "documents": ["good"]})
    tokenizer = word_tokenizer()
    assert first.token_ids == tokenizer.encode("good bad")
    assert second.token_ids == tokenizer.encode("good positive negative")
    assert [one.label for one in (first, second, third)] == ["no", "yes", None]
    assert first.group == second.group != third.group


def test_a_chat_template_joins_them(tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    tokenizer = word_tokenizer()
    for template in (TEMPLATE, str(file)):
        first, _ = read(GOOD, template=template)
        assert first.text == "Review : good Sentiment : bad"
        assert first.token_ids == tokenizer.encode(first.text)


@pytest.mark.parametrize(("written", "label"), [(1, "yes"), (0, "no"), (True, "yes"), ("c2", "c2")])
def test_labels_may_be_written_as_numbers(written, label):
    [example] = read({"query": "good", "documents": ["bad"], "labels": [written]})
    assert example.label == label


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**GOOD, "query": ""}, 'line 1: "query" must be a text'),
        ({**GOOD, "query": ["good"]}, 'line 1: "query" must be a text'),
        ({**GOOD, "documents": []}, '"documents" must be a list of texts'),
        ({**GOOD, "documents": "bad"}, '"documents" must be a list of texts'),
        ({**GOOD, "documents": ["bad", 3]}, '"documents" must be a list of texts'),
        ({**GOOD, "labels": ["yes"]}, "one entry for each of 2 documents"),
        ({**GOOD, "labels": "yes"}, "one entry for each of 2 documents"),
        ({**GOOD, "documents": ["bad " * 80], "labels": None}, "the model takes 64: shorten"),
    ],
)
def test_malformed_rows_are_named(fields, message):
    with pytest.raises(AdaInferError, match=message):
        read(fields)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no pairs') }}", "line 1: --chat-template rejects the pair: no pairs"),
        ("{% for", "line 1: --chat-template rejects the pair"),
        ("missing.jinja", "cannot read --chat-template missing.jinja"),
    ],
)
def test_a_template_that_does_not_work_is_named(template, message):
    with pytest.raises(AdaInferError, match=message):
        read(GOOD, template=template)


def test_rows_of_two_forms_are_refused():
    rows = [Row("line 1", GOOD), Row("line 2", {"prompt": "good"})]
    with pytest.raises(AdaInferError, match='line 2 has no "query" with "documents"'):
        are_pairs(rows)


@pytest.mark.parametrize(
    ("fields", "templates", "message"),
    [
        (GOOD, ("{query}", None), "drop --template"),
        ({"prompt": "good"}, (None, TEMPLATE), "--chat-template joins queries with documents"),
    ],
)
def test_a_template_for_another_form_is_refused(fields, templates, message):
    template, chat_template = templates
    with pytest.raises(AdaInferError, match=message):
        read_examples(
            [Row("line 1", fields)],
            word_tokenizer(),
            LlamaConfig(architectures=["LlamaForSequenceClassification"]),
            template,
            chat_template,
            "label",
            64,
        )
