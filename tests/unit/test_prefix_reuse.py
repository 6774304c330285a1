"""Prefixes that come again are completed at once where that costs less than to exit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest

from vllm_adainfer.engine.scheduler.prefix_reuse import HORIZON, PRIOR, PrefixReuse

BLOCKS: Iterator[str] = map(chr, count(1000))


def fresh(blocks: int) -> list[bytes]:
    """Hashes that no request has had."""
    return [next(BLOCKS).encode() for _ in range(blocks)]


def asked(reuse: PrefixReuse, hashes: list[bytes], policy: str | None = "policy") -> None:
    """A step with one request."""
    reuse.new_step()
    reuse.add(policy, hashes)


def test_the_share_is_of_new_blocks_that_came_again_in_a_later_step():
    reuse = PrefixReuse(100)
    assert reuse.expected("policy", fresh(2)) == 0
    for _ in range(6):
        request = fresh(2)
        asked(reuse, request)
        for _ in range(3):  # a third touch says no more than the second
            asked(reuse, request[:1])
    assert reuse.expected("policy", fresh(2)) == pytest.approx(6 * 0.5 / (6 + PRIOR))
    assert reuse.expected("policy", request) == 0, "none of its blocks is new"


def test_a_touch_in_the_same_step_costs_nothing_and_does_not_count():
    reuse = PrefixReuse(100)
    for _ in range(6):
        request = fresh(2)
        asked(reuse, request)
        reuse.add("policy", request)
        asked(reuse, request)
    assert reuse.expected("policy", fresh(2)) == 0


def test_policies_and_lengths_are_told_apart():
    """A long new prefix is a state, a short one a question."""
    reuse = PrefixReuse(1000)
    for _ in range(10):
        state = fresh(12)
        asked(reuse, state + fresh(1))
        asked(reuse, state + fresh(1))
        asked(reuse, state + fresh(1), policy="other")
    assert reuse.expected("policy", fresh(12)) > 0.5
    assert reuse.expected("policy", fresh(1)) == 0
    assert reuse.expected("other", fresh(12)) == 0


def test_requests_that_may_not_exit_count_as_touches_alone():
    reuse = PrefixReuse(100)
    for _ in range(6):
        request = fresh(1)
        asked(reuse, request)
        asked(reuse, request, policy=None)
        asked(reuse, fresh(1), policy=None)
    assert reuse.expected("policy", fresh(1)) == pytest.approx(6 / (6 + PRIOR))


def test_the_share_follows_the_requests_of_the_day():
    reuse = PrefixReuse(10_000)
    for again in 1, 0, 1:
        for _ in range(int(3 * HORIZON)):
            request = fresh(1)
            asked(reuse, request)
            if again:
                asked(reuse, request)
        assert reuse.expected("policy", fresh(1)) == pytest.approx(again, abs=0.05)


def test_no_more_blocks_are_remembered_than_there_are():
    reuse = PrefixReuse(3)
    for _ in range(6):
        first = fresh(2)
        asked(reuse, first)
        asked(reuse, fresh(2))
        asked(reuse, first[:1])
    assert reuse.expected("policy", fresh(2)) == 0
