from __future__ import annotations

import json
import string
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.common.decisions import QUESTIONS
from benchmarks.suite.fine_tune import asked_once, part_rows
from benchmarks.suite.hub import hub_rows
from benchmarks.suite.tasks import Task, TaskData, load_suite, load_task
from vllm_adainfer.errors import AdaInferError

SUITE = load_suite()
NAMES = [task.name for task in SUITE.tasks]
WORDS = ["bees", "hum", "oaks", "grow", *(w for t in SUITE.tasks for w in t.labels.values())]

BEES = {"text": "bees hum"}
PASSAGE = {"context": "oaks grow", "question": "do oaks grow"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a word; words other than `WORDS` share one."""
    vocabulary = {word: n for n, word in enumerate(dict.fromkeys(["<unk>", *WORDS]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture
def load(tmp_path, tokenizer) -> Any:
    """Write rows as a task's files and load the task from them."""

    def load(
        name: str,
        test: Sequence[Mapping[str, Any]],
        train: Sequence[Mapping[str, Any]] = (),
        shots: int | None = 0,
        max_train: int | None = None,
        max_test: int | None = None,
        max_tokens: int = 10_000,
    ) -> TaskData:
        folder = tmp_path / name
        folder.mkdir()
        for part, rows in (("train", train or test), ("test", test)):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{part}.jsonl").write_text(lines)
        [task] = SUITE.select([name])
        return load_task(task, tmp_path, tokenizer, shots, max_train, max_test, max_tokens)

    return load


def made_rows(task: Task, count: int) -> list[dict[str, Any]]:
    """Rows of a task, its classes in turn, told apart by a number in their text."""
    names = list(task.labels) or ["hum"]
    return [
        {
            **{name: f"bees {number}" for name in task.hub.fields},
            **({task.lettered: ["hum"] * len(names)} if task.lettered else {}),
            task.answer: names[number % len(names)],
        }
        for number in range(count)
    ]


def test_a_fine_tuning_keeps_the_rows_that_it_does_not_learn(load, tokenizer, tmp_path):
    [task] = SUITE.select(["sst2"])
    rows = [{"text": " ".join(["bees"] * n), "label": "positive"} for n in range(1, 41)]
    load("sst2", rows)
    parted = part_rows(task, tmp_path, tokenizer, kept=25, rows=10)
    assert [len(some) for some in (parted.lessons, parted.learnt, parted.kept)] == [10, 10, 30]
    told_apart = sorted([*parted.learnt, *parted.kept], key=lambda row: len(row["text"]))
    assert told_apart == rows
    assert len(part_rows(task, tmp_path, tokenizer, kept=25, rows=50).lessons) == 15
    with pytest.raises(AdaInferError, match="only 40 training rows: lower --kept"):
        part_rows(task, tmp_path, tokenizer, kept=40, rows=10)


def test_a_text_is_asked_one_question_with_its_right_reply_among_those_named(tokenizer):
    rows = {
        task.name: made_rows(task, 4 * len(QUESTIONS[task.name]))
        for task in SUITE.tasks
        if task.name in QUESTIONS
    }
    lines = asked_once(rows, tokenizer)
    names = [line["custom_id"].rpartition("/")[0] for line in lines]
    assert Counter(names) == {f"{t}/{one.name}": 4 for t, some in QUESTIONS.items() for one in some}
    assert len({line["custom_id"] for line in lines}) == len(lines)
    assert all(line["label"] in line["body"]["logprob_token_ids"] for line in lines)


@pytest.mark.parametrize("task", SUITE.tasks, ids=NAMES)
def test_a_task_asks_for_every_class_equally_often_each_by_a_token_of_its_own(
    load, tokenizer, task
):
    data = load(task.name, made_rows(task, 1), made_rows(task, 30), shots=None)
    blocks = data.test[0].text.split(task.separator)[:-1]
    words = list(task.labels.values())
    counts = [sum(block.endswith(f" {word}") for block in blocks) for word in words]
    assert len(blocks) == data.shots == task.shots > 0
    assert len(set(counts)) <= 1
    assert [label.name for label in data.labels] == words
    assert [label.token_id for label in data.labels] == tokenizer.convert_tokens_to_ids(words)
    assert len({label.token_id for label in data.labels}) == len(words)
    assert not words or data.answers == [{data.labels[0].token_id}]


def test_shots_are_the_first_training_rows_of_each_class_in_turn(load):
    train = [
        {"text": text, "label": label}
        for text, label in [
            ("a", "positive"),
            ("b", "positive"),
            ("c", "negative"),
            ("{d}", "positive"),
            ("e", "negative"),
        ]
    ]
    data = load("sst2", [{"text": "f", "label": "positive"}], train, shots=3)
    shots = (
        "Review: c\nSentiment: negative\n\n"
        "Review: a\nSentiment: positive\n\n"
        "Review: e\nSentiment: negative\n\n"
    )
    assert data.shots == 3
    assert [example.text for example in data.test] == [f"{shots}Review: f\nSentiment:"]
    assert [example.text for example in data.train] == [
        f"{shots}Review: b\nSentiment:",
        f"{shots}Review: {{d}}\nSentiment:",
    ]


def test_shots_of_an_open_task_are_its_first_short_rows_with_their_first_answer(load):
    train = [
        {**PASSAGE, "context": "x" * 1001, "answer": ["x"]},
        {**PASSAGE, "answer": ["oaks", "all oaks"]},
        {**PASSAGE, "answer": "grow"},
    ]
    data = load("squad", train[2:], train, shots=1)
    shot = "Context: oaks grow\nQuestion: do oaks grow\nAnswer: oaks\n\n"
    assert [example.text.count(shot) for example in (*data.train, *data.test)] == [1, 1]


@pytest.mark.parametrize(
    ("answer", "first_words"),
    [("hum grow", {"hum"}), (["hum", "grow hum"], {"hum", "grow"}), ([" hum", ""], {"hum"})],
)
def test_an_open_answer_is_right_if_its_token_begins_an_accepted_one(
    load, tokenizer, answer, first_words
):
    data = load("squad", [{**PASSAGE, "answer": answer}])
    assert data.labels == ()
    assert data.answers == [set(tokenizer.convert_tokens_to_ids(list(first_words)))]


@pytest.mark.parametrize(
    ("name", "answers", "chance"),
    [
        ("boolq", ["no", "yes", "no", "no"], 3 / 4),
        ("squad", [["hum", "grow"], ["grow"], ["oaks"]], 2 / 3),
    ],
)
def test_chance_is_the_accuracy_of_the_best_constant_answer(load, name, answers, chance):
    [task] = SUITE.select([name])
    rows = [{**BEES, **PASSAGE, task.answer: answer} for answer in answers]
    assert load(name, rows, rows[:1]).chance == pytest.approx(chance)


def test_rows_that_are_too_long_are_left_out_and_counted(load):
    good = {**PASSAGE, "answer": "oaks"}
    long_context = {**good, "context": "x" * 1001}
    many_tokens = {**good, "question": "grow " * 30}
    longest = {**good, "context": "x" * 1000}
    test = [long_context, good, many_tokens, longest]
    data = load("squad", test, [good, long_context], max_tokens=30)
    assert data.skipped == 3
    assert [example.place[-6:] for example in data.test] == ["line 2", "line 4"]


def test_rows_up_to_the_limits_are_a_fair_sample_of_a_file_sorted_by_class(load):
    [task] = SUITE.select(["subj"])
    rows = sorted(made_rows(task, 400), key=lambda row: row["label"])
    data = load("subj", rows, rows, shots=2, max_train=120, max_test=100)
    for examples, count in ((data.train, 120), (data.test, 100)):
        assert len({example.place for example in examples}) == count
        objective = sum(example.label == "objective" for example in examples)
        assert count / 3 < objective < 2 * count / 3
    assert not [e for e in data.train if e.place.endswith((" line 1", " line 201"))]  # the shots


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("sst2", {**BEES, "label": "good"}, "label 'good' is not among negative, positive"),
        ("sst2", {"label": "positive"}, "the template needs the field 'text'"),
        (
            "mmlu",
            {"question": "what", "choices": ["a"], "answer": "A"},
            "must be a list of 4 choices",
        ),
        ("squad", PASSAGE, "'answer' must be an answer or a list of accepted ones"),
    ],
)
def test_a_row_that_does_not_fit_the_task_is_an_error_that_names_its_line(
    load, name, fields, message
):
    good = made_rows(SUITE.select([name])[0], 1)
    with pytest.raises(AdaInferError) as raised:
        load(name, [*good, fields], good)
    assert message in str(raised.value)
    assert "test.jsonl, line 2" in str(raised.value)


def test_what_is_not_there_is_an_error_that_names_it(load, tokenizer, tmp_path):
    rows = [{**BEES, "label": label} for label in ("negative", "positive", "positive")]
    with pytest.raises(AdaInferError, match=r"--shots 3: the task cr .* only 2 balanced shots"):
        load("cr", rows, rows, shots=3)
    with pytest.raises(AdaInferError, match=r"no prompt of the task sst2 .* the model's 3 tokens"):
        load("sst2", rows[:1], max_tokens=3)
    with pytest.raises(AdaInferError, match=f"--data-dir {tmp_path} has no file rte/train.jsonl"):
        load_task(SUITE.select(["rte"])[0], tmp_path, tokenizer, 0, None, None, 100)
    with pytest.raises(AdaInferError, match=f"no task 'sst' in this suite; it has {NAMES[0]}, "):
        SUITE.select(["cr", "sst"])
    assert [task.name for task in SUITE.select(["rte", "cr"])] == ["rte", "cr"]


@pytest.mark.parametrize(
    "change", [{"lables": {}}, {"template": "Review: {text} "}, {"shots": -1}, {"cut": {"text": 0}}]
)
def test_a_mistake_in_a_suite_file_is_an_error(change):
    with pytest.raises(ValidationError):
        Task.model_validate({**SUITE.tasks[0].model_dump(), **change})


# What is published on the hub: a row, and the prompt and the answer that it makes.
LONG = "x" * 701  # of passages, 700 characters are read
HUM = {"text": "bees hum", "label": 1}
FIVE = {"label": list("ABCDE"), "text": ["hum", "is", "it", "no", "{x}"]}
PUBLISHED: dict[str, tuple[dict[str, Any], str, str]] = {
    "sst2": ({"sentence": "bees hum", "label": 1}, "Review: bees hum\nSentiment:", "positive"),
    "ag_news": ({**HUM, "label": 3}, "Article: bees hum\nTopic:", "technology"),
    "mmlu": (
        {"question": "what", "choices": ["hum", "is", "it", "no"], "answer": 2},
        "Question: what\nA. hum\nB. is\nC. it\nD. no\nAnswer:",
        "C",
    ),
    "csqa": (
        {"question": "what", "choices": FIVE, "answerKey": "E"},
        "Question: what\nA. hum\nB. is\nC. it\nD. no\nE. {x}\nAnswer:",
        "E",
    ),
    "squad": (
        {
            "context": "oaks grow",
            "question": "what grow",
            "answers": {"text": ["oaks", "all oaks"], "answer_start": [0, 0]},
        },
        "Context: oaks grow\nQuestion: what grow\nAnswer:",
        "oaks",
    ),
    "cr": ({**HUM, "label_text": "negative"}, "Review: bees hum\nSentiment:", "negative"),
    "trec": (
        {**HUM, "label_coarse_original": "NUM"},
        "Question: bees hum\nAnswer type:",
        "number",
    ),
    "subj": ({**HUM, "label_text": "subjective"}, "Text: bees hum\nType:", "subjective"),
    "boolq": (
        {"question": "do oaks grow", "answer": True, "passage": LONG},
        f"Passage: {LONG[:700]}\nQuestion: do oaks grow?\nAnswer:",
        "yes",
    ),
    "rte": (
        {"sentence1": LONG, "sentence2": "bees hum", "label": 0},
        f"Premise: {LONG[:700]}\nHypothesis: bees hum\nEntailed:",
        "yes",
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_the_hub_as_they_are_published_make_prompts(monkeypatch, tokenizer, name):
    row, prompt, answer = PUBLISHED[name]
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str) -> Any:
        asked.append(split)
        return SimpleNamespace(shuffle=lambda seed: [row])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    data = load_task(SUITE.select([name])[0], None, tokenizer, 0, None, None, 10_000)
    for [example] in (data.train, data.test):
        assert (example.text, example.label) == (prompt, answer)
    assert len(set(asked)) == 2


@pytest.mark.parametrize("task", SUITE.tasks, ids=NAMES)
def test_the_hub_gives_every_field_and_class_that_the_task_uses(task):
    wanted = {name for _, name, _, _ in string.Formatter().parse(task.template) if name}
    assert {*wanted, task.answer} == set(task.hub.fields)
    assert set(task.hub.classes.values()) in (set(), set(task.labels))


def test_data_that_cannot_be_fetched_is_an_error_that_says_what_to_do(monkeypatch):
    [task] = SUITE.select(["csqa"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(AdaInferError, match="pip install datasets, or pass --data-dir"):
        hub_rows(task.hub, "train", task.answer)
    empty = SimpleNamespace(shuffle=lambda seed: [{"question": "q", "choices": ["a"]}])
    monkeypatch.setitem(
        sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: empty)
    )
    with pytest.raises(AdaInferError, match=r"^cannot fetch tau/commonsense_qa .*--data-dir DIR$"):
        hub_rows(task.hub, "train", task.answer)
