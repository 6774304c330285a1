"""Questions of one kind are told apart by how prompts end, whatever texts stand before them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence

import pytest

from vllm_adainfer.auto import endings
from vllm_adainfer.auto.endings import MOST_QUESTIONS, Endings, Questions
from vllm_adainfer.auto.kinds import Kind
from vllm_adainfer.auto.table import KindTable

MANY = 400
YES_NO = Kind("label", (7, 11))
TAIL = [1, 2, 3, 4, 5, 6]  # what all prompts end with, as by a chat template


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    monkeypatch.setattr(endings, "ASKED", MANY)


def prompts(questions: Sequence[Sequence[int]], tail: Sequence[int] = TAIL) -> Iterator[list[int]]:
    draw = random.Random(0)
    for number in range(MANY):
        text = [draw.randrange(1000, 9000) for _ in range(draw.randrange(1, 80))]
        yield [*text, *questions[number % len(questions)], *tail]


def found(*asked: Iterator[list[int]]) -> Questions | None:
    counts = Endings()
    for some in asked:
        for prompt in some:
            counts.add(prompt)
    return counts.found()


def question(number: int, length: int = 10) -> list[int]:
    return [100 * number + place for place in range(length)]


@pytest.mark.parametrize("lengths", [(10, 10), (6, 30), (14, 9, 22)])
def test_prompts_with_one_of_a_few_questions_are_told_apart_by_them(lengths):
    asked = [question(n + 1, length) for n, length in enumerate(lengths)]
    divided = found(prompts(asked))
    assert divided is not None
    kinds = [divided.kind_of(YES_NO, [9, 9, 9, *one, *TAIL]) for one in asked]
    assert len(set(kinds)) == len(asked)
    assert YES_NO not in kinds
    assert divided.kind_of(YES_NO, [9] * 90) == YES_NO


@pytest.mark.parametrize(
    ("asked", "tail"),
    [
        ([question(1)], TAIL),
        ([[]], TAIL),
        ([[]], []),
        ([question(n + 1) for n in range(MOST_QUESTIONS + 1)], TAIL),
    ],
    ids=["one question", "a text before the end", "a text at the end", "too many questions"],
)
def test_other_prompts_are_one_kind(asked, tail):
    assert found(prompts(asked, tail)) is None


def test_a_question_that_is_seldom_asked_stays_with_the_kind():
    asked = [question(n + 1) for n in range(3)]
    often = [*prompts(asked[:2])] * 10
    divided = found(iter(often), iter([*prompts(asked[2:])][: MANY // 2]))
    assert divided is not None
    assert len(divided.endings) == 2


def test_few_requests_divide_nothing():
    assert found(iter([*prompts([question(1), question(2)])][:-1])) is None


def test_a_table_divides_a_kind_that_recurs_and_remembers_it():
    table = KindTable(b"salt")
    asked = [*prompts([question(1), question(2)])]
    for prompt in asked[:40] + asked:
        kind = table.narrowed(YES_NO, prompt)
        table.arrived(kind, len(prompt), 0.0)
        table.note_ending(kind, prompt)
    table.find_questions()
    again = KindTable(b"salt")
    again.restore(json.loads(json.dumps(table.as_dict())))
    for one in (table, again):
        kinds = [one.narrowed(YES_NO, prompt) for prompt in asked[:2]]
        assert len({*kinds, YES_NO}) == 3
        assert Kind.of_dict(json.loads(json.dumps(kinds[0].as_dict()))) == kinds[0]
