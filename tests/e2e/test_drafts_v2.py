"""Drafts on Model Runner V2, and with steps scheduled ahead: what requests get is stock vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.byte_model import save_byte_model
from tests.conftest import tiny_engine
from tests.e2e.drafted_traffic import (
    Ask,
    Got,
    assert_same,
    counted_drafts,
    served,
    traffic,
)
from tests.e2e.scripted import parts
from tests.e2e.test_async_scheduling import asynchronous_scheduling
from tests.full import needed
from tests.tiny import tiny_artifact
from tests.triton_on_cpu import IS_V2
from vllm_adainfer.engine.scheduler.scheduler import AdaInferAsyncScheduler

pytestmark = pytest.mark.skipif(not IS_V2, reason="see test_drafts for Model Runner V1")

ENGINE: dict[str, Any] = {
    "max_model_len": 256,
    "kv_cache_memory_bytes": 64 << 20,
    "structured_outputs_config": {"backend": "xgrammar"},
}
REPEATING = ["enums", "booleans", "tag"]  # grammars whose answers soon repeat
SMALL_CACHE = {"num_gpu_blocks_override": 9, "kv_cache_memory_bytes": 8 << 20}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def stock(model) -> Any:
    return tiny_engine(model, None, **ENGINE)


@pytest.fixture(scope="module")
def stocks_answers(stock) -> Callable[[int], tuple[list[Ask], list[Got]]]:
    """Traffic by its seed, and what stock answers."""

    @cache
    def of(seed: int) -> tuple[list[Ask], list[Got]]:
        asks = traffic(seed, 14 if seed == 0 else 40, REPEATING)
        return asks, served(stock, asks)

    return of


def drafting(
    model: Path, is_ahead: bool, switch: Mapping[str, Any] | None = None, **settings: Any
) -> Any:
    """An engine that drafts; `is_ahead`: and schedules a step while the last one runs."""
    adainfer = {"draft_structure": True, **(switch or {})}
    with asynchronous_scheduling() if is_ahead else nullcontext():
        llm = tiny_engine(model, adainfer, **{**ENGINE, **settings})
    assert isinstance(parts(llm)[2], AdaInferAsyncScheduler) == is_ahead
    return llm


@pytest.fixture(scope="module")
def engines(model) -> Callable[[str], Any]:
    return cache(lambda kind: drafting(model, **KINDS[kind]))


KINDS: dict[str, dict[str, Any]] = {
    "steps ahead, preempting": {"is_ahead": True, **SMALL_CACHE},
    "steps one by one": {"is_ahead": False},
    "steps ahead": {"is_ahead": True},
    "small steps ahead": {"is_ahead": True, "max_num_batched_tokens": 24},
}


@pytest.mark.parametrize("seed", needed(1, of=range(2)))
@pytest.mark.parametrize("kind", needed(1, of=KINDS))
def test_mixed_traffic_gets_stocks_answers(engines, stocks_answers, kind, seed):
    asks, theirs = stocks_answers(seed)
    llm = engines(kind)
    with counted_drafts(llm) as counted:
        assert_same(served(llm, asks), theirs, asks)
    assert counted.kept.total() > 5
    assert (counted.preempted > 0) == ("preempting" in kind)


@pytest.fixture(scope="module")
def with_exits(model, tmp_path_factory) -> Any:
    """Of our model class, whose steps know the position of each row."""
    policy = tiny_artifact(model, tmp_path_factory.mktemp("artifact") / "policy")
    switch = {"artifact": str(policy), "finish_choices": False}
    return drafting(model, is_ahead=True, switch=switch)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2))
def test_drafts_in_flight_when_the_cache_is_reset_are_forgotten(
    with_exits, stocks_answers, seed, monkeypatch
):
    """Their requests start again in the very next step, before that of the draft has ended."""
    asks, theirs = stocks_answers(seed)
    scheduler, steps = parts(with_exits)[2], count(1)
    schedule, reset, ran_on = scheduler.schedule, [0], []

    def resetting(*args: Any) -> Any:
        step_number = next(steps)
        verifies = any(one.scheduled_spec_decode_tokens for one, _ in scheduler._running)
        if verifies and step_number >= reset[-1] + 8:
            reset.append(step_number)
            scheduler.reset_prefix_cache(reset_running_requests=True)
        step = schedule(*args)
        for earlier, _ in list(scheduler._running)[:-1]:
            verified = earlier.scheduled_spec_decode_tokens.keys()
            ran_on.extend(verified & step.num_scheduled_tokens.keys() - step.preempted_req_ids)
        return step

    monkeypatch.setattr(scheduler, "schedule", resetting)
    with counted_drafts(with_exits) as counted:
        assert_same(served(with_exits, asks), theirs, asks)
    assert len(reset) > 3
    assert ran_on == [], "nobody knows where the next row of these stands"
    assert counted.kept.total() > 5
