from __future__ import annotations

from itertools import count

import numpy as np
import pytest
from numpy.random import Generator

from vllm_adainfer.engine.compat.requests import request_group
from vllm_adainfer.monitoring.group_monitor import RATES, STAKES, Capital, GroupMonitor
from vllm_adainfer.monitoring.monitor import AnswerMonitor
from vllm_adainfer.monitoring.query_monitor import ENDED_SINCE

EPSILON, LONGEST, ALPHA = 0.05, 20, 0.1
names = map(str, count())
Text = list[bool]


def monitor_of(*epsilons: float) -> GroupMonitor:
    return GroupMonitor(epsilons or (EPSILON,), ALPHA, LONGEST)


def watch(monitor: GroupMonitor, text: Text, level: int = 0) -> None:
    """A whole text, token by token."""
    name = next(names)
    for differs in text:
        monitor.observe([name], np.array([level]), np.array([differs]))
    monitor.ended(name)


def clustered(generator: Generator, share: float) -> Text:
    """A text; so large a `share` of them goes its own way from the middle on, and runs longest."""
    if generator.random() < share:
        return [place >= LONGEST // 2 for place in range(LONGEST)]
    return [False] * int(generator.integers(1, LONGEST + 1))


def rate_of(share: float) -> float:
    """Tokens that differ, of all."""
    differing, tokens = share * LONGEST / 2, share * LONGEST + (1 - share) * (LONGEST + 1) / 2
    return differing / tokens


def test_texts_that_keep_a_bound_seldom_break_it_though_their_tokens_taken_alone_often_do():
    """Disagreement comes in texts: what tokens taken as independent would say is wrong."""
    generator, share = np.random.default_rng(0), 0.05
    assert 0.04 < rate_of(share) < EPSILON
    paths, texts, broken, broken_by_tokens = 40, 150, 0, 0
    for _ in range(paths):
        by_text, by_token = monitor_of(), AnswerMonitor([EPSILON], ALPHA)
        for _ in range(texts):
            text = clustered(generator, share)
            watch(by_text, text)
            by_token.observe(["x"] * len(text), np.zeros(len(text), dtype=np.int64), np.array(text))
        broken += bool(by_text.tightened[0])
        broken_by_tokens += bool(by_token.tightened[0])
    assert broken <= paths * ALPHA
    assert broken_by_tokens > paths * ALPHA


@pytest.mark.parametrize("seed", range(5))
def test_texts_that_differ_more_than_twice_as_often_are_found_in_some_hundred(seed):
    generator, monitor = np.random.default_rng(seed), monitor_of()
    for _ in range(400):
        watch(monitor, clustered(generator, 0.2))
    assert monitor.tightened[0]
    [status] = monitor.status()
    assert EPSILON < status.low < status.rate < status.high


@pytest.mark.parametrize("share", [0.02, 0.2])
def test_looked_at_after_every_text_the_interval_misses_the_truth_in_at_most_alpha_of_paths(share):
    generator = np.random.default_rng(1)
    truth, paths, missed = rate_of(share), 60, 0
    for _ in range(paths):
        monitor = monitor_of()
        for _ in range(100):
            watch(monitor, clustered(generator, share))
            [status] = monitor.status()
            if not status.low <= truth <= status.high:
                missed += 1
                break
    assert missed <= paths * ALPHA + 2.33 * np.sqrt(paths * ALPHA * (1 - ALPHA))


def test_texts_count_in_the_order_in_which_they_began():
    """Else short ones would come first, and those that still run would be left out."""
    monitor = monitor_of()
    monitor.observe(["long", "short"], np.array([0, 0]), np.array([False, True]))
    monitor.ended("short")
    assert monitor.status()[0].checked == 0
    monitor.observe(["long"], np.array([0]), np.array([False]))
    monitor.ended("long")
    [status] = monitor.status()
    assert (status.checked, status.disagreed) == (3, 1)


def test_of_a_longer_text_only_as_many_tokens_count_as_the_bound_speaks_of():
    monitor = monitor_of()
    watch(monitor, [False] * LONGEST + [True] * 100)
    [status] = monitor.status()
    assert (status.checked, status.disagreed) == (LONGEST, 0)


def test_a_text_is_of_the_level_it_was_decided_with_and_only_that_is_tightened():
    monitor = monitor_of(0.02, 0.05)
    for _ in range(100):
        watch(monitor, [True] * 5, level=1)
        watch(monitor, [False] * 5, level=0)
    assert monitor.tightened.tolist() == [False, True]
    assert [one.checked for one in monitor.status()] == [500, 500]


def test_requests_that_are_no_shadows_end_unnoticed():
    monitor = monitor_of()
    assert monitor.ended("never seen") == []
    assert monitor.status()[0].checked == 0


def of_requests(*epsilons: float) -> GroupMonitor:
    return GroupMonitor(epsilons or (EPSILON,), ALPHA, LONGEST, group_of=request_group)


def ids(name: str, parts: int) -> list[str]:
    """vLLM's ids of the parts of a decision request."""
    return [f"decision-{name}-{part}-{part:08x}" for part in range(parts)]


def ask(monitor: GroupMonitor | AnswerMonitor, differ: list[bool], name: str | None = None) -> None:
    """One HTTP request with several questions about one text."""
    parts = ids(next(names) if name is None else name, len(differ))
    monitor.observe(parts, np.zeros(len(parts), dtype=np.int64), np.array(differ))
    for part in parts:
        monitor.ended(part)


def let_others_end(monitor: GroupMonitor, requests: int = ENDED_SINCE) -> None:
    for _ in range(requests):
        monitor.ended(next(names))


def test_questions_of_one_text_that_keep_a_bound_seldom_break_it_though_taken_alone_they_often_do():
    """Where early answers about a text are wrong, all of them are."""
    generator, runs = np.random.default_rng(0), 25
    broken = {"by text": 0, "by answer": 0}
    for _ in range(runs):
        by_text, by_answer = of_requests(), AnswerMonitor([EPSILON], ALPHA)
        for wrong in generator.random(150) < 0.9 * EPSILON:
            ask(by_text, [wrong] * LONGEST)
            ask(by_answer, [wrong] * LONGEST)
        let_others_end(by_text)
        assert by_text.status()[0].checked == by_answer.status()[0].checked
        broken["by text"] += bool(by_text.tightened[0])
        broken["by answer"] += bool(by_answer.tightened[0])
    assert broken["by text"] <= runs * ALPHA
    assert broken["by answer"] > runs * ALPHA


def test_texts_whose_answers_change_too_often_are_found_however_many_questions_each_has():
    monitor, generator = of_requests(), np.random.default_rng(0)
    for wrong in generator.random(200) < 0.3:
        ask(monitor, [wrong] * int(generator.integers(1, LONGEST + 1)))
    let_others_end(monitor)
    assert monitor.tightened[0]


def test_a_request_with_several_questions_counts_once_no_further_one_can_be_on_its_way():
    monitor = of_requests()
    first, second, third = ids("a", 3)
    monitor.observe([first, second], np.array([0, 0]), np.array([False, True]))
    monitor.ended(first)
    monitor.ended(second)
    let_others_end(monitor, ENDED_SINCE - 3)
    monitor.observe([third], np.array([0]), np.array([True]))  # it waited in the queue
    let_others_end(monitor, ENDED_SINCE - 1)
    assert monitor.status()[0].checked == 0
    let_others_end(monitor, 1)
    [status] = monitor.status()
    assert (status.checked, status.disagreed) == (3, 2)


def test_a_request_that_is_part_of_none_counts_when_it_ends():
    monitor = of_requests()
    monitor.observe(["chatcmpl-a-00000000"], np.array([0]), np.array([True]))
    monitor.ended("chatcmpl-a-00000000")
    assert monitor.status()[0].checked == 1


def test_a_client_that_uses_one_id_for_ever_is_watched_again_and_again_and_takes_no_more_memory():
    monitor = of_requests()
    for _ in range(10 * ENDED_SINCE):
        ask(monitor, [True], name="mine")
    assert monitor.status()[0].checked > LONGEST
    assert monitor.tightened[0]
    assert len(monitor._of_parts) + len(monitor._to_count) + len(monitor._alone) <= 2


def slow_capital(texts: list[tuple[float, float]], p: float) -> tuple[float, float]:
    """Its definition, in plain numbers."""
    above = below = 0.0
    for stake in STAKES:
        held = [1.0, 1.0]
        for disagreed, checked in texts:
            held[0] *= 1 + stake * (disagreed - p * checked) / p
            held[1] *= 1 + stake * (p * checked - disagreed) / (1 - p)
        above, below = above + held[0] / len(STAKES), below + held[1] / len(STAKES)
    return above, below


def test_the_interval_lies_between_the_rates_against_which_capital_has_reached_two_over_alpha():
    generator = np.random.default_rng(2)
    checked = generator.random(60)
    texts = [
        (c * float(d), float(c)) for c, d in zip(checked, generator.random(60) < 0.3, strict=True)
    ]
    capital = Capital(RATES)
    for text in texts:
        capital.bet(*text)
    low, high = capital.interval(ALPHA)
    held = {p: slow_capital(texts, p) for p in RATES}
    assert low == max(p for p, (above, _) in held.items() if above >= 2 / ALPHA)
    assert high == min(p for p, (_, below) in held.items() if below >= 2 / ALPHA)
    assert 0 < low < high < 1
