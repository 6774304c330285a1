from __future__ import annotations

from itertools import count

import numpy as np
import pytest
from numpy.random import Generator

from vllm_adainfer.monitoring.monitor import AnswerMonitor
from vllm_adainfer.monitoring.text_monitor import RATES, STAKES, Capital, TextMonitor

EPSILON, LONGEST, ALPHA = 0.05, 20, 0.1
names = map(str, count())
Text = list[bool]


def monitor_of(*epsilons: float) -> TextMonitor:
    return TextMonitor(epsilons or (EPSILON,), ALPHA, LONGEST)


def watch(monitor: TextMonitor, text: Text, level: int = 0) -> None:
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
