"""A stand-in for CUDA graphs, and engines whose segments are recorded with it.

A graph of the stand-in runs what was captured again, on the tensors and metadata that were there
then: whatever a step does not put into the buffers it cannot see. The attention backends are two
that vLLM captures on GPUs: Triton's, in the interpreter, and PyTorch's FlexAttention, not compiled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.conftest import tiny_engine
from tests.e2e.scripted import parts


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


@contextmanager
def recorded_engine(
    model: Path, policy: Path, backend: str, sizes: Sequence[int] = (1, 2, 4)
) -> Iterator[Any]:
    """An engine with exits whose segments are recorded for these numbers of requests."""
    from vllm.v1.attention import selector
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    selector._cached_get_attn_backend.cache_clear()  # other engines run on vLLM's own for CPUs
    platform = type(current_platform)
    path = AttentionBackendEnum[backend].get_path()
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        patch.setattr(torch.ops._C_cache_ops, "reshape_and_cache_flash", write_kv, raising=False)
        patch.setattr(platform, "get_global_graph_pool", lambda _: None)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        patch.setattr(torch.accelerator, "get_memory_info", lambda: (0, 0))
        patch.setattr(CudaGraphManager, "capture", record)
        with pytest.MonkeyPatch.context() as choice:  # of this engine alone
            choice.setattr(platform, "get_attn_backend_cls", classmethod(lambda *_, **__: path))
            engine = tiny_engine(
                model,
                {"artifact": str(policy)},
                max_model_len=96,
                kv_cache_memory_bytes=8 << 20,
            )
        selector._cached_get_attn_backend.cache_clear()
        _, runner, _ = parts(engine)
        compilation = runner.vllm_config.compilation_config
        compilation.cudagraph_capture_sizes = list(sizes)
        compilation.max_cudagraph_capture_size = max(sizes)
        with torch.inference_mode():
            runner.model_state.capture_inner_cudagraphs(
                runner.input_buffers,
                runner.block_tables,
                runner.attn_groups,
                runner.kv_cache_config,
            )
        yield engine
