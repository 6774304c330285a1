"""Exits on a GPU: compiled segments, CUDA graphs, each attention backend, against the oracle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.offline.scripted_requests import scripted_request
from tests.conftest import small_engine, tiny_engine
from tests.e2e.asking import tokens
from tests.e2e.patterns import drawn_pattern, wrong
from tests.e2e.scripted import parts
from vllm_adainfer.engine.self_test.self_test import self_test

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module", params=["TRITON_ATTN", "FLEX_ATTENTION"])
def on_gpu(tiny_model: Path, tiny_policy: Path, request: pytest.FixtureRequest) -> Any:
    """An engine as it is served: compiled, with graphs; fp32, which these backends take.

    Triton's products of fp32 are TF32 unless it is told otherwise, and those err by up to 0.02.
    """
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
    return small_engine(
        tiny_model,
        tiny_policy,
        enforce_eager=False,
        attention_backend=request.param,
        gpu_memory_utilization=0.05,
    )


def test_segments_are_captured(on_gpu):
    model, _, _ = parts(on_gpu)
    assert model.graphs is not None


def as_served(model: Path, switch: dict[str, Any] | None, **settings: Any) -> Any:
    """An engine with vLLM's defaults: its own backend (FlashAttention), bfloat16, graphs."""
    return tiny_engine(
        model,
        switch,
        "bfloat16",
        **{
            "enforce_eager": False,
            "max_model_len": 512,
            "gpu_memory_utilization": 0.05,
            **settings,
        },
    )


@pytest.fixture(scope="module")
def default(tiny_model: Path) -> Any:
    return as_served(tiny_model, {"exit_script": [2, 4], "min_rows_saved": 1})


def generated(llm: Any, exits: list[int | None]) -> list[list[int]]:
    """Sixteen tokens after each of some prompts, all of whose tokens exit after the same layer."""
    drawn = np.random.default_rng(1)
    prompts = [drawn.integers(5, 1000, 3 + 11 * place).tolist() for place in range(len(exits))]
    params = [scripted_request(layer, 16) for layer in exits]
    return tokens(llm, prompts, params)


def test_never_exiting_gives_stocks_tokens_on_the_default_backend(tiny_model, default):
    stock = as_served(tiny_model, None)
    never = [None] * 8
    assert generated(default, never) == generated(stock, never)


def test_graphs_give_the_tokens_of_eager_mode_with_exits_and_rejoins(tiny_model, default):
    """Some tokens exit, and their rows rejoin: ``kv`` is exact, so a deferred layer runs later."""
    switch = {"exit_script": [2, 4], "min_rows_saved": 1}
    eager = as_served(tiny_model, switch, enforce_eager=True)
    exits = [2, None, 4, 2, None, 4, 2, None]
    assert generated(default, exits) == generated(eager, exits)


@pytest.mark.parametrize("seed", range(20))
def test_drawn_exits_reproduce_the_oracle(on_gpu, reference, seed):
    pattern, ran = drawn_pattern(on_gpu, 3000 + seed)
    assert wrong(reference, pattern, ran) == []


def test_kernels_exits_and_graphs_pass_the_self_test(default):
    """Also where an earlier start has passed it, and remembers."""
    _, runner, _ = parts(default)
    assert self_test(runner) == ()
