"""Lines of vLLM's batch files become prompts and labels, token for token as vLLM reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import word_tokenizer
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.batch_files import are_requests, read_requests
from vllm_adainfer.offline.calibration.data.examples import Example, Row, read_rows
from vllm_adainfer.offline.calibration.data.questions import SEEN
from vllm_adainfer.offline.calibration.options import CalibrationRequest
from vllm_adainfer.offline.calibration.prompts import load_prompts

READ = {"max_tokens": 1, "logprob_token_ids": [7, 9]}
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}Sentiment :"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = word_tokenizer()
    found.add_tokens(["yes", "no", "A", "B", "C"])
    found.chat_template = TEMPLATE
    return found


def line(url: str, body: dict[str, Any], **more: Any) -> Row:
    fields = {"custom_id": "1", "method": "POST", "url": url, "body": body, **more}
    return Row("requests.jsonl, line 1", fields)


def read(rows: list[Row], tokenizer: Any) -> list[Example]:
    return read_requests(rows, tokenizer, len(tokenizer), 200)


@pytest.mark.parametrize(
    ("url", "body", "prompts"),
    [
        ("/v1/completions", {"prompt": "a film :"}, ["a film :"]),
        ("/v1/completions", {"prompt": ["a film :", "the plot :"]}, ["a film :", "the plot :"]),
        ("/v1/completions", {"prompt": "a film :", "allowed_token_ids": [9, 7]}, ["a film :"]),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a film"}]},
            ["a film Sentiment :"],
        ),
        (
            "/v1/chat/completions",
            {
                "messages": [
                    {"role": "system", "content": "the plot"},
                    {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]},
                ],
                "max_completion_tokens": 1,
            },
            ["the plot a b Sentiment :"],
        ),
        (
            "/generative_scoring",
            {"query": "the plot", "items": ["a film :", "it is"], "label_token_ids": [7, 9]},
            ["the plot a film :", "the plot it is"],
        ),
        (
            "/generative_scoring",
            {"query": [3, 4], "items": [[5], [6]], "label_token_ids": [7, 9], "item_first": True},
            ["5 3 4", "6 3 4"],
        ),
    ],
)
def test_a_request_becomes_the_prompts_that_vllm_makes_of_it(tokenizer, url, body, prompts):
    found = read([line(url, {**READ, **body})], tokenizer)
    wanted = [
        tokenizer.decode([int(token) for token in text.split()]) if text[0].isdigit() else text
        for text in prompts
    ]
    decoded = [tokenizer.decode(tokenizer.encode(text)) for text in wanted]
    assert [tokenizer.decode(one.token_ids) for one in found] == decoded
    assert {frozenset(one.labels or ()) for one in found} == {frozenset((7, 9))}


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/completions", {"prompt": ["a film :", "the plot :"]}),
        ("/generative_scoring", {"query": "a", "items": ["b", "c"], "label_token_ids": [7, 9]}),
        (
            "/v1/systemone",
            {
                "state": "warm",
                "questions": {name: {"type": "noul", "instructions": name} for name in "ab"},
            },
        ),
    ],
)
def test_the_prompts_of_a_line_are_a_group_and_so_are_lines_that_say_so(tokenizer, url, body):
    lines = [
        Row(f"requests.jsonl, line {number}", {"url": url, "body": {**READ, **body}, **more})
        for number, more in enumerate([{}, {}, {"group": "x"}, {"group": "x"}])
    ]
    groups = [example.group for example in read(lines, tokenizer)]
    assert groups[::2] == groups[1::2]
    alone, other, *together = groups[::2]
    assert len({alone, other, *together}) == 3
    assert together == ["x", "x"]


def test_questions_about_one_state_are_on_one_side_of_the_split(tiny_model, tmp_path):
    states = [[5 + number // 20, 7 + number % 20, 9] for number in range(300)]
    bodies = [
        {"query": state, "items": [[40], [41], [42]], "label_token_ids": [5, 6]} for state in states
    ]
    data = tmp_path / "requests.jsonl"
    rows = [{"url": "/generative_scoring", "body": body} for body in bodies]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = load_prompts(CalibrationRequest(str(tiny_model), data, tmp_path / "policy"))
    fitted, held_out = (
        {tuple(prompts.examples[place].token_ids[:3]) for place in half}
        for half in (prompts.split.fit, prompts.split.certify)
    )
    assert len(fitted) == len(held_out) == 150
    assert not fitted & held_out


def test_token_prompts_stay_as_they_are(tokenizer):
    [example] = read([line("/v1/completions", {**READ, "prompt": [5, 1, 5]})], tokenizer)
    assert example.token_ids == [5, 1, 5]


def test_a_decision_becomes_a_prompt_for_each_question(tokenizer):
    questions = {
        "good": {"type": "noul", "instructions": "a good film ?"},
        "kind": {"type": "choice", "criteria": {"warm": None, "clever": "it is"}},
    }
    row = line("/v1/systemone", {"state": {"film": "warm"}, "questions": questions})
    good, kind = read([row], tokenizer)
    assert good.text == (
        '{\n  "film": "warm"\n}\n\nQuestion: a good film ?\nyes\nno\n'
        "Answer with yes or no only. Sentiment :"
    )
    assert kind.text.endswith(
        "A: warm\nB: clever - it is\nAnswer with the letter of one option only. Sentiment :"
    )
    ids = tokenizer.convert_tokens_to_ids
    assert good.labels == (ids("yes"), ids("no"))
    assert kind.labels == (ids("A"), ids("B"))
    assert (good.question, kind.question) == ("good", "kind")


@pytest.mark.parametrize(
    ("url", "end"), [("/v1/completions", ""), ("/v1/chat/completions", " Sentiment :")]
)
def test_a_question_is_named_in_the_line_or_by_its_wording(tokenizer, url, end):
    rows = []
    for number in range(2 * SEEN):
        asked = f"{['a', 'good', 'plot'][number % 3]} film\n\nis it {['good', 'long'][number % 2]}"
        body = {"prompt": asked, "messages": [{"role": "user", "content": asked}]}
        rows.append(line(url, {**READ, **body}))
    rows.append(line(url, {**READ, **body}, question="mood"))
    *found, named = read(rows, tokenizer)
    assert {example.question for example in found} == {f"is it good{end}", f"is it long{end}"}
    assert (named.question, named.wording) == ("mood", found[-1].wording)


@pytest.mark.parametrize(("label", "found"), [(9, "9"), (8, None), ("good", None), ([9], None)])
def test_a_label_is_known_if_it_is_one_that_the_request_names(tokenizer, label, found):
    [example] = read([line("/v1/completions", {**READ, "prompt": "a"}, label=label)], tokenizer)
    assert example.label == found


OF_MOOD, OF_PLOT = ({"type": "object", "properties": {name: {}}} for name in ("mood", "plot"))
MESSAGES = [{"role": "user", "content": "a film"}]
TOOLS = [
    {"type": "function", "function": {"name": "sum", "parameters": OF_PLOT}},
    {"type": "function", "function": {"name": "mark", "parameters": OF_MOOD}},
]


def format_of(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


@pytest.mark.parametrize(
    "body",
    [
        format_of(OF_MOOD),
        {"structured_outputs": {"json": OF_MOOD}},
        {"structured_outputs": {"json": json.dumps(OF_MOOD)}},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "mark"}}},
        {**format_of(OF_MOOD), "structured_outputs": {"json": OF_PLOT}},
        {
            **format_of(OF_PLOT),
            "tools": TOOLS,
            "tool_choice": {"type": "function", "function": {"name": "mark"}},
        },
        {**format_of(OF_MOOD), "tools": TOOLS, "tool_choice": "auto", "max_tokens": 50},
    ],
    ids=["format", "outputs", "text", "tool", "format and outputs", "format and tool", "auto"],
)
def test_a_request_for_an_object_has_the_schema_that_vllm_takes(tokenizer, caplog, body):
    [chat] = read([line("/v1/chat/completions", {"messages": MESSAGES, **body})], tokenizer)
    assert chat.schema is not None
    assert json.loads(chat.schema) == OF_MOOD
    assert (chat.labels, chat.choices) == (None, None)
    says_how_to_serve = "VLLM_ENFORCE_STRICT_TOOL_CALLING=0" in caplog.text
    assert says_how_to_serve == isinstance(body.get("tool_choice"), dict)
    if "tools" not in body:
        [one] = read([line("/v1/completions", {"prompt": "a film :", **body})], tokenizer)
        assert one.schema == chat.schema


def test_a_format_of_plain_text_asks_for_nothing(tokenizer):
    body = {**READ, "prompt": "a film :", "response_format": {"type": "text"}}
    [example] = read([line("/v1/completions", body)], tokenizer)
    assert (example.labels, example.schema) == ((7, 9), None)


FINE = line("/v1/completions", {**READ, "prompt": "a film :"})
MESSAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]


@pytest.mark.parametrize(
    ("url", "body", "reason"),
    [
        ("/v1/embeddings", {"input": "a"}, "/v1/embeddings: not an endpoint that reads labels"),
        ("/v1/completions", {**READ, "max_tokens": 5, "prompt": "a"}, "more than one token"),
        ("/v1/completions", {"max_tokens": 1, "prompt": "a"}, "names no labels"),
        ("/v1/completions", {**READ, "logprob_token_ids": [3], "prompt": "a"}, "fewer than two"),
        ("/v1/completions", {**READ, "prompt": "a " * 300}, "1 to 200 tokens"),
        ("/v1/completions", READ, "vLLM would refuse it"),
        ("/v1/completions", {**READ, "prompt": 5}, "vLLM would refuse it"),
        ("/v1/completions", {**READ, "prompt": [1 << 40]}, "vLLM would refuse it"),
        ("/v1/completions", {**READ, "prompt": [5000]}, "not in the vocabulary"),
        ("/v1/completions", {**READ, "logprob_token_ids": [7, -1], "prompt": "a"}, "vocabulary"),
        ("/v1/completions", {**READ, "logprob_token_ids": [7, "x"], "prompt": "a"}, "vocabulary"),
        ("/v1/completions", {**READ, "logprob_token_ids": 7, "prompt": "a"}, "would refuse it"),
        ("/v1/completions", {**READ, "logit_bias": {"7": 1}, "prompt": "a"}, "full depth"),
        ("/v1/completions", {**READ, "repetition_penalty": 2, "prompt": "a"}, "full depth"),
        ("/v1/chat/completions", {**READ, "messages": []}, "would refuse it"),
        ("/v1/chat/completions", {**READ, "messages": "a film"}, "would refuse it"),
        ("/v1/chat/completions", {**READ, "messages": [{"content": ["a"]}]}, "would refuse it"),
        ("/v1/systemone", {"state": "a", "questions": ["q"]}, "would refuse it"),
        ("/v1/systemone", {"state": "a", "questions": {"q": "noul"}}, "would refuse it"),
        ("/v1/chat/completions", {**READ, "messages": MESSAGE}, "not text alone"),
        ("/v1/systemone", {"state": "a", "questions": {"q": {"type": "riddle"}}}, "refuse it"),
        ("/v1/systemone", {"state": "a", "questions": {}, "images": ["x"]}, "images"),
        (
            "/generative_scoring",
            {"query": "a", "items": ["b"], "label_token_ids": [1]},
            "fewer than two",
        ),
        (
            "/v1/completions",
            {"prompt": "a", **format_of(OF_MOOD), "logprobs": 1},
            "a request for an object and logprobs, which runs at full depth",
        ),
        (
            "/v1/completions",
            {"prompt": "a", "response_format": {"type": "json_object"}},
            "a request with a response_format other than json_schema",
        ),
        ("/v1/completions", {"prompt": "a", "response_format": "json"}, "would refuse it"),
        (
            "/v1/completions",
            {"prompt": "a", "response_format": {"type": "json_schema"}},
            "would refuse it",
        ),
        (
            "/v1/chat/completions",
            {
                "messages": MESSAGES,
                "tools": TOOLS,
                "tool_choice": {"type": "function", "function": {"name": "other"}},
            },
            "would refuse it",
        ),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "required"},
            "a request that must call any of its tools, and does not name one",
        ),
    ],
)
def test_a_line_that_cannot_exit_is_counted_and_named_and_the_others_are_read(
    tokenizer, caplog, url, body, reason
):
    assert len(read([FINE, line(url, body), FINE], tokenizer)) == 2
    [record] = caplog.records
    assert record.getMessage().startswith("1 of 3 lines were left out: ")
    assert reason in record.getMessage()
    with pytest.raises(AdaInferError, match=r"no line of requests\.jsonl can exit: 1 x"):
        read([line(url, body)], tokenizer)


def test_a_line_without_a_body_is_an_error(tokenizer):
    rows = [FINE, Row("requests.jsonl, line 2", {"text": "a film"})]
    with pytest.raises(AdaInferError, match=r"line 2 is not a request: it needs 'url' and 'body'"):
        read(rows, tokenizer)


def test_a_file_says_by_its_first_line_whether_it_holds_requests(tmp_path):
    def kind(row: dict[str, Any]) -> bool:
        path: Path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n")
        return are_requests(read_rows(path))

    assert kind({"url": "/v1/completions", "body": {}})
    assert not kind({"text": "a film", "url": "elsewhere"})
