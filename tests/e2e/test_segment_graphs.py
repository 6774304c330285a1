"""Decode steps replayed segment by segment reproduce the oracle; a stand-in records the graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm.forward_context import get_forward_context
from vllm.v1.worker.gpu_worker import Worker

from tests.e2e.patterns import Request, drive, wrong
from tests.e2e.recorded_graphs import Recorded, recorded_engine
from tests.e2e.scripted import FULL, drawn, parts
from tests.full import needed
from tests.tiny import FROM_ZERO
from tests.triton_on_cpu import IS_V2
from vllm_adainfer.engine.worker.gpu_worker import AdaInferGPUWorker

pytestmark = pytest.mark.skipif(not IS_V2, reason="Model Runner V1 captures no segments")


@pytest.fixture(scope="module", params=["TRITON_ATTN", "FLEX_ATTENTION"])
def graphed(
    tiny_model: Path, policy_from_zero: Path, request: pytest.FixtureRequest
) -> Iterator[Any]:
    with recorded_engine(tiny_model, policy_from_zero, request.param) as engine:
        yield engine


def test_a_backend_that_cannot_be_captured_runs_without_and_says_so(engine, caplog):
    model, runner, _ = parts(engine)
    runner.model_state.capture_inner_cudagraphs(
        runner.input_buffers, runner.block_tables, runner.attn_groups, runner.kv_cache_config
    )
    assert model.graphs is None
    assert "without CUDA graphs of segments: CPU_ATTN cannot be captured" in caplog.text


def replayed(engine: Any, model: Any, requests: list[Request]) -> Counter[int]:
    """Check `requests` against the oracle; segments replayed, by the rows they were padded to."""
    Recorded.replays.clear()
    with drawn(engine) as ran:
        pattern = drive(engine, requests)
    assert wrong(model, pattern, ran) == []
    return +Recorded.replays


@pytest.mark.parametrize("seed", needed(1, of=range(2)))
def test_drawn_exits_reproduce_the_oracle(graphed, reference, seed):
    """Up to five at once, more than the largest graph; steps with prompts are not replayed."""
    generator = np.random.default_rng(seed)
    requests = [
        Request(
            prompt=generator.integers(5, 1000, generator.integers(1, 8)).tolist(),
            max_tokens=int(generator.integers(4, 9)),
            seed=int(generator.integers(1000)) if place else FULL,
            arrives=int(generator.integers(0, 3)),
        )
        for place in range(5)
    ]
    assert replayed(graphed, reference, requests)


def test_three_requests_are_padded_to_a_graph_of_four(graphed, reference):
    requests = [Request([7, 8, 9 + place], max_tokens=4, seed=FULL) for place in range(3)]
    segments = len(FROM_ZERO) + 1
    assert replayed(graphed, reference, requests) == {4: 3 * segments}


def test_experts_are_told_which_rows_of_a_graph_are_padding(graphed, reference):
    """By the mask that routers of mixtures read; the rows come after those of another batch."""
    model, _, _ = parts(graphed)
    masks = []

    def look(*_: Any) -> None:
        masks.append(get_forward_context().is_padding.tolist())

    layer = model.model.layers[0].register_forward_pre_hook(look)
    try:
        for count in (4, 3):
            requests = [Request([7, 8, 9 + place], 2, seed=FULL) for place in range(count)]
            assert replayed(graphed, reference, requests)
            assert masks.pop() == [place >= count for place in range(4)]
    finally:
        layer.remove()


def test_no_graph_is_replayed_for_a_request_with_several_rows(graphed, reference):
    one_token = Request([5, 6, 7, 8], max_tokens=1, seed=3)
    assert replayed(graphed, reference, [one_token]) == {}


def test_graphs_captured_to_measure_what_they_take_are_not_replayed(
    graphed, reference, monkeypatch
):
    """VLLM's worker captures once to measure, with a cache that is gone afterwards."""
    model, runner, _ = parts(graphed)
    captured = model.graphs
    monkeypatch.setattr(Worker, "determine_available_memory", lambda _: 7)
    worker = object.__new__(AdaInferGPUWorker)
    worker.model_runner = runner
    try:
        assert worker.determine_available_memory() == 7
        requests = [Request([7, 8], max_tokens=4, seed=FULL)]
        assert replayed(graphed, reference, requests) == {}
    finally:
        model.graphs = captured
