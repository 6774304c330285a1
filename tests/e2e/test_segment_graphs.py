"""Decode steps replayed segment by segment reproduce the oracle; a stand-in records the graphs.

A graph of the stand-in runs what was captured again, on the tensors and metadata that were there
then: whatever a step does not put into the buffers it cannot see. The attention backends are two
that vLLM captures on GPUs: Triton's, in the interpreter, and PyTorch's FlexAttention, not compiled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu_worker import Worker

from tests.conftest import tiny_engine
from tests.e2e.patterns import Request, drive, wrong
from tests.e2e.scripted import FULL, drawn, parts
from tests.full import needed
from tests.tiny import FROM_ZERO
from tests.triton_on_cpu import IS_V2
from vllm_adainfer.engine.worker.gpu_worker import AdaInferGPUWorker

pytestmark = pytest.mark.skipif(not IS_V2, reason="Model Runner V1 captures no segments")

SIZES = [1, 2, 4]


class Recorded:
    """In place of a CUDA graph."""

    replays: ClassVar[Counter[int]] = Counter()  # by padded rows

    def __init__(self, forward: Callable[[CUDAGraphMode], None], rows: int) -> None:
        self.forward = forward
        self.rows = rows

    def replay(self) -> None:
        Recorded.replays[self.rows] += 1
        self.forward(CUDAGraphMode.NONE)


def record(manager: Any, prepare: Callable[..., Any], description: str) -> None:
    """In place of `CudaGraphManager.capture`."""
    for descs in manager._capture_descs.values():
        for graph in descs:
            prepare(graph, warmup=True)(CUDAGraphMode.NONE)
            forward = prepare(graph, warmup=False)
            forward(CUDAGraphMode.NONE)
            manager.graphs[graph] = Recorded(forward, graph.num_tokens)
    manager._graphs_captured = True


def write_kv(key: Any, value: Any, *cache_slots_and_scales: Any) -> None:
    """FlexAttention writes keys and values by an op that vLLM's CPU build has not."""
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash

    triton_reshape_and_cache_flash(key, value, *cache_slots_and_scales)


@pytest.fixture(scope="module", params=["TRITON_ATTN", "FLEX_ATTENTION"])
def graphed(
    tiny_model: Path, policy_from_zero: Path, request: pytest.FixtureRequest
) -> Iterator[Any]:
    """An engine with exits whose segments are recorded for 1, 2 and 4 requests."""
    from vllm.v1.attention import selector
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    selector._cached_get_attn_backend.cache_clear()  # other engines run on vLLM's own for CPUs
    platform = type(current_platform)
    backend = AttentionBackendEnum[request.param].get_path()
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        patch.setattr(platform, "get_attn_backend_cls", classmethod(lambda *_, **__: backend))
        patch.setattr(torch.ops._C_cache_ops, "reshape_and_cache_flash", write_kv, raising=False)
        patch.setattr(platform, "get_global_graph_pool", lambda _: None)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        patch.setattr(torch.accelerator, "get_memory_info", lambda: (0, 0))
        patch.setattr(CudaGraphManager, "capture", record)
        engine = tiny_engine(
            tiny_model,
            {"artifact": str(policy_from_zero), "kv": "propagate"},
            max_model_len=96,
            kv_cache_memory_bytes=8 << 20,
        )
        _, runner, _ = parts(engine)
        compilation = runner.vllm_config.compilation_config
        compilation.cudagraph_capture_sizes = SIZES
        compilation.max_cudagraph_capture_size = SIZES[-1]
        with torch.inference_mode():
            runner.model_state.capture_inner_cudagraphs(
                runner.input_buffers,
                runner.block_tables,
                runner.attn_groups,
                runner.kv_cache_config,
            )
        yield engine
    selector._cached_get_attn_backend.cache_clear()


def test_a_backend_that_cannot_be_captured_runs_without_and_says_so(engine, caplog):
    model, runner, _ = parts(engine)
    runner.model_state.capture_inner_cudagraphs(
        runner.input_buffers, runner.block_tables, runner.attn_groups, runner.kv_cache_config
    )
    assert model.graphs is None
    assert "without CUDA graphs of segments: CPU_ATTN cannot be captured" in caplog.text


def replayed(engine: Any, model: Any, kv: str, requests: list[Request]) -> Counter[int]:
    """Check `requests` against the oracle; segments replayed, by the rows they were padded to."""
    Recorded.replays.clear()
    with drawn(engine, kv) as ran:
        pattern = drive(engine, requests)
    names = range(len(requests))
    assert [found for name in names for found in wrong(model, kv, pattern, name, ran)] == []
    return +Recorded.replays


@pytest.mark.parametrize("kv", ["exact", "propagate"])
@pytest.mark.parametrize("seed", needed(1, of=range(2)))
def test_drawn_exits_reproduce_the_oracle(graphed, reference, kv, seed):
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
    assert replayed(graphed, reference, kv, requests)


def test_three_requests_are_padded_to_a_graph_of_four(graphed, reference):
    requests = [Request([7, 8, 9 + place], max_tokens=4, seed=FULL) for place in range(3)]
    segments = len(FROM_ZERO) + 1
    assert replayed(graphed, reference, "exact", requests) == {4: 3 * segments}


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
            assert replayed(graphed, reference, "exact", requests)
            assert masks.pop() == [place >= count for place in range(4)]
    finally:
        layer.remove()


def test_no_graph_is_replayed_for_a_request_with_several_rows(graphed, reference):
    one_token = Request([5, 6, 7, 8], max_tokens=1, seed=3)
    assert replayed(graphed, reference, "exact", [one_token]) == {}


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
        assert replayed(graphed, reference, "exact", requests) == {}
    finally:
        model.graphs = captured
