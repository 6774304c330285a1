"""Small arrays on their way to the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; torch views of a dtype need a multiple of its size


def upload(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> list[Tensor]:
    """`arrays` as tensors on `device`: all of them in one copy, which nobody waits for.

    On a CPU they share the arrays' memory.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    starts = np.cumsum([0, *(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)])
    # From torch's pinned pool, which reuses memory only when the copy is done.
    packed = torch.empty(int(starts[-1]), dtype=torch.uint8, pin_memory=True)
    for array, start in zip(arrays, starts.tolist(), strict=False):
        packed.numpy()[start : start + array.nbytes] = array.view(np.uint8).reshape(-1)
    there = packed.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype)
        for array, start in zip(arrays, starts.tolist(), strict=False)
    ]
