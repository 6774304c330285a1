"""What a soak is judged by: waits beside stock's, the longest silence, and memory that grows on."""

from __future__ import annotations

import pytest

from benchmarks.soak.soak_verdict import Wait, still_grows, summaries, worse_than_stock


def waits(*seconds: float) -> list[Wait]:
    """One client's waits, one after the other."""
    begin = [sum(seconds[:number]) for number in range(len(seconds))]
    return [Wait("sst2", *one) for one in zip(begin, seconds, strict=True)]


def test_waits_are_told_by_kind_with_the_longest_time_without_any_answer():
    found = summaries([*waits(1, 2, 1), Wait("trec", 0, 10)])
    assert found["answers"] == 4
    assert found["worst_seconds"] == 10
    assert found["longest_silence_seconds"] == 6  # from 4 to 10
    assert found["kinds"]["sst2"]["median_seconds"] == 1
    assert set(found["kinds"]) == {"sst2", "trec"}


def test_a_stall_that_stock_does_not_have_is_a_problem():
    stock = summaries(waits(*[0.5] * 300))
    stalled = summaries(waits(*[0.5] * 299, 120))
    assert worse_than_stock(stock, stock) == []
    worst, silence = worse_than_stock(stalled, stock)
    assert worst == "worst of good clients' waits: 120.00 s, on stock 0.50 s"
    assert silence.startswith("longest silence")
    assert worse_than_stock(stock, stalled) == []


def samples(*mib: float) -> list[dict[str, float]]:
    return [{"seconds": 60.0 * minute, "uss": one} for minute, one in enumerate(mib)]


@pytest.mark.parametrize(
    ("mib", "grows"),
    [
        ([0, 500, 700, 800, 850, 900, 950, 900], False),  # the first minutes fill caches
        ([0, 500, 700, 800, 850, 900, 950, 1001], True),
        ([0, 500, 700, 800, 850, 900, 1001, 900], True),
        ([0, 5000], False),  # too short to say
    ],
)
def test_memory_that_grows_after_the_first_minutes_is_a_problem(mib, grows):
    assert bool(still_grows(samples(*mib))) == grows
