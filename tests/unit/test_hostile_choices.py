"""Choices read from what a client sent: exactly those that vLLM wrote, in linear time, or none."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vllm.v1.structured_output.utils import choice_as_grammar

from vllm_adainfer.artifact.fields import MOST_CHOICE_CHARACTERS, MOST_CHOICES
from vllm_adainfer.engine.compat.structured_outputs import choices_of

SIZES = [1 << power for power in (10, 13, 16, 19, 20)]  # in characters, or in choices
MOST_SECONDS = 0.05  # for any of them
MOST_GROWTH = 40  # from one size to the next, where linear is 8, and quadratic 64
NOISE = 2e-5  # seconds; shorter calls are not compared

drawn = settings(deadline=None)
# A quote, a backslash, controls, DEL, beyond the BMP, half of a pair, and what grammars are made of
SPECIAL = st.sampled_from([*'"\\\n\r\t\0\x1f\x7f\x85\u2028😀\ud800#|:=()/u', "root ::= ", '" | "'])
TEXT = st.lists(st.one_of(SPECIAL, st.text(max_size=3)), max_size=6).map("".join)
CHOICES = st.lists(TEXT, min_size=1, max_size=5)
PIECES = st.sampled_from(["root ::= ", " | ", '"', "\\", '"a"', "\n", "#", "\\u0041", "\\n", "é"])

# By what is wrong with it.
OTHERS = {
    "empty": "",
    "no choice": "root ::= ",
    "another rule": 'root ::= "a" | b\nb ::= "b"',
    "another root": 'start ::= "a"',
    "a line before": '\nroot ::= "a"',
    "a line after": 'root ::= "a"\n',
    "a comment": 'root ::= "a" # "b"',
    "a comment between": 'root ::= "a" | # | "b"\n"b"',
    "a bar after": 'root ::= "a" | ',
    "no bar": 'root ::= "a" "b"',
    "other spaces": 'root ::= "a"|"b"',
    "unterminated": 'root ::= "a" | "b',
    "an escaped quote at the end": 'root ::= "a\\"',
    "a backslash at the end": 'root ::= "a\\',
    "an escape too many": 'root ::= "\\u0041"',
    "an escape in capitals": 'root ::= "\\u001F"',
    "an escape cut short": 'root ::= "\\u00"',
    "no escape of JSON": 'root ::= "\\x41"',
    "a raw newline": 'root ::= "a\nb"',
    "a raw DEL": 'root ::= "\x7f"',
    "a class": "root ::= [ab]",
}
# Grammars of any size: how they begin, and what comes again and again.
GROWING = {
    "quotes in a comment": ('root ::= "a" # ', '"'),
    "escaped quotes in a comment": ('root ::= "a" # "', '\\"'),
    "escaped quotes": ('root ::= "', '\\"'),
    "backslashes": ('root ::= "', "\\"),
    "one character": ('root ::= "', "a"),
    "control characters": ('root ::= "', "\\u001f"),
    "bars": ('root ::= "a"', " | "),
    "empty choices": ('root ::= ""', ' | ""'),
    "choices": ('root ::= "a"', ' | "b"'),
    "choices without bars": ("root ::= ", '"a" '),
    "rules": ('root ::= "a"', '\na ::= "b"'),
}
LISTS: dict[str, Callable[[int], list[str]]] = {
    "one long choice": lambda size: ["a" * size],
    "many choices": lambda size: ["a"] * size,
    "many empty choices": lambda size: [""] * size,
    "a long choice among short ones": lambda size: ["a", "b" * size, "c"],
}


def seconds(call: Callable[[], object]) -> float:
    """Of the processor, the least of a few calls."""

    def once() -> float:
        start = time.thread_time()
        call()
        return time.thread_time() - start

    return min(once() for _ in range(3))


def grows_linearly(call: Callable[[int], object]) -> None:
    before = None
    for size in SIZES:
        took = seconds(lambda size=size: call(size))
        assert took < MOST_SECONDS, size
        assert before is None or took < MOST_GROWTH * max(before, NOISE), size
        before = took


@drawn
@given(CHOICES)
def test_what_vllm_wrote_of_choices_is_read_back(choices):
    assert choices_of(choices, None) == choices
    assert choices_of(None, choice_as_grammar(choices)) == choices


@pytest.mark.parametrize("grammar", OTHERS.values(), ids=OTHERS)
def test_a_grammar_that_vllm_writes_of_no_choices_has_none(grammar):
    assert choices_of(None, grammar) is None


@drawn
@given(CHOICES, st.data(), SPECIAL | st.text(max_size=1))
def test_a_character_changed_gives_no_choices_or_those_of_the_changed_grammar(choices, data, other):
    grammar = choice_as_grammar(choices)
    place = data.draw(st.integers(0, len(grammar)))
    changed = grammar[:place] + other + grammar[place + data.draw(st.integers(0, 1)) :]
    found = choices_of(None, changed)
    assert found is None or choice_as_grammar(found) == changed


@drawn
@given(st.lists(PIECES, max_size=12).map("".join))
@example('root ::= "a" | "\\"a"')
def test_no_pieces_of_grammars_are_read_as_choices_that_they_are_not(grammar):
    found = choices_of(None, grammar)
    assert found is None or choice_as_grammar(found) == grammar


@pytest.mark.parametrize(("start", "again"), GROWING.values(), ids=GROWING)
def test_time_grows_as_a_grammar_does_and_one_beyond_the_caps_has_no_choices(start, again):
    grammars = {size: start + again * (size // len(again)) for size in SIZES}
    grows_linearly(lambda size: choices_of(None, grammars[size]))
    assert choices_of(None, grammars[SIZES[-1]]) is None


@pytest.mark.parametrize("of", LISTS.values(), ids=LISTS)
def test_time_grows_as_a_list_does_and_one_beyond_the_caps_has_no_choices(of):
    lists = {size: of(size) for size in SIZES}
    grows_linearly(lambda size: choices_of(lists[size], None))
    assert choices_of(lists[SIZES[-1]], None) is None


@pytest.mark.parametrize("text", ["a", "\x1f", '"', "😀"])
@pytest.mark.parametrize(
    "asked",
    [lambda texts: (texts, None), lambda texts: (None, choice_as_grammar(texts))],
    ids=["list", "grammar"],
)
def test_as_many_choices_and_characters_as_the_caps_allow_are_read(text, asked):
    longest, most = [text * MOST_CHOICE_CHARACTERS], [text] * MOST_CHOICES
    for choices in longest, most:
        assert choices_of(*asked(choices)) == choices
    for choices in [longest[0] + text], [*longest, text], [*most, text]:
        assert choices_of(*asked(choices)) is None
