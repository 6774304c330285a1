"""vLLM's experts on a CPU give a row the same whatever other rows come with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

EXPERTS, CHOSEN, HIDDEN, INNER, ROWS = 6, 2, 64, 32, 50
HAS_AMX = torch.cpu._init_amx()  # a process has to ask for it


@pytest.mark.parametrize(
    ("isa", "dtype", "rounding"),
    [
        ("vec", torch.float32, 1e-5),
        ("vec", torch.bfloat16, 2**-6),
        pytest.param(
            "amx",
            torch.bfloat16,
            2**-6,
            marks=pytest.mark.skipif(not HAS_AMX, reason="this processor has no AMX"),
        ),
    ],
)
@pytest.mark.parametrize("kept", [1, 2, 7, 49])
def test_rows_that_leave_change_nothing_for_those_that_stay(isa, dtype, rounding, kept):
    generator = torch.Generator().manual_seed(kept)

    def drawn(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    up = cpu_prepack_moe_weight(drawn(EXPERTS, 2 * INNER, HIDDEN), isa)
    down = cpu_prepack_moe_weight(drawn(EXPERTS, HIDDEN, INNER), isa)
    rows = drawn(ROWS, HIDDEN) * 8
    scores = torch.randn(ROWS, EXPERTS, generator=generator).softmax(1).topk(CHOSEN)

    def result(which: Tensor) -> Tensor:
        output = torch.empty(len(which), HIDDEN, dtype=dtype)
        weights, ids = scores.values[which], scores.indices[which].int()
        cpu_fused_moe(output, rows[which], up, down, None, None, weights, ids, "silu", isa)
        return output

    stay = torch.from_numpy(np.random.default_rng(kept).choice(ROWS, kept, replace=False))
    everyone = result(torch.arange(ROWS))
    assert everyone.abs().mean() > 0.1
    torch.testing.assert_close(result(stay), everyone[stay], atol=rounding, rtol=rounding)
