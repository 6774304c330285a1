from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.tiny import LAYERS
from tests.unit.reported import reading, report
from vllm_adainfer.frontend.log_line import LogLines

WORK = [
    ("layers_run", "a", 300),
    ("layers_skipped", "a", 100),
    ("tokens", "a", "2", 3),
    ("tokens", "a", "6", 1),
]
TIME = [("seconds", 2.0), ("probe_seconds", 0.05)]


@pytest.fixture
def line() -> LogLines:
    return LogLines(LAYERS)


@pytest.mark.parametrize(
    ("reports", "text"),
    [
        ([report(*WORK)], "mean exit layer 3.0/6, layers saved 25%"),
        (
            [report(*WORK, *TIME)],
            "mean exit layer 3.0/6, layers saved 25%, probes 2.5% of the time",
        ),
        (
            [report(*WORK), report(("tokens", "b", "6", 4), ("layers_run", "b", 400))],
            "mean exit layer 4.5/6, layers saved 12%",
        ),
        ([report(("tokens", "full_depth", "6", 1))], "mean exit layer 6.0/6, layers saved 0%"),
    ],
    ids=["one policy", "with times", "policies together", "no work counted yet"],
)
def test_the_line_sums_up_what_was_reported(line, reports, text):
    for one in reports:
        line.add(one)
    assert line.take() == [text]


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"weights_differ": True}, ", no exits, because the policies are not for these weights"),
        ({"failed_parts": ("kernels", "exits")}, ", switched off by the self-test: kernels, exits"),
        ({"not_tested": "there is no room"}, ", not tested on this device: there is no room"),
    ],
)
def test_the_line_says_why_there_are_no_exits_while_there_are_none(line, state, said):
    for why in (state, {}):
        line.add(report(*WORK, **why))
        assert line.take() == ["mean exit layer 3.0/6, layers saved 25%" + said * bool(why)]


@pytest.mark.parametrize("added", [[], TIME, WORK[:2]], ids=["nothing", "time", "prompts only"])
def test_there_is_no_line_where_nothing_was_decided(line, added):
    line.add(report(*added))
    assert line.take() == []


def test_each_line_starts_from_nothing(line):
    line.add(report(*WORK, *TIME))
    line.take()
    assert line.take() == []
    line.add(report(("tokens", "a", "4", 1), ("layers_run", "a", 4)))
    assert line.take() == ["mean exit layer 4.0/6, layers saved 0%"]


def test_shadow_answers_are_logged_with_their_interval_for_each_bound_that_has_some(line):
    a = [reading(0.02, 40, 1, low=0.001, high=0.123), reading(0.05, 0, 0)]
    b = [reading(0.05, 160, 53, low=0.21, high=0.47, tightened=True)]
    b[0] |= {"latest_checked": 100, "latest_disagreed": 40}
    line.add(report(*WORK, a=a, b=b))
    [text] = line.take()
    assert text == (
        "mean exit layer 3.0/6, layers saved 25%, "
        "shadow disagreement of a at 0.02 2.5% [0.1, 12.3], "
        "shadow disagreement of b at 0.05 33.1% [21.0, 47.0], 40 of the latest 100: "
        "now at full depth"
    )


def test_the_latest_counts_of_shadow_answers_are_logged_because_they_are_totals(line):
    line.add(report(*WORK, a=[reading(0.02, 40, 1)]))
    line.add(report(*WORK, a=[reading(0.02, 50, 1, high=0.2)]))
    assert "at 0.02 2.0% [0.0, 20.0]" in str(line.take())


def test_deferred_work_is_neither_run_nor_saved(line):
    line.add(report(*WORK, ("layers_deferred", "a", 5000)))
    assert line.take() == ["mean exit layer 3.0/6, layers saved 25%"]


KINDS = [
    ("kind-a", "label among 2", 30, 400),
    ("kind-b", "choice among 3", 10, 100),
    ("none", "", 7, 500),
]


def of_kinds(told: Sequence[tuple[str, str, int, int]]) -> dict[str, Any]:
    """The report of names, what is read, requests and token rows."""
    requests = [("kind_requests", name, count) for name, _, count, _ in told]
    tokens = [("kind_tokens", name, count) for name, _, _, count in told]
    return {"added": [*requests, *tokens], "reads": {name: reads for name, reads, *_ in told}}


def test_kinds_are_told_under_their_names_with_their_share_of_all_token_rows(line):
    line.add(of_kinds(KINDS))
    assert line.take() == [
        "of the token rows, one-answer requests are: kind-a (label among 2): 30 requests, 40%; "
        "kind-b (choice among 3): 10 requests, 10%"
    ]
    assert line.take() == []


def test_only_the_kinds_that_ran_most_are_named(line):
    few = [(f"kind-{number}", "label among 2", 1, 100 + number) for number in range(5)]
    for told in few, [("others", "", 3, 90)]:
        line.add(of_kinds(told))
    [text] = line.take()
    assert [name for name, *_ in few if name in text] == ["kind-2", "kind-3", "kind-4"]
    assert text.endswith("; other kinds: 48%")


def of_drafts(drafted: int, kept: int, grammar: str = "g") -> dict[str, Any]:
    return {"added": [("structure_drafted", grammar, drafted), ("structure_kept", grammar, kept)]}


def test_drafts_since_the_last_line_are_told_with_how_many_were_kept(line):
    for one in of_drafts(30, 20), of_drafts(10, 10, "another grammar"):
        line.add(one)
    assert line.take() == ["structured answers: 40 tokens drafted, 30 kept (75%)"]
    assert line.take() == []
    line.add(of_drafts(3, 0))
    assert line.take() == ["structured answers: 3 tokens drafted, 0 kept (0%)"]


def test_there_is_no_line_about_kinds_where_none_came(line):
    line.add(of_kinds([("none", "", 3, 50)]))
    assert line.take() == []


def test_kinds_drafts_and_exits_have_a_line_each_and_their_reports_come_in_any_steps(line):
    for one in report(*WORK), of_kinds(KINDS), of_drafts(4, 3):
        line.add(one)
    exits, drafts, kinds = line.take()
    assert drafts.startswith("structured answers: ")
    assert exits == "mean exit layer 3.0/6, layers saved 25%"
    assert kinds.startswith("of the token rows, one-answer requests are: kind-a")
