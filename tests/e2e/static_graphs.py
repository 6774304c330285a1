"""A stand-in for vLLM's wrapper of piecewise CUDA graphs, which runs on a CPU.

It has the two traits through which graphs go wrong: a graph reads its inputs where they were at
capture, and the memory of a module's last output returns to the pool of all graphs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, get_forward_context


def tensors(values: Any) -> list[Tensor]:
    """Those among arguments or outputs."""
    values = values if isinstance(values, (tuple, list)) else [values]
    return [value for value in values if isinstance(value, Tensor)]


class StaticGraph:
    """In place of `CUDAGraphWrapper`, see `Platform.get_static_graph_wrapper_cls`.

    Attributes:
        all: every wrapper.
        replays: by all of them, by rows with padding.
        freed: outputs whose memory is back in the pool: the next graph may write there.

    """

    all: ClassVar[list[StaticGraph]] = []
    replays: ClassVar[Counter[int]] = Counter()
    freed: ClassVar[list[Tensor]] = []

    def __init__(
        self,
        runnable: Callable[..., Any],
        vllm_config: Any,
        runtime_mode: CUDAGraphMode,
        cudagraph_options: Any,
    ) -> None:
        StaticGraph.all.append(self)
        self.runnable = runnable
        self.is_last = cudagraph_options.weak_ref_output
        self.captured: dict[BatchDescriptor, tuple[list[int], Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runnable, name)

    def __call__(self, *args: Any) -> Any:
        context = get_forward_context()
        if context.cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE:
            return self.runnable(*args)
        for output in StaticGraph.freed:
            output.fill_(torch.nan if output.is_floating_point() else -1)
        StaticGraph.freed.clear()
        addresses = [tensor.data_ptr() for tensor in tensors(args)]
        batch = context.batch_descriptor
        assert batch is not None
        if batch in self.captured:
            expected, output = self.captured[batch]
            assert addresses == expected, "a graph reads its inputs where they were at capture"
            StaticGraph.replays[batch.num_tokens] += 1
            for kept, new in zip(tensors(output), tensors(self.runnable(*args)), strict=True):
                kept.copy_(new)
        else:
            output = self.runnable(*args)
            self.captured[batch] = addresses, output
        if self.is_last:
            StaticGraph.freed += tensors(output)
        return output
