"""What is learnt of the answers to a grammar, how sure it is, and what it may cost."""

from __future__ import annotations

import random
import sys
import tracemalloc
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adainfer.drafts import answers as answers_module
from vllm_adainfer.drafts.answers import (
    LONGEST_CONTEXT,
    MOST_CONTEXTS,
    MOST_NEXT,
    ORDERS,
    START,
    Answers,
)

END = 0
SURE = 0.5
SKELETON = [11, 12, 13, 14, 15, 16, 17, 18, 19]
Tokens = st.lists(st.integers(1, 6), max_size=30)


def learn(known: Answers, answer: Sequence[int]) -> None:
    """As the observer does, token by token, with the end."""
    before = START
    for token in [*answer, END]:
        known.add(before, token)
        before = (*before[1:], token)


def knowing(*written: Sequence[int]) -> Answers:
    known = Answers()
    for answer in written:
        learn(known, answer)
    return known


def after(written: Sequence[int]) -> tuple[int, ...]:
    return (*START, *written)[-LONGEST_CONTEXT:]


def drafted(
    known: Answers, written: Sequence[int] = (), least: float = SURE, longest: int = 99
) -> list[int]:
    return known.draft(after(written), least, longest, END)


@pytest.mark.parametrize("least", [0.01, 0.5, 0.99])
def test_nothing_is_drafted_of_what_was_never_seen(least):
    assert drafted(Answers(), least=least) == []
    assert drafted(knowing(SKELETON), [98, 99], least) == []


@pytest.mark.parametrize(("times", "least"), [(2, 0.1), (10, 0.5), (100, 0.95)])
def test_what_came_several_times_is_drafted_up_to_the_end_but_without_it(times, least):
    known = knowing(*[SKELETON] * times)
    assert drafted(known, least=least) == SKELETON
    assert drafted(known, SKELETON[:4], least) == SKELETON[4:]
    assert drafted(known, SKELETON, least) == []


def test_a_draft_ends_before_the_first_branch_that_is_not_sure():
    known = knowing(*([*SKELETON, value, 40, 41] for value in (31, 32, 33) for _ in range(5)))
    assert drafted(known) == SKELETON
    for value in (31, 32, 33):
        assert drafted(known, [*SKELETON, value]) == [40, 41]


def test_a_common_value_is_drafted_where_a_row_is_cheap():
    known = knowing(*([*SKELETON, value, 40] for value in [31, 31, 31, 32, 32] * 40))
    assert drafted(known, least=0.9) == SKELETON
    assert drafted(known, least=0.3) == [*SKELETON, 31, 40]


def test_the_same_words_after_other_words_are_told_apart():
    first, second = [1, 2, 3, 4, 5, 6], [7, 2, 3, 4, 5, 8]
    known = knowing(*[first, second] * 10)
    assert drafted(known, [1], 0.9) == [2, 3, 4, 5, 6]
    assert drafted(known, [7], 0.9) == [2, 3, 4, 5, 8]


@given(st.lists(Tokens, min_size=1, max_size=8), Tokens, st.floats(0.01, 0.99))
def test_a_draft_is_as_sure_as_asked_and_as_the_slow_rule_says(written, start, least):
    """The rule in plain words: a context's counts, with as many more as came once, and a half.

    These are shared out as the next shorter context says. One that came as often is the same.
    """
    known = knowing(*written)
    found = drafted(known, start, least)
    texts = [[*START, *answer, END] for answer in written]
    sure, before = 1.0, list(after(start))
    for token in [*found, None]:
        followers: list[list[int]] = []
        for order in ORDERS:
            own = tuple(before[-order:])
            came = [
                text[place]
                for text in texts
                for place in range(LONGEST_CONTEXT, len(text))
                if tuple(text[place - order : place]) == own
            ]
            if came and [len(came)] != [len(one) for one in followers[-1:]]:
                followers.append(came)
        best = _first_of_commonest(followers[-1]) if followers else None
        probability = 0.0
        for came in followers:
            unforeseen = 0.5 + sum(came.count(one) == 1 for one in set(came))
            seen = came.count(best) + unforeseen * probability
            probability = seen / (len(came) + unforeseen)
        sure *= probability
        if token is None:
            assert best is None or best == END or sure < least + 1e-9 or len(found) == 99
            return
        assert token == best
        assert sure >= least - 1e-9
        before = [*before[1:], token]


def _first_of_commonest(came: list[int]) -> int:
    return max(dict.fromkeys(came), key=came.count)


@given(Tokens, Tokens, st.integers(0, 5))
def test_a_surer_draft_is_the_beginning_of_a_less_sure_one(answer, other, longest):
    known = knowing(answer, answer, other)
    drafts = [drafted(known, least=least) for least in (0.9, 0.6, 0.3, 0.05)]
    for short, long in pairwise(drafts):
        assert long[: len(short)] == short
    assert drafted(known, least=0.05, longest=longest) == drafts[-1][:longest]


def test_paths_that_alternate_are_never_sure():
    known = knowing(*[[1] * 20, [2] * 20] * 50)
    assert drafted(known, least=0.6) == []


def test_answers_that_never_repeat_are_never_sure():
    generator = random.Random(0)
    known = Answers()
    for _ in range(50):
        answer = [generator.randrange(1, 10_000) for _ in range(40)]
        assert drafted(known, answer[:7], 0.6) == []
        learn(known, answer)


def test_a_skeleton_is_kept_when_what_stands_between_its_words_is_forgotten():
    generator = random.Random(0)
    known = Answers()
    for _ in range(200):
        learn(known, [*SKELETON, *(generator.randrange(100, 10_000) for _ in range(50)), 21, 22])
    assert drafted(known) == SKELETON
    assert drafted(known, [21]) == [22]


def test_a_new_skeleton_displaces_one_that_comes_no_more():
    known = knowing(*[SKELETON] * 300)
    new = [*SKELETON[:4], *range(60, 70)]
    for _ in range(400):
        learn(known, new)
    assert drafted(known) == new


def contexts_of(known: Answers) -> int:
    return len(known._followers)


@given(st.lists(st.lists(st.integers(0, 1 << 20), max_size=200), max_size=60))
def test_the_number_of_contexts_is_bounded(written):
    known = knowing(*written)
    assert contexts_of(known) <= MOST_CONTEXTS


@pytest.mark.parametrize("followers", [1, 2 * MOST_NEXT], ids=["one each", "many each"])
def test_a_grammar_takes_a_mebibyte_whatever_is_written(followers):
    generator = random.Random(0)
    tracemalloc.start()
    try:
        known = Answers()
        paths = [
            tuple(generator.randrange(1 << 30) for _ in range(LONGEST_CONTEXT))
            for _ in range(MOST_CONTEXTS)
        ]
        most = 0
        for path in paths:
            for _ in range(followers):
                known.add(path, generator.randrange(1 << 30))
                most = max(most, contexts_of(known))
        del paths
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert most > MOST_CONTEXTS - 2 * len(ORDERS)
    assert used < 1 << 20


def operations(work: int) -> int:
    """How many lines of `answers` run for `work` more tokens of random answers."""
    generator = random.Random(1)
    known = Answers()
    for _ in range(3 * MOST_CONTEXTS):  # full, so that forgetting takes its share
        known.add(tuple(generator.randrange(99) for _ in range(8)), generator.randrange(999))
    given = [
        (tuple(generator.randrange(99) for _ in range(8)), generator.randrange(999))
        for _ in range(work)
    ]
    lines = 0

    def tracer(frame, event, _arg):
        nonlocal lines
        if frame.f_code.co_filename != answers_module.__file__:
            return None
        lines += event == "line"
        return tracer

    sys.settrace(tracer)
    try:
        for before, token in given:
            known.add(before, token)
            known.draft(before, 0.01, 8, END)
    finally:
        sys.settrace(None)
    return lines


def test_a_token_takes_a_bounded_number_of_operations():
    few, many = operations(500), operations(4000)
    assert many < 8 * few * 1.5
    assert many / 4000 < 1500
