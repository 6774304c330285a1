"""What a watch promises, whatever counts once in it: answers, texts, questions or queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from itertools import count
from typing import Any

import numpy as np
import pytest

from vllm_adainfer.engine.compat.requests import request_group
from vllm_adainfer.promise.accuracy import Accuracy
from vllm_adainfer.promise.changed import Changed
from vllm_adainfer.promise.first_documents import FirstDocuments
from vllm_adainfer.promise.promise import Promise
from vllm_adainfer.promise.tolerance import Tolerance
from vllm_adainfer.watch.intervals import confidence_interval
from vllm_adainfer.watch.units import (
    EACH_ANSWER,
    ENDED_SINCE,
    LONGEST,
    MOST_DOCUMENTS,
    NO_LEVEL,
    Grouping,
)
from vllm_adainfer.watch.watch import ANSWERS_ALONE, Reading, Watch

EPSILONS, ALPHA, MOST = (0.02, 0.05), 0.1, 20
ANSWERS, TEXTS, QUESTIONS = EACH_ANSWER, Grouping(MOST), Grouping(MOST, request_group)
QUERIES = Grouping(1, request_group, FirstDocuments(k=1, margin=0.1).breaks)
names = map(str, count())
EVERY = pytest.mark.parametrize(
    "units", [ANSWERS, TEXTS, QUESTIONS, QUERIES], ids=["answers", "texts", "questions", "queries"]
)
PARTS = pytest.mark.parametrize("units", [QUESTIONS, QUERIES], ids=["questions", "queries"])


def watching(
    units: Grouping = ANSWERS, promise: Promise = ANSWERS_ALONE, closes: bool = True
) -> Watch:
    return Watch(EPSILONS, ALPHA, units, promise, closes)


def ids(name: str, parts: int, drawn: str = "") -> list[str]:
    """vLLM's ids of the parts of an HTTP request; what is `drawn` tells requests apart."""
    return [f"score-{name}-{part}-{part:08x}{drawn}" for part in range(parts)]


def show(watch: Watch, differ: Sequence[bool], level: int = 0, name: str = "") -> list[Reading]:
    """A whole unit, whose parts then end; returns what has been found broken.

    A query has two documents, of which one is lost if any answer differs.
    """
    name, many = name or next(names), len(differ)
    found, parts = [], [name]
    if watch.queries is not None:
        parts = ids(name, 2, next(names))
        compare(watch, parts, [0.1, 0.2], [0.9 if any(differ) else 0.1, 0.2], [level] * 2)
    else:
        if watch._grouping is QUESTIONS:
            parts = ids(name, many)
        by_answer = parts * (many // len(parts))
        found = watch.observe(by_answer, np.full(many, level), np.array(differ))
    return found + [one for part in parts for one in watch.ended(part)]


def compare(
    watch: Watch, parts: list[str], early: list[float], full: list[float], levels: list[int]
) -> None:
    """The documents of a query run in one step."""
    for part in parts:
        watch.queries.began(part, parts[0])
    watch.queries.compared(parts, np.array(levels), np.array(early), np.array(full))


def let_others_end(watch: Watch, requests: int = ENDED_SINCE) -> list[Reading]:
    return [one for _ in range(requests) for one in watch.ended(next(names))]


def counts(watch: Watch, level: int = 0) -> tuple[int, int]:
    reading = watch.readings()[level]
    return reading.checked, reading.disagreed


def outcomes(rate: float, units: int, seed: int = 0) -> list[bool]:
    return (np.random.default_rng(seed).random(units) < rate).tolist()


def show_all(
    watch: Watch, wrong: Sequence[bool], level: int = 0, answers: int = 1
) -> list[Reading]:
    """Units of so many answers, which differ all or none."""
    found = [one for differs in wrong for one in show(watch, [differs] * answers, level)]
    return found + let_others_end(watch)


# What closes a level


@EVERY
@pytest.mark.parametrize("level", [0, 1])
def test_units_that_differ_much_too_often_are_found_once_and_only_their_level_is_closed(
    units, level
):
    watch = watching(units)
    answers = 1 if units in (ANSWERS, QUERIES) else MOST
    [found] = show_all(watch, outcomes(5 * EPSILONS[level], 800), level, answers)
    assert watch.tightened.tolist() == [index == level for index in range(2)]
    assert (found.epsilon, found.tightened) == (EPSILONS[level], True)
    reading, other = watch.readings()[level], watch.readings()[1 - level]
    assert reading.epsilon < reading.low < reading.rate < reading.high
    assert astuple(other)[1:] == (0, 0, 0.0, 1.0, 0, 0, False)


@EVERY
def test_a_bound_that_holds_is_found_broken_in_at_most_alpha_of_runs(units):
    """All answers of a unit differ, or none does: the worst case for who takes them alone."""
    answers, runs, broken = 1 if units in (ANSWERS, QUERIES) else MOST, 25, 0
    for run in range(runs):
        watch = watching(units)
        show_all(watch, outcomes(0.9 * EPSILONS[1], 150, run), 1, answers)
        assert counts(watch, 1)[0] == 150 * answers
        broken += bool(watch.tightened.any())
    assert broken <= runs * ALPHA


def test_a_level_closes_by_its_latest_answers_and_the_reading_shows_them_and_all():
    """20,000 good ones: what is shown since start is still within epsilon, and true."""
    watch = watching()
    good, bad = outcomes(0.008, 20_000), outcomes(0.1, 2_000, seed=1)
    assert show_all(watch, good) == []
    [found] = show_all(watch, bad)
    assert found.checked - len(good) < 400
    reading = watch.readings()[0]
    assert reading.tightened
    assert reading.high < reading.epsilon
    assert reading.disagreed == sum(good) + sum(bad)
    assert (reading.latest_checked, reading.latest_disagreed) == (100, sum(bad[-100:]))


def test_when_a_level_closes_does_not_depend_on_how_answers_come_in_steps():
    wrong = np.array(outcomes(0.12, 1_000))
    found = []
    for batch in 1, 7, 64:
        watch, told = watching(), []
        for part in np.array_split(wrong, range(batch, len(wrong), batch)):
            told += watch.observe([""] * len(part), np.ones(len(part), np.int64), part)
        found.append([one.checked for one in told])
    assert len(found[0]) == 1
    assert found == [found[0]] * 3


@EVERY
def test_a_closed_level_goes_on_counting_and_is_not_opened_again(units):
    watch = watching(units)
    answers = 1 if units in (ANSWERS, QUERIES) else MOST
    assert len(show_all(watch, [True] * 20, 0, answers)) == 1
    assert show_all(watch, [False] * 300, 0, answers) == []
    assert watch.tightened.tolist() == [True, False]
    assert counts(watch) == (320 * answers, 20 * answers)


@pytest.mark.parametrize("promise", [Changed(), Accuracy(), Tolerance(tolerance=0.1)])
def test_accuracy_lost_may_be_less_than_the_disagreement_so_its_bound_alone_never_closes(promise):
    """6 % of disagreement at epsilon 0.02: right and wrong answers may have changed alike."""
    watch = watching(promise=promise)
    assert len(show_all(watch, outcomes(0.06, 3000))) == 1
    assert watch.tightened.tolist() == [not isinstance(promise, Accuracy), False]
    reading = watch.readings()[0]
    assert reading.low > reading.epsilon, "what there is to see is shown"
    assert show_all(watch, outcomes(0.06, 3000, seed=1)) == [], "said once"


def test_a_watch_that_a_ledger_judges_closes_nothing_and_tells_it_each_miss_once():
    watch = watching(closes=False)
    assert show_all(watch, [True] * 100, level=1) == []
    assert not watch.tightened.any()
    show_all(watch, [True, False])
    assert watch.take_counted() == [(0.05, 100, 100), (0.02, 2, 1)]
    assert watch.take_counted() == []


# What is shown


def test_the_readings_are_plain_values_by_epsilon():
    watch = watching()
    watch.observe([*"abcd"], np.array([1, 0, 1, 1]), np.array([True, False, False, False]))
    low, high = confidence_interval(1, 3, ALPHA)
    assert watch.as_dict() == {
        0.02: {
            "checked": 1, "disagreed": 0, "rate": 0.0,
            "low": 0.0, "high": confidence_interval(0, 1, ALPHA)[1],
            "latest_checked": 1, "latest_disagreed": 0, "tightened": False,
        },
        0.05: {
            "checked": 3, "disagreed": 1, "rate": 1 / 3,
            "low": low, "high": high,
            "latest_checked": 3, "latest_disagreed": 1, "tightened": False,
        },
    }  # fmt: skip
    kinds = {type(value) for reading in watch.as_dict().values() for value in reading.values()}
    assert kinds == {int, float, bool}


# What counts once, and when


def test_of_a_longer_text_only_as_many_tokens_count_as_the_bound_speaks_of():
    watch = watching(TEXTS)
    show(watch, [False] * MOST + [True] * 100)
    assert counts(watch) == (MOST, 0)


@EVERY
def test_requests_that_are_no_shadows_end_unnoticed(units):
    watch = watching(units)
    assert let_others_end(watch, 10) == []
    assert watch.ended("never ran", ran=False) == []
    assert counts(watch) == (0, 0)


def test_texts_count_in_the_order_in_which_they_began():
    """Else short ones would come first, and those that still run would be left out."""
    watch = watching(TEXTS)
    watch.observe(["long", "short"], np.array([0, 0]), np.array([False, True]))
    watch.ended("short")
    assert counts(watch) == (0, 0)
    watch.observe(["long"], np.array([0]), np.array([False]))
    watch.ended("long")
    assert counts(watch) == (3, 1)


def test_answers_that_are_compared_later_count_where_they_began_or_never():
    """Those that differ take longer to write."""
    watch = watching()
    for name in "slow", "hangs up":
        watch.expect(name, level=0)
    watch.observe(["fast"], np.array([0]), np.array([False]))
    assert counts(watch) == (0, 0)
    watch.observe(["slow"], np.array([0]), np.array([True]))
    watch.ended("slow")
    assert counts(watch) == (1, 1), "the second may still come"
    watch.ended("hangs up")
    assert counts(watch) == (2, 1)
    kept: Any = vars(watch._units)
    assert not kept["_alone"]
    assert not kept["_to_count"]


def test_answers_about_one_text_that_are_compared_later_count_together():
    watch, parts = watching(QUESTIONS), ids("a", 3)
    for part in parts:
        watch.expect(part, level=0)
    let_others_end(watch, 10)
    for part, differs in zip(parts[:2], [True, False], strict=True):
        watch.observe([part], np.array([0]), np.array([differs]))
        watch.ended(part)
    watch.ended(parts[2])
    assert counts(watch) == (0, 0)
    let_others_end(watch)
    assert counts(watch) == (2, 1)


def test_questions_that_are_part_of_no_request_count_when_it_ends():
    watch = watching(QUESTIONS)
    watch.observe(["chatcmpl-a-00000000"], np.array([0]), np.array([True]))
    watch.ended("chatcmpl-a-00000000")
    assert counts(watch) == (1, 1)


@PARTS
def test_a_request_with_several_parts_counts_once_no_further_one_can_be_on_its_way(units):
    watch, parts = watching(units), ids("a", 3)

    def run(some: slice) -> None:
        many = len(parts[some])
        if units is QUERIES:
            for part in parts[some]:
                watch.queries.began(part, parts[0])
            scores = np.array([0.1, 0.3, 0.2]), np.array([0.9, 0.3, 0.2])
            watch.queries.compared(
                parts[some], np.zeros(many, np.int64), scores[0][some], scores[1][some]
            )
        else:
            watch.observe(parts[some], np.zeros(many, np.int64), np.array([True] * many))

    run(slice(2))
    let_others_end(watch, ENDED_SINCE - 1)
    run(slice(2, 3))  # it waited in the queue
    let_others_end(watch, ENDED_SINCE - 1)
    assert counts(watch) == (0, 0)
    let_others_end(watch, 1)
    assert counts(watch) == ((1, 1) if units is QUERIES else (3, 3))


@PARTS
def test_a_client_that_uses_one_id_for_ever_is_watched_and_takes_no_more_memory(units):
    watch = watching(units)
    for _ in range(3 * ENDED_SINCE):
        show(watch, [True], name="mine")
    assert counts(watch)[0] > MOST
    assert watch.tightened[0]
    kept: Any = vars(watch._units)
    assert max(len(kept["_of_parts"]), len(kept["_to_count"])) <= (
        ENDED_SINCE if units is QUERIES else 2
    )


def known(watch: Watch) -> list[tuple[float, int, int]]:
    let_others_end(watch)
    return watch.take_counted()


def test_documents_that_no_policy_may_decide_are_in_both_orders():
    """The first one is, and the early score of the second passes it."""
    watch = watching(QUERIES)
    compare(watch, ids("a", 3), [0.6, 0.9, 0.1], [0.6, 0.3, 0.1], [NO_LEVEL, 1, 1])
    compare(watch, ids("never decided", 2), [0.6, 0.3], [0.6, 0.3], [NO_LEVEL] * 2)
    assert known(watch) == [(0.05, 1, 1)]


@pytest.mark.parametrize("missing", ["never ran", "never compared", "began before"])
def test_a_query_with_a_document_whose_score_is_not_known_does_not_count(missing):
    """Its client hung up, another part of the policy decided it, or the watch is younger."""
    watch, parts = watching(QUERIES), ids("a", 3)
    if missing == "began before":
        for part in parts[1:]:
            watch.queries.began(part, parts[0])
        watch.queries.compared(
            parts[1:], np.ones(2, np.int64), np.array([0.1, 0.2]), np.array([0.9, 0.2])
        )
    else:
        compare(watch, parts[:2], [0.1, 0.2], [0.9, 0.2], [1, 1])
    if missing == "never ran":
        watch.ended(parts[2], ran=False)
    elif missing == "never compared":
        watch.queries.began(parts[2], parts[0])
    assert known(watch) == []


def test_a_query_with_too_many_documents_does_not_count_and_takes_no_more_memory():
    watch, many = watching(QUERIES), MOST_DOCUMENTS + 1
    compare(watch, ids("mine", many), [0.5] * many, [0.5] * many, [1] * many)
    kept: Any = vars(watch._units)
    assert len(kept["_query_of"]) == MOST_DOCUMENTS
    assert known(watch) == []
    assert not kept["_of_parts"]
    assert not kept["_query_of"]
    assert not kept["_latest_query"]


def test_a_client_with_long_ids_is_watched_and_takes_no_more_memory():
    watch = watching(QUERIES)
    compare(watch, ids("x" * 70_000, 2), [0.1, 0.2], [0.9, 0.2], [1, 1])
    kept: Any = vars(watch._units)
    assert max(map(len, [*kept["_query_of"], *kept["_of_parts"]])) == LONGEST
    assert known(watch) == [(0.05, 1, 1)]
