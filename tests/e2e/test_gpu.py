"""Exits on a GPU: compiled segments, CUDA graphs, each attention backend, against the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import small_engine
from tests.e2e.patterns import drawn_pattern, wrong
from tests.e2e.scripted import parts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module", params=["TRITON_ATTN", "FLEX_ATTENTION"])
def on_gpu(tiny_model: Path, tiny_policy: Path, request: pytest.FixtureRequest) -> Any:
    """An engine as it is served: compiled, with graphs; fp32, which these backends take."""
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


@pytest.mark.parametrize("kv", ["exact", "propagate"])
@pytest.mark.parametrize("seed", range(20))
def test_drawn_exits_reproduce_the_oracle(on_gpu, reference, kv, seed):
    pattern, ran = drawn_pattern(on_gpu, kv, 3000 + seed)
    names = range(len(pattern.requests))
    assert [found for name in names for found in wrong(reference, kv, pattern, name, ran)] == []
