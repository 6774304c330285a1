"""Triton's interpreter, made to round as a GPU does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch


def pytest_make_parametrize_id(val: Any) -> str | None:
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


@pytest.fixture(autouse=True, scope="session")
def interpreter_rounds_to_nearest() -> Iterator[None]:
    """From fp32 to the nearest bf16; by itself it cuts the digits off."""
    triton = pytest.importorskip("triton")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    cut = interpreter._convert_float

    def convert(value: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) != (triton.language.float32, triton.language.bfloat16):
            return cut(value, source, target, rounding)
        nearest = torch.tensor(value).bfloat16().view(torch.int16)
        return nearest.numpy().view(np.uint16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        yield
