"""The demo runs in the dtype that the processor multiplies itself."""

from __future__ import annotations

import pytest
import torch

from vllm_adainfer.offline.demo.run import dtype_to_serve


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [({"avx512_vnni": True, "avx512_bf16": False}, "float32"), ({"amx_bf16": True}, None)],
    ids=["avx512", "amx"],
)
def test_the_demo_leaves_bfloat16_where_it_is_emulated_and_says_so(
    monkeypatch, capsys, capabilities, dtype
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert dtype_to_serve() == dtype
    assert ("--dtype float32" in capsys.readouterr().out) == (dtype is not None)
