"""Kinds that recur stay known through any flood of others, and all requests are counted."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable

import pytest

from vllm_adainfer.auto.kinds import Kind
from vllm_adainfer.auto.table import (
    FEWEST_SETS,
    KINDS,
    MOST_LABELS,
    NAMED,
    NO_KIND,
    OTHERS,
    RECURRING_KINDS,
    RECURS,
    KindTable,
    pools,
)
from vllm_adainfer.promise import label_subsets

SALT = b"salt"
YES_NO, LETTERS = Kind("label", (7, 11)), Kind("choice", choices=("a", "b", "c"))


COUNTS = dict.fromkeys(
    ("requests", "prompt_tokens", "longest_prompt", "tokens", "first", "last"), RECURS
)
KIND = {"reads": "label", "labels": [[1], [2]]}  # not of tokens


def unique(number: int) -> Kind:
    """The kind of a list that no other request has."""
    return Kind("label", (10_000 + 2 * number, 10_001 + 2 * number))


def came(table: KindTable, kinds: Iterable[Kind | None], rows: int = 1) -> None:
    for kind in kinds:
        table.arrived(kind, 5, now=1.0).tokens += rows
        table.tokens += rows


def test_a_kind_has_its_requests_their_prompts_and_their_rows():
    table = KindTable(SALT)
    for number, prompt in enumerate((3, 40, 8) * 10):
        table.arrived(YES_NO, prompt, now=100.0 + number).tokens += prompt
    [count] = table.recurring()
    assert vars(count) == {
        "kind": YES_NO,
        "requests": 30,
        "prompt_tokens": 510,
        "longest_prompt": 40,
        "tokens": 510,
        "first": 100.0,
        "last": 129.0,
    }


@pytest.mark.parametrize("requests", [RECURS - 1, RECURS])
def test_a_kind_recurs_from_so_many_requests_on(requests):
    table = KindTable(SALT)
    came(table, [YES_NO] * requests)
    assert [count.kind for count in table.recurring()] == [YES_NO] * (requests == RECURS)


def test_a_flood_of_lists_unique_to_a_request_drives_out_no_kind_that_recurs():
    table = KindTable(SALT)
    came(table, [YES_NO] * RECURS)
    came(table, map(unique, range(10 * KINDS)))
    came(table, [YES_NO])
    [count] = table.recurring()
    assert (count.kind, count.requests) == (YES_NO, RECURS + 1)
    assert len(list(table)) == KINDS
    assert table.requests == 10 * KINDS + RECURS + 1


def test_of_too_many_kinds_that_recur_the_one_that_came_least_lately_goes():
    table = KindTable(SALT)
    for number in range(RECURRING_KINDS):
        came(table, [unique(number)] * RECURS)
    came(table, [unique(0)])
    came(table, [YES_NO] * RECURS)
    kinds = {count.kind for count in table.recurring()}
    assert len(kinds) == RECURRING_KINDS
    assert unique(1) not in kinds
    assert {YES_NO, unique(0)} <= kinds


def test_a_new_kind_comes_to_recur_however_many_others_do():
    """Also between lists that are unique, as long as its requests are not too far apart."""
    table = KindTable(SALT)
    for number in range(2 * KINDS):
        came(table, [unique(number)] * RECURS)
    for number in range(RECURS):
        came(table, [LETTERS])
        came(table, map(unique, range(10_000 + 60 * number, 10_060 + 60 * number)))
    assert LETTERS in {count.kind for count in table.recurring()}


def test_counts_go_on_from_a_file():
    before = KindTable(SALT)
    came(before, [YES_NO] * RECURS + [LETTERS] * 2 * RECURS + [None] * 7, rows=3)
    content = json.loads(json.dumps(before.as_dict()))
    assert content["kinds"].keys() == {YES_NO.name(SALT), LETTERS.name(SALT)}
    table = KindTable(SALT)
    table.restore(content)
    assert table.as_dict() == before.as_dict()
    came(table, [YES_NO, None])
    counted = table.as_dict()["kinds"][YES_NO.name(SALT)]
    assert (counted["requests"], table.requests) == (RECURS + 1, 3 * RECURS + 9)


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        [],
        {},
        {"kinds": 3},
        {"kinds": {"a": {}}, "since": 1, "requests": 1, "tokens": 1},
        {"kinds": {}, "since": "x", "requests": 1, "tokens": 1},
        {"kinds": {}, "since": 1, "requests": math.inf, "tokens": 1},
        {"kinds": {"a": {**COUNTS, "kind": KIND}}, "since": 1, "requests": 1, "tokens": 1},
    ],
)
def test_a_damaged_file_is_as_none(damaged):
    table = KindTable(SALT)
    table.restore(damaged)
    assert (table.requests, table.tokens, table.recurring()) == (0, 0, [])


def after_restart(kinds: Iterable[Kind]) -> KindTable:
    """A table that goes on from one to which these have come."""
    before, table = KindTable(SALT), KindTable(SALT)
    came(before, kinds)
    table.restore(before.as_dict())
    return table


def test_only_a_few_kinds_that_recur_get_labels_of_their_own():
    table = after_restart([YES_NO] * RECURS)
    kinds = [YES_NO, *map(unique, range(2 * NAMED))]
    given = {
        kind: [table.label_of(table.arrived(kind, 5, 1.0)) for _ in range(40)] for kind in kinds
    }
    assert given[YES_NO] == [YES_NO.name(SALT)] * 40
    for kind in kinds[1:NAMED]:
        assert given[kind] == [OTHERS] * RECURS + [kind.name(SALT)] * (40 - RECURS)
    for kind in kinds[NAMED:]:
        assert given[kind] == [OTHERS] * 40
    assert table.reads == {kind.name(SALT): "label among 2" for kind in kinds[:NAMED]}
    assert table.label_of(table.arrived(None, 5, 1.0)) == NO_KIND


def test_a_kind_that_was_forgotten_and_comes_again_keeps_its_label():
    table = after_restart([YES_NO] * RECURS)
    for number in range(RECURRING_KINDS):
        came(table, [unique(number)] * RECURS)
    assert table.label_of(table.arrived(YES_NO, 5, 1.0)) == YES_NO.name(SALT)


def subsets(count: int, size: int, of: int, seed: int = 0) -> list[Kind]:
    draw = random.Random(seed)
    return [Kind("label", tuple(sorted(draw.sample(range(of), size)))) for _ in range(count)]


def pools_of(kinds: Iterable[Kind]) -> list[tuple[int, int, int]]:
    """Labels, sets and requests of each pool candidate."""
    table = KindTable(SALT)
    came(table, kinds)
    return [(len(one["labels"]), one["sets"], one["requests"]) for one in pools(table)]


def test_many_sets_of_the_same_few_labels_are_a_pool_candidate():
    kinds = subsets(60, size=4, of=12)
    assert pools_of(kinds) == [(12, len(set(kinds)), 60)]


def test_labels_of_unrelated_questions_and_of_texts_are_none():
    assert pools_of(map(unique, range(100))) == []
    assert pools_of([YES_NO, LETTERS] * 50) == []
    few = [Kind("label", (1, number)) for number in range(2, 1 + FEWEST_SETS)]
    assert pools_of(few * 30) == []


def test_pools_of_another_adapter_or_with_too_many_labels_are_others():
    kinds = subsets(60, size=4, of=12)
    lora = [Kind("label", kind.labels, adapter="lora") for kind in kinds[:30]]
    found = pools_of([*kinds, *lora])
    assert [requests for _, _, requests in found] == [60, 30]
    assert all(labels <= MOST_LABELS for labels, _, _ in pools_of(subsets(250, 20, of=500)))


def test_a_pool_that_is_found_is_one_that_a_policy_can_be_for():
    assert MOST_LABELS == label_subsets.MOST_LABELS


def test_a_pool_with_many_requests_is_a_kind_and_what_is_often_asked_together_stays_one():
    table, often = KindTable(SALT), Kind("label", (1, 2))
    for number in range(40):
        for kind in (often, Kind("label", (1, 3 + number % 12)), Kind("label", (7, 40 + number))):
            table.arrived(table.pool_of(kind), 5, 0.0)
    table.find_pools()
    assert not table.pools, "too few requests so far"
    for number in range(400):
        table.arrived(table.pool_of(Kind("label", (1, 3 + number % 12))), 5, 0.0)
        table.arrived(table.pool_of(often), 5, 0.0)
    table.find_pools()
    [(pool, own)] = table.pools.items()
    assert pool.is_pool
    assert often in own
    assert table.pool_of(often) == often
    assert table.pool_of(Kind("label", (1, 4, 5))) == pool
    for other in (
        Kind("label", (1, 999)),
        Kind("label", (1, 4), adapter="mood"),
        Kind("probabilities", (1, 4)),
        Kind("label", (1,)),
    ):
        assert table.pool_of(other) == other
    table.find_pools()
    assert len(table.pools) == 1, "it is found once"
    again = KindTable(SALT)
    again.restore(json.loads(json.dumps(table.as_dict())))
    assert again.pools == table.pools
