"""Model Runner V2 without a GPU: vLLM's Triton kernels in Triton's interpreter.

vLLM 0.32 uses Triton on a CPU if Triton has a backend called ``cpu``, which the published wheels
have not (`vllm/triton_utils/importing.py`). The interpreter needs none, so an entry will do. It
fails on two kernels, so that these run in torch: those for the masks of grammars and for `top_k`.
"""

from __future__ import annotations

import os
from types import ModuleType, SimpleNamespace
from typing import Any


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> SimpleNamespace:
        return SimpleNamespace(backend="cpu")


class _Compiler:
    """What torch's inductor asks for the name of Triton's backend, for the key of its cache."""

    def __init__(self, target: SimpleNamespace) -> None:
        pass

    @staticmethod
    def supports_target(target: SimpleNamespace) -> bool:
        return bool(target.backend == "cpu")

    def hash(self) -> str:
        return "interpreter"


class _Backend:
    driver = _Driver
    compiler = _Compiler


IS_V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"


def install_for_v2() -> None:
    """Call it before vLLM is imported, with ``TRITON_INTERPRET`` set."""
    if IS_V2 and os.environ.get("TRITON_INTERPRET") == "1":
        from triton.backends import backends

        backends["cpu"] = _Backend


class _MaskKernel:
    """What vLLM's `_apply_grammar_bitmask_kernel` does to logits, which cannot be interpreted.

    A mask says by its number which row of which request it is for, as in vLLM.
    """

    def __getitem__(self, grid: Any) -> _MaskKernel:
        return self

    def __call__(
        self,
        logits: Any,
        logits_stride: int,
        numbers: Any,
        cu_num_logits: Any,
        masks: Any,
        masks_stride: int,
        vocabulary: int,
        *,
        MASK_STRIDE: int,
        BLOCK_SIZE: int,
    ) -> None:
        import torch

        bits = torch.arange(32, dtype=torch.int32)
        for mask, number in zip(masks, numbers.tolist(), strict=True):
            request, place = divmod(number, MASK_STRIDE)
            row = int(cu_num_logits[request]) + place
            assert row < cu_num_logits[request + 1], "a mask for a row that is not there"
            is_allowed = ((mask[:, None] >> bits) & 1).bool().flatten()[:vocabulary]
            logits[row, ~is_allowed] = -torch.inf


def mask_with_torch(structured_outputs: ModuleType) -> None:
    """Replace the kernel for the masks of grammars."""
    structured_outputs._apply_grammar_bitmask_kernel = _MaskKernel()


def pick_with_torch(sampler: ModuleType) -> None:
    """Let `top_k` and `top_p` run as where there is no Triton: vLLM has that in torch, too."""
    sampler.HAS_TRITON = False


# By module: what to do once it is imported.
IN_TORCH = {
    "vllm.v1.worker.gpu.structured_outputs": mask_with_torch,
    "vllm.v1.sample.ops.topk_topp_sampler": pick_with_torch,
}
