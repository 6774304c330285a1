"""Which grammars are remembered, and which are left alone because drafts do not pay."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adainfer.drafts.answers import START
from vllm_adainfer.drafts.grammars import (
    DEBT,
    LONGEST_REST,
    MOST_GRAMMARS,
    MOST_SEEN_ONCE,
    SHORTEST_REST,
    Grammar,
    Grammars,
)

ONE_ROW = 1.0  # what a kept token spares, in the rows that a refused one costs
FAIR_DRAFT = 10


def test_a_grammar_is_remembered_from_its_second_request_on():
    grammars = Grammars()
    assert grammars.arrived("", "JSON", "{}") is None
    found = grammars.arrived("", "JSON", "{}")
    assert found is not None
    assert grammars.arrived("", "JSON", "{}") is found


@pytest.mark.parametrize(
    "other", [("x", "JSON", "{}"), ("", "REGEX", "{}"), ("", "JSON", "{ }"), ("", "JSO", "N{}")]
)
def test_another_adapter_kind_or_text_is_another_grammar(other):
    grammars = Grammars()
    found = [grammars.arrived("", "JSON", "{}") for _ in range(2)][1]
    assert [grammars.arrived(*other) for _ in range(2)][1] is not found


def test_any_text_has_a_digest():
    grammars = Grammars()
    for text in ("\ud800", "", "\0", "\U0001f600" * 9):
        assert [grammars.arrived(text) is None for _ in range(2)] == [True, False]


def test_grammars_that_come_once_never_displace_known_ones():
    grammars = Grammars()
    known = [[grammars.arrived(str(one)) for _ in range(2)][1] for one in range(MOST_GRAMMARS)]
    for one in range(3 * MOST_SEEN_ONCE):
        assert grammars.arrived("once", str(one)) is None
    assert [grammars.arrived(str(one)) for one in range(MOST_GRAMMARS)] == known


def test_the_grammar_that_was_not_used_for_longest_goes():
    grammars = Grammars()
    known = [[grammars.arrived(str(one)) for _ in range(2)][1] for one in range(MOST_GRAMMARS)]
    assert grammars.arrived("0") is known[0]
    assert [grammars.arrived("new") is None for _ in range(2)] == [True, False]
    assert grammars.arrived("0") is known[0]
    assert grammars.arrived("1") is None


def test_all_grammars_with_all_their_answers_are_bounded():
    tracemalloc.start()
    try:
        grammars = Grammars()
        for one in range(3 * MOST_SEEN_ONCE):
            for _ in range(1 + one % 2):
                found = grammars.arrived("x" * 999, str(one))
            if found is not None:
                found.answers.add(START, one)
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(grammars._known) == MOST_GRAMMARS
    assert len(grammars._once) <= MOST_SEEN_ONCE
    assert used < 2 << 20  # and a mebibyte for the answers to each, see test_drafts_answers.py


def refused(grammar: Grammar, drafts: int) -> None:
    for _ in range(drafts):
        grammar.judge(FAIR_DRAFT, 0, ONE_ROW)


ENOUGH = int(-DEBT / FAIR_DRAFT) + 1  # refused drafts


def test_drafts_that_are_refused_send_a_grammar_to_rest_and_it_is_tried_again():
    grammar = Grammar("name")
    refused(grammar, ENOUGH - 1)
    assert not grammar.rest
    refused(grammar, 1)
    assert grammar.rest == SHORTEST_REST
    for _ in range(SHORTEST_REST):
        assert grammar.rest
        grammar.arrived()
    assert not grammar.rest


def test_it_rests_twice_as_long_each_time_up_to_a_limit():
    grammar = Grammar("name")
    rests = []
    for _ in range(12):
        refused(grammar, ENOUGH)
        rests.append(grammar.rest)
        grammar.rest = 0
    assert rests[:3] == [SHORTEST_REST, 2 * SHORTEST_REST, 4 * SHORTEST_REST]
    assert rests[-2:] == [LONGEST_REST] * 2


def test_once_drafts_pay_again_the_next_rest_is_short():
    grammar = Grammar("name")
    for _ in range(5):
        refused(grammar, ENOUGH)
    assert grammar.next_rest > SHORTEST_REST
    for _ in range(20):
        grammar.judge(FAIR_DRAFT, FAIR_DRAFT, ONE_ROW)
    assert grammar.next_rest == SHORTEST_REST
    assert not Grammar("other", rest=0).rest


def test_what_was_long_ago_does_not_count():
    """However much was spared before, wasted rows end the drafts within some hundred of them."""
    grammar = Grammar("name")
    for _ in range(100_000):
        grammar.judge(FAIR_DRAFT, FAIR_DRAFT, ONE_ROW)
    refused(grammar, 150)
    assert grammar.rest


@given(st.lists(st.integers(0, 63), max_size=400))
def test_rows_that_are_wasted_without_a_rest_are_bounded(drafts):
    grammar, wasted = Grammar("name"), 0
    for drafted in drafts:
        grammar.judge(drafted, 0, ONE_ROW)
        wasted += drafted
        if grammar.rest:
            grammar.rest = wasted = 0
        assert wasted < 2 * -DEBT
