"""Requests that leave early at every token reproduce the oracle, whatever the scheduler does."""

from __future__ import annotations

import gc
import resource

import numpy as np
import pytest

from tests.e2e.patterns import drawn_pattern, drive, random_requests, wrong
from tests.e2e.scripted import drawn, parts
from tests.full import needed
from tests.tiny import FROM_ZERO, LAYERS
from tests.triton_on_cpu import IS_V2

SLOW = "Triton's interpreter takes 20 times as long: what V1 shows is enough"


@pytest.mark.parametrize("seed", needed(2, of=range(8)) if IS_V2 else needed(10, of=range(60)))
def test_drawn_exits_at_every_token_reproduce_the_oracle(small, reference, seed):
    pattern, ran = drawn_pattern(small, seed)
    assert wrong(reference, pattern, ran) == []


@pytest.mark.parametrize("min_rows_saved", [3, None], ids=["three rows", "where that is faster"])
@pytest.mark.parametrize("seed", needed(1, of=range(2)) if IS_V2 else needed(3, of=range(10)))
def test_rows_that_wait_for_company_before_they_leave_change_no_state(
    small, reference, min_rows_saved, seed
):
    """Of the tokens that are not settled, or left where they settled: others waited for company."""
    pattern, ran = drawn_pattern(small, 1000 + seed, min_rows_saved)
    assert wrong(reference, pattern, ran) == []


@pytest.mark.skipif(IS_V2, reason=SLOW)
def test_the_patterns_hold_what_they_are_for(small):
    patterns = [drawn_pattern(small, seed) for seed in range(12)]
    hits = [parts[0].first > 0 for _, ran in patterns for parts in ran.values()]
    assert sum(pattern.preemptions for pattern, _ in patterns) > 5
    assert sum(hits) > 10
    assert any(request.aborted for pattern, _ in patterns for request in pattern.requests)
    depths = {part.layers for _, ran in patterns for parts in ran.values() for part in parts}
    assert depths == {*FROM_ZERO, LAYERS}


@pytest.mark.full
@pytest.mark.skipif(IS_V2, reason=SLOW)
def test_a_long_soak_leaks_nothing_and_stays_right(small, reference):
    """Thousands of requests through one engine; its second half needs no more memory."""
    _, runner, scheduler = parts(small)
    generator = np.random.default_rng(7)
    waves = [random_requests(generator, 250, within=750) for _ in range(4)]
    peaks = []
    for requests in waves:
        with drawn(small, capacity=200) as ran:
            pattern = drive(small, requests)
            loop_kv = runner.model.loop.kv
            small.llm_engine.step()  # the worker hears of the last ones that ended
        assert wrong(reference, pattern, ran, every=25) == []
        assert scheduler.kv_cache_manager.usage == 0
        assert not scheduler.requests
        assert not scheduler.kv_cache_manager._unfinished
        assert not loop_kv._waiting
        assert loop_kv.taken == 0
        gc.collect()
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[-1] < 1.05 * peaks[1]
