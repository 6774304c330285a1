from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import (
    Example,
    Row,
    check_labels_known,
    find_labels,
    make_examples,
    read_rows,
    read_template,
)

TEMPLATE = "Review : {text} Sentiment :"
CHAT = (
    "{% for m in messages %}"
    "{% if m is string %}{{ raise_exception('a message is an object') }}{% endif %}"
    "{{ m['role'] }} : {{ m['content'] }} "
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def chat(tokenizer) -> Any:
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = CHAT
    return tokenizer


def write(directory: Path, content: str | bytes) -> Path:
    path = directory / "data.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def example(text: str, label: str | None = None) -> Example:
    return Example("data.jsonl, line 1", text, [1], label)


def test_rows_know_their_line_and_empty_lines_are_skipped(tmp_path):
    path = write(tmp_path, '\n{"a": 1}\n  \n{"a": 2}\r\n\n{"a": 3}')
    assert read_rows(path) == [
        Row(f"{path}, line 2", {"a": 1}),
        Row(f"{path}, line 4", {"a": 2}),
        Row(f"{path}, line 6", {"a": 3}),
    ]


@pytest.mark.parametrize(
    "character",
    ["\u2028", "\u2029", "\x85", "\u00e9", "\u3042"],
    ids=lambda character: f"U+{ord(character):04X}",
)
def test_a_string_may_hold_any_character_that_json_allows(tmp_path, character):
    fields = {"text": f"a{character}b"}
    path = write(tmp_path, json.dumps(fields, ensure_ascii=False) + "\n")
    assert [row.fields for row in read_rows(path)] == [fields]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("\n  \n", "has no rows"),
        (b"\xff\xfe{}", "cannot read --data"),
        ('{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ('{"text": "a"}\n\nnonsense', "line 3 is not JSON"),
        ('[{"text": "a"}]', "line 1 must be a JSON object, not list"),
        ('{"text": "a"}\n"a"', "line 2 must be a JSON object, not str"),
        ("null", "line 1 must be a JSON object, not NoneType"),
    ],
)
def test_a_file_that_is_no_json_lines_is_an_error(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(AdaInferError) as raised:
        read_rows(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(AdaInferError, match="cannot read --data"):
        read_rows(tmp_path / "missing.jsonl")


def test_a_line_break_in_a_shells_quotes_is_one_as_in_the_requests_of_clients():
    assert read_template(r"Review: {text}\nSentiment:") == "Review: {text}\nSentiment:"


@pytest.mark.parametrize("template", [None, "", TEMPLATE, "mail me @ home {text}"])
def test_a_template_is_taken_as_it_stands(template):
    assert read_template(template) == template


def test_a_template_after_an_at_sign_is_read_from_its_file(tmp_path):
    (tmp_path / "template.txt").write_text(TEMPLATE + "\n")
    assert read_template(f"@{tmp_path / 'template.txt'}") == TEMPLATE + "\n"


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_template_file_that_cannot_be_read_is_an_error(tmp_path, content):
    path = tmp_path / "template.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AdaInferError, match=r"cannot read --template @.*template\.txt"):
        read_template(f"@{path}")


MESSAGES = [{"role": "Review", "content": "good"}]


@pytest.mark.parametrize(
    ("fields", "template", "text"),
    [
        ({"text": "good"}, TEMPLATE, "Review : good Sentiment :"),
        ({"text": "good", "prompt": "bad"}, TEMPLATE, "Review : good Sentiment :"),
        ({"a": {"b": "good"}, "c": ["bad"]}, "{a[b]} {c[0]}", "good bad"),
        ({"text": "good"}, "{{Review}} {text}", "{Review} good"),
        ({"prompt": "Review : good"}, None, "Review : good"),
        ({"prompt": "good", "messages": MESSAGES}, None, "good"),
        ({"messages": MESSAGES}, None, "Review : good "),
    ],
)
def test_a_row_becomes_a_tokenised_prompt(chat, fields, template, text):
    [made] = make_examples([Row("here", fields)], chat, template, "label", 100)
    assert made == Example("here", text, chat.encode(text), None)


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({}, None),
        ({"label": None}, None),
        ({"label": "good"}, "good"),
        ({"label": 1}, "1"),
        ({"label": ""}, ""),
    ],
)
def test_a_label_is_text_or_absent(tokenizer, fields, label):
    row = Row("here", {"prompt": "good", **fields})
    assert make_examples([row], tokenizer, None, "label", 100)[0].label == label


def test_the_label_field_can_be_named(tokenizer):
    row = Row("here", {"prompt": "good", "label": "bad", "stars": 5})
    assert make_examples([row], tokenizer, None, "stars", 100)[0].label == "5"


def test_special_tokens_are_added_to_a_prompt_but_not_to_a_rendered_chat(chat):
    asked = []

    class Spy:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            asked.append(add_special_tokens)
            return [1]

        apply_chat_template = staticmethod(chat.apply_chat_template)

    rows = [Row("a", {"prompt": "good"}), Row("b", {"messages": MESSAGES})]
    make_examples(rows, Spy(), None, "label", 100)
    assert asked == [True, False]


@pytest.mark.parametrize(
    ("fields", "template", "message"),
    [
        ({"txt": "good"}, TEMPLATE, "the template needs the field 'text', but the row has 'txt'"),
        ({}, TEMPLATE, "the template needs the field 'text', but the row has none"),
        ({"text": "good"}, "{a[b]}", "the template needs the field 'a'"),
        ({"text": "good"}, None, "neither a 'prompt' (text) nor 'messages' (list)"),
        ({"prompt": 3}, None, "neither a 'prompt' (text) nor 'messages' (list)"),
        ({"messages": "good"}, None, "neither a 'prompt' (text) nor 'messages' (list)"),
        (
            {"messages": ["good"]},
            None,
            "the model's chat template rejects the messages: a message is an",
        ),
        ({"prompt": ""}, None, "the prompt has 0 tokens, but the model takes 1 to 8"),
        ({"prompt": "good " * 9}, None, "the prompt has 9 tokens, but the model takes 1 to 8"),
    ],
)
def test_a_row_that_makes_no_prompt_is_an_error_that_names_its_line(
    tmp_path, chat, fields, template, message
):
    good = {"text": "good", "prompt": "good", "a": {"b": "good"}}
    rows = read_rows(write(tmp_path, f"{json.dumps(good)}\n{json.dumps(fields)}\n"))
    with pytest.raises(AdaInferError) as raised:
        make_examples(rows, chat, template, "label", 8)
    assert message in str(raised.value)
    assert "line 2" in str(raised.value)


def test_messages_without_a_chat_template_are_an_error(tokenizer):
    rows = [Row("data.jsonl, line 1", {"messages": MESSAGES})]
    with pytest.raises(
        AdaInferError, match="line 1: the model's chat template rejects the messages"
    ):
        make_examples(rows, tokenizer, None, "label", 100)


def test_a_template_names_its_fields(tokenizer):
    rows = [Row("data.jsonl, line 1", {"text": "good"})]
    with pytest.raises(AdaInferError, match="line 1: the template needs the field ''"):
        make_examples(rows, tokenizer, "{}", "label", 100)


@pytest.mark.parametrize(
    "template", ["{text", "text}", "{text!z}", "{text:d}", "{text.stars}", "{text:{width}}"]
)
def test_a_template_that_is_no_format_string_is_an_error(tokenizer, template):
    with pytest.raises(AdaInferError, match="template"):
        make_examples([Row("here", {"text": "good"})], tokenizer, template, "label", 100)


@pytest.mark.parametrize("end", ["", " ", "\n"])
def test_a_label_is_decided_by_its_first_token_after_the_prompt(tokenizer, end):
    found = find_labels(["bad", "good Review"], example(f"Sentiment :{end}"), tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["bad", "good"])
    assert [(label.name, label.token_id) for label in found] == [
        ("bad", ids[0]),
        ("good Review", ids[1]),
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "at least two different names"),
        (["good"], "at least two different names"),
        (["good", "good"], "at least two different names"),
        (["good", ""], "at least two different names"),
        (["good", "good Review"], "'good' and 'good Review' both begin with"),
        (["xyzzy", "plugh"], "'xyzzy' and 'plugh' both begin with"),
        (["good", " "], "the label ' ' merges with"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_an_error(tokenizer, names, message):
    with pytest.raises(AdaInferError) as raised:
        find_labels(names, example("Sentiment :"), tokenizer)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("prompt", "first_tokens"),
    [("Sentiment:", [" bad", " good"]), ("Sentiment:\n", ["bad", "good"])],
)
def test_a_space_goes_before_the_label_unless_the_prompt_ends_with_one(prompt, first_tokens):
    tokens: list[str] = []

    class SpaceBelongsToTheWord:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            assert not add_special_tokens
            found = re.findall(r" ?\w+|\W", text)
            tokens.extend(token for token in found if token not in tokens)
            return [tokens.index(token) for token in found]

    found = find_labels(["bad", "good"], example(prompt), SpaceBelongsToTheWord())
    assert [tokens[label.token_id] for label in found] == first_tokens


def test_a_label_that_merges_with_the_prompt_is_an_error(tokenizer):
    class Merging:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return tokenizer.encode(text.replace(": g", ":g").replace(":good", "Review"))

    with pytest.raises(
        AdaInferError, match=r"the label 'good' merges with the end of the prompt .*'Sentiment :'"
    ):
        find_labels(["bad", "good"], example("Sentiment :"), Merging())


@pytest.mark.parametrize("label", ["good", None])
def test_known_labels_and_rows_without_one_pass(tokenizer, label):
    labels = find_labels(["bad", "good"], example("Sentiment :"), tokenizer)
    check_labels_known([example("Review", label)], labels)


def test_an_unknown_label_is_an_error_that_names_its_line(tokenizer):
    labels = find_labels(["bad", "good"], example("Sentiment :"), tokenizer)
    with pytest.raises(AdaInferError, match="line 1: the label 'fine' is not among bad, good"):
        check_labels_known([example("Review", "good"), example("Review", "fine")], labels)


def test_a_directory_is_read_as_all_its_files_in_order_of_their_names(tmp_path):
    for name, texts in (("b.jsonl", ["three"]), ("a.jsonl", ["one", "two"]), ("c.txt", ["four"])):
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / name).write_text("".join(lines))
    rows = read_rows(tmp_path)
    assert [row.fields["text"] for row in rows] == ["one", "two", "three"]
    assert rows[1].place == f"{tmp_path / 'a.jsonl'}, line 2"
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdaInferError, match="has no rows: give one JSON object per line"):
        read_rows(tmp_path / "empty")
