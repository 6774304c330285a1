"""Batch lines and captured requests of `/rerank`, `/score` and `/classify` as calibration data."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from tests.tiny import word_tokenizer
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import Example, Row
from vllm_adainfer.offline.calibration.data.read_examples import read_examples

CLASSIFIER = LlamaConfig(vocab_size=2000, architectures=["LlamaForSequenceClassification"])
TEMPLATE = "Review : {{ messages[0].content }} {{ instruction }} : {{ messages[1].content }}"
PAIRS = {"query": "good", "documents": ["bad", "positive negative"]}


def read(*lines: dict[str, Any], chat_template: str | None = None, longest: int = 64) -> Any:
    rows = [Row(f"line {number}", one) for number, one in enumerate(lines, start=1)]
    return read_examples(rows, word_tokenizer(), CLASSIFIER, None, chat_template, "label", longest)


def line(url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": "1", "method": "POST", "url": url, "body": body}


def told(examples: list[Example]) -> list[tuple[str, list[int]]]:
    return [(one.text, one.token_ids) for one in examples]


@pytest.mark.parametrize(
    "request_line",
    [
        *(line(url, **PAIRS) for url in ("/rerank", "/v1/rerank", "/v2/rerank")),
        line("/score", text_1="good", text_2=PAIRS["documents"]),
        line("/v1/score", queries=["good"], documents=PAIRS["documents"]),
        line("/score", queries="good", items=PAIRS["documents"]),
        line("/score", data_1=["good", "good"], data_2=PAIRS["documents"]),
    ],
    ids=lambda one: " ".join([one["url"], *one["body"]]),
)
def test_a_request_for_scores_is_a_query_with_its_documents(request_line):
    found, pairs = read(request_line), read(PAIRS)
    assert told(found) == told(pairs)
    assert found[0].group == found[1].group


def test_a_template_gets_the_instruction_as_on_the_server():
    request_line = line("/rerank", **PAIRS, instruction="Sentiment")
    found = read(request_line, chat_template=TEMPLATE)
    assert found[0].text == "Review : good Sentiment : bad"


@pytest.mark.parametrize(
    ("prompts", "texts"),
    [
        ("good bad", ["good bad"]),
        (["good", "bad"], ["good", "bad"]),
        ("ids", ["good bad"]),
        (["ids"], ["good bad"]),
    ],
)
def test_a_request_to_classify_has_one_prompt_or_several(prompts, texts):
    tokenizer = word_tokenizer()
    ids = tokenizer.encode("good bad")
    given = {"ids": ids}.get(prompts, prompts) if isinstance(prompts, str) else prompts
    given = [ids] if given == ["ids"] else given
    found = read(line("/classify", input=given))
    assert [one.token_ids for one in found] == [tokenizer.encode(text) for text in texts]


def test_what_was_captured_apart_stays_together():
    ids = word_tokenizer().encode("good bad")
    lines = [line("/classify", input=ids) | {"group": group} for group in ("a", "b", "a")]
    first, second, third = read(*lines)
    assert first.group == third.group != second.group


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (line("/v1/embeddings", input="good"), "/v1/embeddings: not an endpoint that returns"),
        (line("/rerank", **PAIRS, max_tokens_per_doc=3), "max_tokens_per_doc, which changes"),
        (line("/classify", input="good", use_activation=False), "raw scores, which runs at full"),
        (line("/rerank", query={"content": []}, documents=["bad"]), "not text alone"),
        (line("/rerank", query="good"), "vLLM would refuse it"),
        (line("/score", text_1=["good"] * 2, text_2=["bad"] * 3), "as many queries as documents"),
        (line("/score", text_1="good"), "vLLM would refuse it"),
        (line("/classify", input=[5, 2000]), "token ids that are not in the vocabulary"),
        (line("/classify", input="good " * 70), "a prompt that does not have 1 to 64 tokens"),
        (line("/classify", input=[]), "no line"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_what_cannot_exit_is_left_out_and_counted(bad, reason, caplog):
    with pytest.raises(AdaInferError, match="no line of line 1 can exit") as error:
        read(bad)
    if reason != "no line":
        assert reason in str(error.value)
    assert len(read(bad, line("/rerank", **PAIRS))) == 2


def test_requests_bring_their_prompts():
    row = Row("line 1", line("/rerank", **PAIRS))
    with pytest.raises(AdaInferError, match="bring their prompts: drop --template"):
        read_examples([row], word_tokenizer(), CLASSIFIER, "{query}", None, "label", 64)
